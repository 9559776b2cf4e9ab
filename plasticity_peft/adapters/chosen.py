"""What a config has selected, and for which model, so that a selection is never applied to another model."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from plasticity_peft.components.wrappers import walk
from plasticity_peft.report.selection import Selection

SAMPLED_VALUES = 16
"""Number of values of each weight in the fingerprint of a model."""


@dataclass(frozen=True)
class Chosen:
    """The selection of `PlasticityConfig.choose`."""

    selection: Selection
    linears: tuple[str, ...]
    """Paths of the modules that LoRA adapts."""
    id2label: dict[int, str] | None
    """Names of the labels, from the config of the model."""
    options: Mapping[str, Any]
    """The options of the config on which the selection depends."""
    fingerprint: str
    """See `fingerprint`."""
    model: weakref.ref[nn.Module] | None = field(default=None, repr=False, compare=False)
    """The model itself. Copies and pickles of a config have only the fingerprint."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None}

    def is_for(self, model: nn.Module, modules: Iterable[str]) -> bool:
        """Returns whether the selection was made for `model`, or for a model with the same weights and labels."""
        same = self.model is not None and self.model() is model
        return same or fingerprint(model, modules) == self.fingerprint


def labels_of(model: nn.Module) -> dict[int, str] | None:
    """Returns the names of the labels in the config of a model; None if it has none."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return dict(labels) if isinstance(labels, Mapping) else None


def fingerprint(model: nn.Module, modules: Iterable[str]) -> str:
    """Returns a digest of the named modules of a base model and of its labels.

    It covers the shape of each weight and some of its values. Two models with the same fingerprint give the same
    scores. The weights of a head are not included, as each run may initialize them again.
    """
    found = dict(walk(model))
    digest = hashlib.sha256(repr(labels_of(model)).encode())
    for path in sorted(modules):
        digest.update(path.encode())
        for name, value in (found[path].state_dict(keep_vars=True) if path in found else {}).items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(_sample(value))
    return digest.hexdigest()


def _sample(value: Any) -> bytes:
    """Returns some values of a weight; none if the weight is not in the memory of this process."""
    spread = not isinstance(value, torch.Tensor) or hasattr(value, "device_mesh")
    if spread or value.device.type == "meta" or not value.numel():
        return b""
    step = max(1, value.numel() // SAMPLED_VALUES)
    with torch.no_grad():
        content: bytes = value.detach().reshape(-1)[::step].to("cpu", torch.float32).numpy().tobytes()
    return content
