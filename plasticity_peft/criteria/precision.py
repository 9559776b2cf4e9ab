"""In which precision a model runs, and in which its numbers are compared."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from plasticity_peft.checks import shown
from plasticity_peft.errors import ConfigError

DTYPES = ("bfloat16", "float16")
"""What a model may be run in beside its own precision."""


def check_dtype(dtype: str | torch.dtype | None) -> str | None:
    """Returns the name of a precision to run in; None for the model's own. Raises ConfigError for any other.

    Examples:
        >>> check_dtype(torch.bfloat16)
        'bfloat16'
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name is None:
        return None
    if not isinstance(name, str) or name not in DTYPES:
        allowed = ", ".join(map(repr, DTYPES))
        raise ConfigError(f"dtype must be one of {allowed}, or None for the model's own. Got {shown(dtype)}.")
    return name


def precise(dtype: torch.dtype) -> torch.dtype:
    """Returns the type in which differences of this type are taken: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Inside, autocast does not lower the precision of what is computed on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)
