"""The common code of the benchmarks: interleaved timing, peak memory, and a table that is also written as JSON.

All numbers of a benchmark come from one run. The functions to compare run one after the other in each round, so that
other work on the machine affects all of them. The result is the ratio of their medians.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from plasticity_peft.report.tables import table

sys.path.insert(0, str(Path(__file__).parents[1]))
from step_cost import in_turns as in_turns

SIZES = {
    "ViT-S": {"hidden_size": 384, "num_hidden_layers": 12},
    "ViT-B": {"hidden_size": 768, "num_hidden_layers": 12},
    "ViT-L": {"hidden_size": 1024, "num_hidden_layers": 24},
}
"""Widths and depths of the usual models, with 64 features per head and an MLP four times as wide."""

MEASURES: dict[str, dict[str, Any]] = {
    "parameter_plasticity": {},
    "rate_of_change, embedding": {"inputs": "embedding"},
    "rate_of_change, activation": {"inputs": "activation"},
}
"""The default measure and the paper's in both protocols, as options of measure_plasticity."""


def vit_config(size: str, image_size: int = 224, **options: Any) -> ViTConfig:
    """Returns the config of one of `SIZES` with patches of 16 pixels."""
    hidden_size = SIZES[size]["hidden_size"]
    return ViTConfig(
        **SIZES[size],
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
        image_size=image_size,
        **options,
    )


@dataclass
class StepArguments:
    """The model and the batch of benchmarks of a training step."""

    size: str = field(default="ViT-S", metadata={"help": "ViT-S, ViT-B or ViT-L.", "choices": list(SIZES)})
    image_size: int = field(default=224, metadata={"help": "Pixels; patches are 16 wide."})
    batch_size: int = field(default=8, metadata={"help": "Images per step."})


def classifier(arguments: StepArguments) -> ViTForImageClassification:
    """Returns a model with 10 labels and random weights, the same each time."""
    torch.manual_seed(0)
    return ViTForImageClassification(vit_config(arguments.size, arguments.image_size, num_labels=10))


def training_step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Returns a training step of the model: a forward pass, a backward pass and a step of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-5)
    labels = torch.arange(len(images)) % 10

    def step() -> None:
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_above(prepare: Callable[[], Callable[[], object]]) -> float:
    """Returns the peak memory of a call, in MiB above the memory before it.

    `prepare` makes the model, and returns the call. This must run in its own process, as the peak is that of the
    process.
    """
    call = prepare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    unit = 1024 if sys.platform == "linux" else 1024**2
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def in_its_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs `function` in a new process. Call it while this process is small, because its memory adds to the peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def report(title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], arguments: Any) -> None:
    """Prints the rows as a table, and writes them to `arguments.output` with the arguments and the versions.

    `columns` are the headings of the columns, by the names of the values in a row.
    """
    print(table(title, tuple(columns.values()), [[_cell(row[name]) for name in columns] for row in rows]))
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    values = {"title": title, "arguments": asdict(arguments), "machine": machine, "rows": list(rows)}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def as_markdown(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the rows, whose columns are all names of values."""
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return table(title + ".\n", columns, [[_short(row.get(name)) for name in columns] for row in rows])


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def write_sections(
    path: Path,
    where: str,
    values: Mapping[str, Any],
    sections: Mapping[str, Sequence[Mapping[str, Any]]],
    titles: Mapping[str, str],
) -> None:
    """Writes the rows of each section with `values` as JSON, and as Markdown below `where`, in a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**values, "sections": sections}, indent=2) + "\n", encoding="utf-8")
    texts = [as_markdown(titles[name], rows) for name, rows in sections.items() if rows]
    path.with_suffix(".md").write_text("\n\n".join([where, *texts]) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.2f}"
    return str(value)
