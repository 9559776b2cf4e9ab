"""Time and memory of measuring a pair, compared with the straightforward procedure, for both protocols.

    python examples/benchmarks/probe.py                      ViT-B/16 at 224 px, about five minutes on two cores
    python examples/benchmarks/probe.py --size ViT-S         another size

The straightforward procedure calls every component on e(x) and on e(y) and keeps all outputs, as the authors' code
does ("embedding"). For "activation" it is two plain forward passes. Times are medians over interleaved rounds. Memory
is the peak above the model, in a separate process. The weights are random, which does not affect the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from harness import SIZES, in_its_own_process, in_turns, peak_above, report, vit_config
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser, ViTModel

from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.calls import Inputs, block_input, first_tensor
from plasticity_peft.criteria.protocols.activation import ActivationProtocol
from plasticity_peft.criteria.protocols.distances import Distances
from plasticity_peft.criteria.protocols.embedding import EmbeddingProtocol


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    size: str = field(default="ViT-B", metadata={"help": "ViT-S, ViT-B or ViT-L.", "choices": list(SIZES)})
    image_size: int = field(default=224, metadata={"help": "Pixels; patches are 16 wide."})
    batch_size: int = field(default=8, metadata={"help": "Pairs per pass, for the times."})
    memory_batch_size: int = field(default=32, metadata={"help": "Pairs per pass, for the memory."})
    rounds: int = field(default=5, metadata={"help": "Number of timed rounds."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/benchmarks/probe.json", metadata={"help": "JSON file to write."})


def build(arguments: BenchmarkArguments) -> ViTModel:
    """Returns the model."""
    torch.manual_seed(0)
    return ViTModel(vit_config(arguments.size, arguments.image_size), add_pooling_layer=False).eval()


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


PROTOCOLS = {"embedding": EmbeddingProtocol, "activation": ActivationProtocol}


def join(x: Inputs, y: Inputs) -> Inputs:
    """Returns the images of both as one batch, x first."""
    return {name: torch.cat([x[name], y[name]]) for name in x}


def two_passes(model: nn.Module, architecture: Architecture, x: Inputs, y: Inputs) -> torch.Tensor:
    """Runs the model on both images of each pair, and measures nothing."""
    output: torch.Tensor = model(**join(x, y)).last_hidden_state
    return output


def ours(inputs: str) -> Callable[..., torch.Tensor]:
    """Returns the measure of this package, prepared once per model."""
    prepared: dict[int, Callable[[Inputs], Distances]] = {}

    def measure(model: nn.Module, architecture: Architecture, x: Inputs, y: Inputs) -> torch.Tensor:
        if id(model) not in prepared:
            prepared[id(model)] = PROTOCOLS[inputs](model, architecture)
        outputs, distances = prepared[id(model)](join(x, y))
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
    """Returns the median time of a pass in seconds, by way."""
    model = build(arguments)
    architecture = find_architecture(model)
    x, y = pairs(arguments, arguments.batch_size)
    with torch.no_grad():
        reference, got = (WAYS[name][1](model, architecture, x, y) for name in list(WAYS)[:2])
        torch.testing.assert_close(got.float(), reference, rtol=1e-4, atol=0)
        ways = {name: partial(way, model, architecture, x, y) for name, (_, way) in WAYS.items()}
        return in_turns(ways, arguments.rounds)


def peak_memory(arguments: BenchmarkArguments, name: str) -> float:
    """Returns the most memory that a pass takes above the model, in MiB. Run in a process of its own."""
    torch.set_num_threads(arguments.num_threads)
    torch.set_grad_enabled(False)

    def prepare() -> Callable[[], object]:
        model = build(arguments)
        architecture = find_architecture(model)
        x, y = pairs(arguments, arguments.memory_batch_size)
        return lambda: WAYS[name][1](model, architecture, x, y)

    return peak_above(prepare)


COLUMNS = {
    "way": "way",
    "seconds": "seconds",
    "time_ratio": "of the baseline",
    "mib": "MiB above the model",
    "memory_ratio": "of the baseline",
}


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.num_threads)
    memory = {name: in_its_own_process(peak_memory, arguments, name) for name in WAYS}
    times = seconds(arguments)
    rows = [
        {
            "way": name,
            "seconds": times[name],
            "time_ratio": times[name] / times[BASELINES[protocol]],
            "mib": memory[name],
            "memory_ratio": memory[name] / memory[BASELINES[protocol]],
        }
        for name, (protocol, _) in WAYS.items()
    ]
    title = f"{arguments.size}, {arguments.image_size} px: a pass over {arguments.batch_size} pairs; memory at "
    report(f"{title}{arguments.memory_batch_size} pairs", COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
