"""Lets Accelerate use FSDP and DeepSpeed on CPUs, as it does on GPUs. Called by a script before anything else of it.

Accelerate enables them only for processes that have an accelerator each. Here it takes the CPU for one, and gloo for
the backend. All else is as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def _prepare_backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def _set_device(state: PartialState) -> None:
    state.device = torch.device("cpu")


def take_cpus_for_gpus() -> None:
    """Changes Accelerate in this process."""
    PartialState._prepare_backend = _prepare_backend
    PartialState.set_device = _set_device
