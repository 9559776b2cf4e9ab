"""Time and memory of measuring a pair, against the straightforward procedure; both protocols.

    python examples/benchmarks/probe.py                      ViT-B/16 at 224 px, about five minutes on two cores
    python examples/benchmarks/probe.py --hidden_size 384    another size

The straightforward procedure calls every component on e(x) and on e(y) and keeps all outputs, as the authors' code
does ("embedding"); for "activation" it is two plain forward passes. Times are medians over rounds in which all take
turns; memory is what a process of its own needs above the model, at its peak. Weights are random: they do not matter.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser, ViTConfig, ViTModel

from plasticity_peft.architectures import Architecture, find_architecture
from plasticity_peft.calls import block_input, first_tensor
from plasticity_peft.criteria.distances import Distances
from plasticity_peft.criteria.rate_of_change import PROTOCOLS
from plasticity_peft.images import Inputs
from plasticity_peft.pairs import join


@dataclass
class BenchmarkArguments:
    """What is measured, and how often."""

    hidden_size: int = field(default=768, metadata={"help": "Features of a token; 64 a head, MLP four times as wide."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Blocks."})
    image_size: int = field(default=224, metadata={"help": "Pixels; patches are 16 wide."})
    batch_size: int = field(default=8, metadata={"help": "Pairs in a pass, for the times."})
    memory_batch_size: int = field(default=32, metadata={"help": "Pairs in a pass, for the memory."})
    rounds: int = field(default=5, metadata={"help": "How often each is timed."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/benchmarks/probe.json", metadata={"help": "Where the numbers go."})


def build(arguments: BenchmarkArguments) -> ViTModel:
    """Returns the model."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.hidden_size // 64,
        intermediate_size=4 * arguments.hidden_size,
        image_size=arguments.image_size,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def every_component(model: nn.Module, architecture: Architecture, x: Inputs, y: Inputs) -> torch.Tensor:
    """Returns the rates of change by the definition: all components called, all outputs kept, then compared."""
    tokens = [block_input(model, architecture, side).tokens for side in (x, y)]
    kept = []
    for e in tokens:
        outputs = []
        for part in architecture.components:
            padding = part.features[0][0] - e.shape[-1] if part.kind == "FC2" else 0
            outputs.append(first_tensor(model.get_submodule(part.path)(F.pad(e, (0, padding)))))
        kept.append(outputs)
    below = (tokens[0] - tokens[1]).flatten(1).norm(dim=1)
    return torch.stack([(a - b).flatten(1).norm(dim=1) / below for a, b in zip(*kept, strict=True)], dim=1)


def two_passes(model: nn.Module, architecture: Architecture, x: Inputs, y: Inputs) -> torch.Tensor:
    """Runs the model on both images of each pair, and measures nothing."""
    output: torch.Tensor = model(**join(x, y)).last_hidden_state
    return output


def ours(inputs: str) -> Callable[..., torch.Tensor]:
    """Returns the measure of this package, prepared once a model."""
    prepared: dict[int, Callable[[Inputs, Inputs], Distances]] = {}

    def measure(model: nn.Module, architecture: Architecture, x: Inputs, y: Inputs) -> torch.Tensor:
        if id(model) not in prepared:
            prepared[id(model)] = PROTOCOLS[inputs](model, architecture)
        outputs, distances = prepared[id(model)](x, y)
        return outputs / distances

    return measure


WAYS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "embedding, every component called": ("embedding", every_component),
    "embedding, this package": ("embedding", ours("embedding")),
    "activation, two plain passes": ("activation", two_passes),
    "activation, this package": ("activation", ours("activation")),
}
BASELINES = {"embedding": "embedding, every component called", "activation": "activation, two plain passes"}


def pairs(arguments: BenchmarkArguments, count: int) -> tuple[Inputs, Inputs]:
    """Returns the images of `count` pairs."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, arguments.image_size, arguments.image_size)
    x, y = ({"pixel_values": torch.randn(shape, generator=generator)} for _ in range(2))
    return x, y


def seconds(arguments: BenchmarkArguments) -> dict[str, float]:
    """Returns the median time of a pass in seconds, by way; in each round all take their turn."""
    model = build(arguments)
    architecture = find_architecture(model)
    x, y = pairs(arguments, arguments.batch_size)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with torch.no_grad():
        reference, got = (WAYS[name][1](model, architecture, x, y) for name in list(WAYS)[:2])
        torch.testing.assert_close(got.float(), reference, rtol=1e-4, atol=0)
        for number in range(arguments.rounds + 1):
            for name, (_, way) in WAYS.items():
                start = time.perf_counter()
                way(model, architecture, x, y)
                if number:  # the first round warms up
                    found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def peak_memory(arguments: BenchmarkArguments, name: str) -> float:
    """Returns the most memory that a pass takes above the model, in MiB. Run in a process of its own."""
    torch.set_num_threads(arguments.num_threads)
    model = build(arguments)
    architecture = find_architecture(model)
    x, y = pairs(arguments, arguments.memory_batch_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        WAYS[name][1](model, architecture, x, y)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.num_threads)
    context = multiprocessing.get_context("spawn")
    memory = {}
    for name in WAYS:  # before this process grows: a new one's peak starts from that of its parent
        with context.Pool(1) as pool:
            memory[name] = pool.apply(peak_memory, (arguments, name))
    times = seconds(arguments)
    table = Table(title=f"A pass over {arguments.batch_size} pairs; memory at {arguments.memory_batch_size} pairs")
    for column in ("way", "seconds", "of the baseline", "MiB above the model", "of the baseline"):
        table.add_column(column, justify="left" if column == "way" else "right")
    rows = []
    for name, (protocol, _) in WAYS.items():
        row = {
            "way": name,
            "seconds": times[name],
            "time_ratio": times[name] / times[BASELINES[protocol]],
            "mib": memory[name],
            "memory_ratio": memory[name] / memory[BASELINES[protocol]],
        }
        rows.append(row)
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['mib']:.0f}",
            f"{row['memory_ratio']:.2f}",
        )
    Console(width=119).print(table)
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"arguments": asdict(arguments), "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
