"""Heads of an adapter that do not fit the model: `load_adapter(..., ignore_mismatched_sizes=True)`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import Component
from plasticity_peft.components.wrappers import walk
from plasticity_peft.errors import AdapterError
from plasticity_peft.saved.layers import PREFIX
from plasticity_peft.saved.options import AdapterOptions
from plasticity_peft.saved.weights import fitting


def left_out(
    shapes: Mapping[str, torch.Tensor],
    options: AdapterOptions,
    model: nn.Module,
    architecture: Architecture,
    measured: Sequence[Component],
) -> dict[str, str]:
    """Returns the keys of the weights of heads that do not fit the model, each with the path of its head."""
    components = {path for part in measured for path in part.modules}
    heads: dict[str, str] = {}
    for key in shapes:
        outer = options.saved(key.removeprefix(PREFIX).rpartition(".")[0])
        # The modules of blocks have numbers in their paths.
        if outer and outer not in components and not any(name.isdigit() for name in outer.split(".")):
            heads[key] = outer
    left = {}
    for head in set(heads.values()):
        with_head = {key: value for key, value in shapes.items() if heads.get(key, head) == head}
        try:
            fitting(with_head, options, model, architecture, measured, head)
        except AdapterError:
            left[head] = [key for key, of in heads.items() if of == head]
    return {key: head for head, keys in left.items() for key in keys}


def warn_of_left_out(left: Mapping[str, str], source: str, model: nn.Module) -> None:
    """Warns about heads that were left out, if there are any."""
    if left:
        heads = ", ".join(sorted(set(left.values())))
        warnings.warn(
            f"{heads} of {source} does not fit this {type(model).__name__} and was left out. If the model has such a "
            "module, it keeps its own weights.",
            stacklevel=3,
        )


def own_heads(model: nn.Module, left: Mapping[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the model's own weights of the heads that were left out, by path and by the key of an adapter.

    PEFT loads an adapter only if it contains all modules in its `modules_to_save`.
    """
    heads = {path: module for path, module in walk(model) if path in left.values()}
    return {
        path: {f"{PREFIX}{path}.{name}": value.detach().clone() for name, value in head.state_dict().items()}
        for path, head in heads.items()
    }
