"""What a training step costs, measured: time, and the bytes that it keeps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn


def training_step(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """Returns a step of AdamW on a batch with labels: a forward pass, a backward pass and an update.

    The learning rate is so small that the model stays as it is.
    """
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-12, weight_decay=0)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median time of each function in seconds. Each round runs all of them. A first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def kept_bytes(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """Returns the bytes that autograd keeps in a forward pass, without weights and the batch, each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch.values())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def state_bytes(model: nn.Module) -> int:
    """Returns the bytes of the gradients of all that trains, and of the two moments of Adam."""
    return sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
