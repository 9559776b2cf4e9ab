"""Everything about a model, and about the process around it, that measuring must leave alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
AUTOCAST = ("cpu", "cuda")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns a comparable picture: structure, weights, modes, flags, hooks, attributes, the state of the process."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "structure": {name: (type(module).__name__, id(module)) for name, module in modules.items()},
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "parameters": {name: (id(p), p.data_ptr(), p.dtype, p.device) for name, p in parameters.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "parameter hooks": {name: len(p._backward_hooks or ()) for name, p in parameters.items()},
        "hooks": {name: [list(getattr(module, kind)) for kind in HOOKS] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "config": str(getattr(model, "config", None)),
        "adapted": getattr(model, "_hf_peft_config_loaded", None),
        "random": (random.getstate(), torch.get_rng_state(), np.random.get_state()),
        "process": process_state(),
    }


def process_state() -> dict[str, Any]:
    """Returns the settings of torch that a measurement turns over, or might."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in AUTOCAST],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "global hooks": len(nn.modules.module._global_forward_hooks)
        + len(nn.modules.module._global_forward_pre_hooks),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Fails, naming what differs, unless the two pictures are equal bit for bit (a NaN equals itself)."""
    for key, value in before.items():
        if key in ("weights", "buffers", "gradients"):
            assert value.keys() == after[key].keys(), key
            for name, tensor in value.items():
                assert _equal(tensor, after[key][name]), f"{key}: {name}"
        elif key == "random":
            assert value[0] == after[key][0], "python's random state"
            assert torch.equal(value[1], after[key][1]), "torch's random state"
            for one, other in zip(value[2], after[key][2], strict=True):
                assert np.array_equal(one, other), "numpy's random state"
        else:
            assert value == after[key], f"{key}: {_difference(value, after[key])}"


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _difference(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        return [(name, one.get(name), other.get(name)) for name in names[:3]]
    return one, other
