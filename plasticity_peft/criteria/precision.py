"""The precision in which a model runs, and the one in which its numbers are compared."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def precise(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype for differences of numbers of this dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Inside, autocast does not lower the precision of computations on the device of `tensor`."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
