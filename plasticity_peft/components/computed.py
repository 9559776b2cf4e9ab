"""Refuses layers whose weights are computed from other tensors before each call, such as pruned layers.

For such a layer, LoRA, a trained copy of it and the weights that a criterion reads would each mean something else. The
error contains the call that makes the weights plain parameters again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from plasticity_peft.components.wrappers import walk
from plasticity_peft.errors import ModelError

_REMEDIES = (
    (prune.BasePruningMethod, "is pruned", "torch.nn.utils.prune.remove({path}, {name!r}), which keeps the zeros"),
    (WeightNorm, "has a weight norm", "torch.nn.utils.remove_weight_norm({path}, {name!r})"),
    (SpectralNorm, "has a spectral norm", "torch.nn.utils.remove_spectral_norm({path}, {name!r})"),
)


def check_plain_weights(model: nn.Module, paths: Iterable[str]) -> None:
    """Raises ModelError if weights of the modules at these paths, or below, are computed from other tensors."""
    for top in paths:
        for path, module in walk(model.get_submodule(top), top):
            found = _computed(path, module)
            if found:
                why, remedy = found
                raise ModelError(
                    f"{path} {why}: its weights are computed from other tensors before each call, so they "
                    f"cannot be measured or adapted. Make them parameters again: {remedy}."
                )


def _computed(path: str, module: nn.Module) -> tuple[str, str] | None:
    """Returns why weights of a module are computed, and how they become parameters again; None if they are not."""
    layer = f"model.get_submodule({path!r})"
    if parametrize.is_parametrized(module):
        names = list(module.parametrizations)  # type: ignore[arg-type]
        kinds = ", ".join(type(each).__name__.strip("_") for name in names for each in module.parametrizations[name])  # type: ignore[index, union-attr]
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations({layer}, {names[0]!r})"
        return f"is parametrized ({kinds})", remedy
    for hook in module._forward_pre_hooks.values():
        for kind, why, remedy in _REMEDIES:
            if isinstance(hook, kind):
                name = getattr(hook, "name", getattr(hook, "_tensor_name", "weight"))
                return why, remedy.format(path=layer, name=name)
    for name in ("weight", "bias"):
        if isinstance(vars(module).get(name), torch.Tensor):
            return f"has a {name} that is not a parameter", f"{layer}.{name} = torch.nn.Parameter(...)"
    return None
