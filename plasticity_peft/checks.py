"""What values may be. Every error names the argument, what is allowed and what was given.

A check takes the name of an argument and its value. It returns the value, or raises ConfigError.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from plasticity_peft.deprecation import warn_renamed
from plasticity_peft.errors import ConfigError

GRANULARITIES = ("kind", "component")
PROTOCOLS = ("embedding", "activation")
OBSERVED = ("pairs", "images", "batches", "weights")
TRAINING_MODES = ("lora", "full")
DTYPES = ("bfloat16", "float16")
"""Precisions in which a model may be measured, besides its own."""
MOST_SAMPLES = 2**24
"""More than any ranking needs (the paper uses 12,800). The memory to draw this many is always available."""
HIGHEST_SEED = 2**64 - 1
"""The highest seed that torch accepts."""


def shown(value: object) -> str:
    """Returns a value as text for an error message. Long text is cut, and an error of `repr` is caught."""
    try:
        text = repr(value)
    except Exception:
        return f"an object of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Returns `value`. Raises ConfigError unless it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}. Got {shown(value)}.")
    return value


def canonical_granularity(granularity: object, stacklevel: int = 4) -> str:
    """Returns "kind" or "component"; "block", the former name of "component", is accepted with a FutureWarning.

    `stacklevel` is that of the warning; the default is for the caller of a dataclass whose `__post_init__` calls this.

    Raises:
        ConfigError: the granularity is not known.
    """
    if isinstance(granularity, str) and granularity == "block":
        warn_renamed('granularity="block"', 'granularity="component"', stacklevel)
        return "component"
    return check_choice("granularity", granularity, GRANULARITIES)


def check_count(name: str, value: Any, lowest: int, highest: int | None = None, reason: str = "") -> int:
    """Returns `value`. Raises ConfigError unless it is a whole number in the range, which `reason` explains."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < lowest or (highest is not None and value > highest):
        allowed = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ConfigError(f"{name} must be a whole number {allowed}{reason}. Got {shown(value)}.")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """Returns `value`. Raises ConfigError unless it is a finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{name} must be a number above 0. Got {shown(value)}.")
    return value  # type: ignore[no-any-return]


def is_number(value: object) -> bool:
    """Returns whether `value` is an int or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_flag(name: str, value: Any) -> bool:
    """Returns `value`. Raises ConfigError unless it is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False. Got {shown(value)}.")
    return value


def check_path(name: str, value: Any) -> str | None:
    """Returns `value`. Raises ConfigError unless it is text, the path of a module, or None."""
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} must be the path of a module, or None. Got {shown(value)}.")
    return value


def check_forward_kwargs(name: str, value: Any) -> Mapping[str, Any] | None:
    """Returns `value`. Raises ConfigError unless it maps names of arguments to plain values, or is None."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(
            f"{name} must map names of arguments of the model's forward pass to their values, such as "
            f"{{'interpolate_pos_encoding': True}}. Got {shown(value)}."
        )
    for key, each in value.items():
        if not _is_plain(each):
            raise ConfigError(
                f"{name}[{key!r}] must be a number, a string, True, False, None, or a list or dictionary of them. Got "
                f"{type(each).__name__}. What belongs to each image goes into the items of target_data."
            )
    return value


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_patterns(name: str, value: Any) -> Mapping[str, Any]:
    """Returns `value`, or an empty mapping for None.

    Raises:
        ConfigError: it is not a mapping whose keys are regular expressions for the ends of module paths.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must map module paths to numbers. Got {shown(value)}.")
    for key in value:
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{name}: {shown(key)} is not a regular expression ({error}).") from error
    return value
