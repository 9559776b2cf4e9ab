"""The cost of a pair by the size of the model and the number of tokens, compared with two plain forward passes.

    python examples/benchmarks/sizes.py        ViT-S, B and L at 112 and 224 px, about ten minutes on two cores

The whole measurement is timed, including the work that is done once per model: `setup` is the time without any pairs.
The weights are random, which does not affect the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import MEASURES, SIZES, in_its_own_process, in_turns, peak_above, report, vit_config
from transformers import HfArgumentParser, ViTForImageClassification

from plasticity_peft import measure_plasticity

COLUMNS = {
    "size": "model",
    "image_size": "pixels",
    "tokens": "tokens",
    "measure": "measure",
    "setup": "setup, s",
    "seconds": "a pair or image, s",
    "ratio": "of its forward passes",
    "mib": "MiB above the model",
}


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    sizes: list[str] = field(default_factory=lambda: list(SIZES), metadata={"help": "ViT-S, ViT-B, ViT-L."})
    image_sizes: list[int] = field(default_factory=lambda: [112, 224], metadata={"help": "Pixels."})
    batch_size: int = field(default=4, metadata={"help": "Pairs per pass."})
    rounds: int = field(default=3, metadata={"help": "Number of timed rounds."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/benchmarks/sizes.json", metadata={"help": "JSON file to write."})


def build(size: str, image_size: int) -> ViTForImageClassification:
    """Returns the model."""
    torch.manual_seed(0)
    return ViTForImageClassification(vit_config(size, image_size)).eval()


def images_of(image_size: int, count: int) -> torch.Tensor:
    """Returns random images: float32 (count, 3, image_size, image_size)."""
    return torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def measured(model: ViTForImageClassification, images: torch.Tensor, measure: str, pairs: int) -> Callable[[], object]:
    """Returns the call that measures."""
    options = {"settle": None, "batch_size": max(2, pairs), **MEASURES[measure]}
    return lambda: measure_plasticity(model, images, max_samples=pairs, **options)


def peak_memory(size: str, image_size: int, measure: str, pairs: int, threads: int) -> float:
    """Returns the peak memory of a pass above the model, in MiB. Must run in its own process."""
    torch.set_num_threads(threads)
    return peak_above(lambda: measured(build(size, image_size), images_of(image_size, 2 * pairs), measure, pairs))


def rows_of(arguments: BenchmarkArguments, size: str, image_size: int) -> list[dict[str, Any]]:
    """Returns the rows of a model at a size of images, without the memory."""
    count = arguments.batch_size
    model, images = build(size, image_size), images_of(image_size, 4 * count)

    def forward() -> None:
        with torch.no_grad():
            model(images[:count])

    ways: dict[str, Callable[[], object]] = {"forward": forward}
    for measure in MEASURES:
        ways[f"{measure}, few"] = measured(model, images, measure, 2)
        ways[f"{measure}, many"] = measured(model, images, measure, count + 2)
    times = in_turns(ways, arguments.rounds)
    rows = []
    for measure in MEASURES:
        few, many = times[f"{measure}, few"], times[f"{measure}, many"]
        each = (many - few) / count
        passes = (1 if measure == "parameter_plasticity" else 2) * times["forward"] / count
        rows.append(
            {
                "size": size,
                "image_size": image_size,
                "tokens": (image_size // 16) ** 2 + 1,
                "measure": measure,
                "setup": few - 2 * each,
                "seconds": each,
                "ratio": each / passes,
            }
        )
    return rows


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.num_threads)
    cases = [(size, image_size) for size in arguments.sizes for image_size in arguments.image_sizes]
    memory = [
        in_its_own_process(peak_memory, *case, measure, arguments.batch_size, arguments.num_threads)
        for case in cases
        for measure in MEASURES
    ]
    rows = [row for case in cases for row in rows_of(arguments, *case)]
    for row, mib in zip(rows, memory, strict=True):
        row["mib"] = mib
    report(f"What a pair or an image costs, in passes over {arguments.batch_size}", COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
