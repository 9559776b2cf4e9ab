"""The device memory of training one kind of component in full, compared with training it without PEFT.

    python examples/benchmarks/full_memory.py        ViT-S at 224 px, about four minutes on two busy cores

The same modules train in three ways: with `requires_grad` alone, with stock PEFT (`modules_to_save`, which holds them
twice), and with `training="full"`. The ratio is to the first.

On a GPU, the peak is that of torch's allocator, from the creation of the adapter to the end of the last step, above
what was allocated before. Elsewhere, torch's lazy device stands in for a GPU: it computes on the CPU, with tensors of
its own. It has no allocator, so tensors are counted: parameters, buffers and the state of the optimizer, and with them
the tensors saved for the backward pass at the end of the forward pass, or the gradients at the end of the backward
pass, whichever is more. Not counted are intermediate results, and the copying when the adapter is created. The lazy
device compiles slowly, so the model has 2 blocks there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import SIZES, report, vit_config
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser, ViTForImageClassification

from plasticity_peft import PlasticityConfig, PlasticityReport, measure_plasticity

COLUMNS = {
    "kind": "trained in full",
    "parameters": "parameters",
    "plain": "requires_grad alone, MiB",
    "stock": "stock PEFT, MiB",
    "ours": "ours, MiB",
    "stock_ratio": "ratio of stock PEFT",
    "ratio": "ratio of ours",
}
LABELS = 10


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    size: str = field(default="ViT-S", metadata={"help": "ViT-S, ViT-B or ViT-L.", "choices": list(SIZES)})
    image_size: int = field(default=224, metadata={"help": "Pixels; patches are 16 wide."})
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Number of blocks. Default: all on a GPU, otherwise 2."}
    )
    batch_size: int = field(default=4, metadata={"help": "Images per step. The fewer, the more the weights count."})
    kinds: str = field(default="MHA,FC1,FC2", metadata={"help": "Kinds that are trained, one after the other."})
    steps: int = field(default=2, metadata={"help": "Steps of AdamW."})
    adapt_on: str = field(
        default="device", metadata={"help": "Where the adapter is created.", "choices": ["device", "cpu"]}
    )
    output: str = field(default="outputs/benchmarks/full_memory.json", metadata={"help": "JSON file to write."})


def training_device() -> torch.device:
    """Returns the GPU, or the device that stands in for it."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    from torch._lazy import ts_backend

    ts_backend.init()
    return torch.device("lazy")


def plain(model: nn.Module, config: PlasticityConfig) -> nn.Module:
    """Returns the model with the modules of the adapter trainable, and the others frozen."""
    model.requires_grad_(False)
    for name in config.modules_to_save or ():
        model.get_submodule(name).requires_grad_(True)
    return model


def stock(model: nn.Module, config: PlasticityConfig) -> nn.Module:
    """Returns the model adapted by stock PEFT."""
    return get_peft_model(
        model, LoraConfig(target_modules=config.target_modules, modules_to_save=config.modules_to_save)
    )


def ours(model: nn.Module, config: PlasticityConfig) -> nn.Module:
    """Returns the model adapted by this package."""
    return get_peft_model(model, PlasticityConfig(report=config.report, candidates=config.candidates, training="full"))


WAYS: dict[str, Callable[[nn.Module, PlasticityConfig], nn.Module]] = {"plain": plain, "stock": stock, "ours": ours}


class Counted:
    """The largest size of what is counted on a device without an allocator."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.bytes = 0
        self._model, self._optimizer, self._device = model, optimizer, device
        self._saved: dict[int, torch.Tensor] = {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, notes what autograd saves, and looks at the end."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        self.look(self._saved.values())
        self._saved.clear()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        owner = tensor if tensor._base is None else tensor._base
        self._saved[id(owner)] = owner
        return tensor

    def look(self, others: Any = ()) -> None:
        """Counts parameters, buffers, the optimizer's state, and the other tensors."""
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        held = [*self._model.parameters(), *self._model.buffers(), *state, *others]
        tensors = {
            id(one): one for one in held if isinstance(one, torch.Tensor) and one.device.type == self._device.type
        }
        self.bytes = max(self.bytes, sum(one.numel() * one.element_size() for one in tensors.values()))


def peak_of(way: str, arguments: BenchmarkArguments, config: PlasticityConfig, device: torch.device) -> float:
    """Returns the peak memory of the device in MiB, above what was allocated before."""
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = build(arguments)
    model = WAYS[way](model.to(device) if arguments.adapt_on == "device" else model, config).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, foreach=False)
    counted = Counted(model, optimizer, device)
    train(model, optimizer, counted, arguments, device)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else counted.bytes
    return peak / 2**20


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    counted: Counted,
    arguments: BenchmarkArguments,
    device: torch.device,
) -> None:
    """Trains for the steps that are asked for."""
    generator = torch.Generator().manual_seed(0)
    size = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.randn(*size, generator=generator).to(device)
    labels = (torch.arange(arguments.batch_size) % LABELS).to(device)
    for _ in range(arguments.steps):
        with counted.forward():
            loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        counted.look([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()


def build(arguments: BenchmarkArguments) -> ViTForImageClassification:
    """Returns the model."""
    torch.manual_seed(0)
    config = vit_config(arguments.size, arguments.image_size, num_labels=LABELS)
    config.num_hidden_layers = arguments.num_hidden_layers or config.num_hidden_layers
    return ViTForImageClassification(config)


def row_of(
    kind: str, arguments: BenchmarkArguments, measured: PlasticityReport, device: torch.device
) -> dict[str, object]:
    """Returns the peaks of the three ways for one kind."""
    config = PlasticityConfig(report=measured, candidates=kind, training="full").choose(build(arguments))
    peaks = {way: peak_of(way, arguments, config, device) for way in WAYS}
    parameters = plain(build(arguments), config).parameters()
    return {
        "kind": kind,
        "parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        **peaks,
        "stock_ratio": peaks["stock"] / peaks["plain"],
        "ratio": peaks["ours"] / peaks["plain"],
    }


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    device = training_device()
    if device.type == "lazy" and arguments.num_hidden_layers is None:
        arguments.num_hidden_layers = 2
    measured = measure_plasticity(build(arguments), criterion="bound")
    kinds = arguments.kinds.split(",")
    if device.type == "cuda":  # once unmeasured: workspaces of the libraries stay allocated
        row_of(kinds[0], arguments, measured, device)
    rows = [row_of(kind, arguments, measured, device) for kind in kinds]
    how = "peak of the allocator" if device.type == "cuda" else "tensors counted"
    title = f"{arguments.size}, {arguments.image_size} px, {arguments.batch_size} images, {device.type}: {how}"
    report(title, COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
