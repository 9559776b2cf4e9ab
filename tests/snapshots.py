"""Everything about a model, and about the process around it, that measuring must leave alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns a comparable picture: structure, weights, modes, flags, hooks, attributes, random states."""
    modules = dict(model.named_modules())
    return {
        "structure": {name: type(module).__name__ for name, module in modules.items()},
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "hooks": {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "adapted": getattr(model, "_hf_peft_config_loaded", None),
        "random": (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Fails, naming what differs, unless the two pictures are equal bit for bit (a NaN equals itself)."""
    for key, value in before.items():
        if key == "weights":
            assert value.keys() == after[key].keys()
            for name, weight in value.items():
                assert torch.equal(torch.nan_to_num(weight), torch.nan_to_num(after[key][name])), name
        elif key == "random":
            assert value[0] == after[key][0], "python's random state"
            assert torch.equal(value[1], after[key][1]), "torch's random state"
            assert value[2] == after[key][2], "numpy's random state"
        else:
            assert value == after[key], key
