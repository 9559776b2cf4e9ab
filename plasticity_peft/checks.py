"""What arguments may be. One template for every message: the argument, what is allowed, what came."""

from __future__ import annotations

from collections.abc import Iterable

from plasticity_peft.components import KINDS
from plasticity_peft.errors import ConfigError

GRANULARITIES = ("kind", "block")
PROTOCOLS = ("embedding", "activation")
OBSERVED = ("pairs", "images", "batches", "weights")
TRAINING_MODES = ("lora", "full")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value`, the argument `name`, is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}. Got {value!r}.")


def check_count(name: str, value: object, lowest: int, highest: int | None = None, reason: str = "") -> None:
    """Raises ConfigError unless `value` is a whole number in the given range; `reason` explains the range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < lowest or (highest is not None and value > highest):  # type: ignore[operator]
        allowed = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ConfigError(f"{name} must be a whole number {allowed}{reason}. Got {value!r}.")


def check_budget(budget: object) -> None:
    """Raises ConfigError unless `budget` is a share."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ConfigError(
            "budget must be a share of the model's parameters, above 0 and at most 1 (0.01 is one percent). "
            f"Got {budget!r}."
        )


def check_settle(settle: object) -> None:
    """Raises ConfigError unless `settle` is a confidence, or None."""
    if settle is None:
        return
    if isinstance(settle, bool) or not isinstance(settle, (int, float)) or not 0 < settle < 1:
        raise ConfigError(
            "settle must be a confidence above 0 and below 1 (0.95: a wrong choice is called settled in 5 % of cases "
            f"at most), or None to look at all pairs. Got {settle!r}."
        )


def check_amount(top_k: object, budget: object) -> None:
    """Raises ConfigError where both or an impossible `top_k` or `budget` are given; None stands for not given."""
    if top_k is not None and budget is not None:
        raise ConfigError(f"Give top_k or budget, not both. Got top_k={top_k!r} and budget={budget!r}.")
    if top_k is not None:
        check_count("top_k", top_k, 1)
    if budget is not None:
        check_budget(budget)


def check_candidates(candidates: Iterable[str]) -> tuple[str, ...]:
    """Returns the kinds as a tuple. Raises ConfigError where there is none, or one is unknown or named twice."""
    kinds = (candidates,) if isinstance(candidates, str) else candidates
    kinds = tuple(kinds) if isinstance(kinds, Iterable) else ()
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise ConfigError(f"candidates must be one or more of {', '.join(KINDS)}, each once. Got {candidates!r}.")
    return kinds
