"""What models answer, in a form that can be saved and compared. Imports nothing of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def answers(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns all tensors in the output of a model in evaluation mode, by their places, with the same randomness."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = dict(tensors(model.eval()(**batch)))
    assert found, f"{type(model).__name__} returned no tensor"
    return found


def tensors(value: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (place, tensor) for each tensor of numbers with a fraction in an output."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield place, value.detach()
    elif isinstance(value, Mapping) or hasattr(value, "items"):
        for key, part in value.items():
            yield from tensors(part, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from tensors(part, f"{place}.{number}")


def difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str | None:
    """Returns where two answers differ by more than the order of additions explains; None if they are equal."""
    if one.keys() != other.keys():
        return f"other outputs: {sorted(set(one) ^ set(other))}"
    for place, value in one.items():
        if value.shape != other[place].shape:
            return f"{place}: shapes {tuple(value.shape)} and {tuple(other[place].shape)}"
        if not torch.allclose(value, other[place], rtol=1e-4, atol=1e-5, equal_nan=True):
            return f"{place} differs by {float((value - other[place]).abs().max()):.2g}"
    return None
