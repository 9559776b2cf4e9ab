"""What arguments may be. One template for every message: the argument, what is allowed, what came."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from plasticity_peft.deprecation import warn_renamed
from plasticity_peft.errors import ConfigError

GRANULARITIES = ("kind", "component")
PROTOCOLS = ("embedding", "activation")
OBSERVED = ("pairs", "images", "batches", "weights")
TRAINING_MODES = ("lora", "full")
MOST_PAIRS = 2**24
"""More than any ranking needs (the paper takes 12,800), and as many as can be drawn without asking how much memory."""
HIGHEST_SEED = 2**64 - 1
"""What torch takes."""


def shown(value: object) -> str:
    """Returns a value as a message shows it: cut where it is long, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:
        return f"an object of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value`, the argument `name`, is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}. Got {shown(value)}.")


def canonical_granularity(granularity: object) -> str:
    """Returns "kind" or "component"; "block", the former name of "component", is accepted with a FutureWarning.

    Raises:
        ConfigError: the granularity is not known.
    """
    if granularity == "block":
        warn_renamed('granularity="block"', 'granularity="component"', stacklevel=4)
        return "component"
    check_choice("granularity", granularity, GRANULARITIES)
    return str(granularity)


def check_count(name: str, value: object, lowest: int, highest: int | None = None, reason: str = "") -> None:
    """Raises ConfigError unless `value` is a whole number in the given range; `reason` explains the range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < lowest or (highest is not None and value > highest):  # type: ignore[operator]
        allowed = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ConfigError(f"{name} must be a whole number {allowed}{reason}. Got {shown(value)}.")


def check_budget(budget: object) -> None:
    """Raises ConfigError unless `budget` is a share."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ConfigError(
            "budget must be a share of the model's parameters, above 0 and at most 1 (0.01 is one percent). "
            f"Got {shown(budget)}."
        )


def check_settle(settle: object) -> None:
    """Raises ConfigError unless `settle` is a confidence, or None."""
    if settle is None:
        return
    if isinstance(settle, bool) or not isinstance(settle, (int, float)) or not 0 < settle < 1:
        raise ConfigError(
            "settle must be a confidence above 0 and below 1 (0.95: a wrong choice is called settled in 5 % of cases "
            f"at most), or None to look at all pairs. Got {shown(settle)}."
        )


def check_amount(top_k: object, budget: object) -> None:
    """Raises ConfigError where both or an impossible `top_k` or `budget` are given; None stands for not given."""
    if top_k is not None and budget is not None:
        raise ConfigError(f"Give top_k or budget, not both. Got top_k={shown(top_k)} and budget={shown(budget)}.")
    if top_k is not None:
        check_count("top_k", top_k, 1)
    if budget is not None:
        check_budget(budget)


def check_flag(name: str, value: object) -> None:
    """Raises ConfigError unless `value`, the argument `name`, is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False. Got {shown(value)}.")


def check_path(name: str, value: object) -> None:
    """Raises ConfigError unless `value`, the argument `name`, is the path of a module, or None."""
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} must be the path of a module, or None. Got {shown(value)}.")


def check_forward_kwargs(value: object) -> None:
    """Raises ConfigError unless `value` maps names of arguments to plain values, or is None."""
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(
            "forward_kwargs must map names of arguments of the model's forward pass to their values, such as "
            f"{{'interpolate_pos_encoding': True}}. Got {shown(value)}."
        )
    for name, each in value.items():
        if not _is_plain(each):
            raise ConfigError(
                f"forward_kwargs[{name!r}] must be a number, a string, True, False, None, or a list or dictionary of "
                f"them. Got {type(each).__name__}. What belongs to each image goes into the items of target_data."
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_number(name: str, value: object) -> None:
    """Raises ConfigError unless `value`, the argument `name`, is a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a number above 0. Got {shown(value)}.")


def check_patterns(name: str, value: object) -> Mapping[str, object]:
    """Returns a mapping from ends of module paths, as regular expressions; empty for None. Raises ConfigError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must map module paths to numbers. Got {shown(value)}.")
    for key in value:
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{name}: {shown(key)} is no regular expression ({error}).") from error
    return value


def check_lora(
    r: object = 8, rank_pattern: object = None, use_dora: object = False, lora_bias: object = False
) -> None:
    """Raises ConfigError unless the options of LoRA that count in a budget are of the right type."""
    check_count("r", r, 1)
    for key, rank in check_patterns("rank_pattern", rank_pattern).items():
        check_count(f"rank_pattern[{key!r}]", rank, 1)
    check_flag("use_dora", use_dora)
    check_flag("lora_bias", lora_bias)
