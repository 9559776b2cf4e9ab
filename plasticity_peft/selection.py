"""From a ranking to what is trained: the best units, by number or by a budget of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plasticity_peft.checks import check_count
from plasticity_peft.errors import ConfigError


class RankedUnit(NamedTuple):
    """A unit of a ranking: a kind ("MHA") or a component ("3.MHA"), its score and the score's standard error."""

    unit: str
    score: float
    standard_error: float


@dataclass(frozen=True)
class Selection:
    """What is trained: the best units of a ranking, in that order."""

    granularity: str
    """"kind" or "block"."""
    units: tuple[str, ...]
    """Canonical ids of the chosen units, best first: kinds, or components when `granularity` is "block"."""
    components: tuple[str, ...]
    """Canonical ids of all components in these units, in the order of the blocks."""
    modules: tuple[str, ...]
    """Paths of their linear layers and norms, in the model that was measured."""
    parameters: Mapping[str, int]
    """How many parameters train, the head not counted, in each mode: {"lora": ..., "full": ...}."""
    model_parameters: int
    """Parameters of the whole model that was measured: what a budget is a share of."""


def lora_parameters(
    modules: Sequence[str],
    features: Sequence[tuple[int, int]],
    *,
    r: int = 8,
    rank_pattern: Mapping[str, int] | None = None,
    use_dora: bool = False,
    lora_bias: bool = False,
) -> int:
    """Returns how many parameters LoRA trains in linear layers: r (in + out) a layer.

    DoRA adds one magnitude an output, `lora_bias` one bias an output; `rank_pattern` overrides `r` where a key
    matches the end of a module's path, as in PEFT.

    Examples:
        >>> lora_parameters(["mlp.fc1"], [(64, 256)], r=8)
        2560
    """
    total = 0
    for path, (inputs, outputs) in zip(modules, features, strict=True):
        ranks = (rank for key, rank in (rank_pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path))
        total += next(ranks, r) * (inputs + outputs) + outputs * (use_dora + lora_bias)
    return total


def best(ranking: Sequence[RankedUnit], top_k: int) -> tuple[str, ...]:
    """Returns the first `top_k` units. Raises ConfigError where there are fewer."""
    names = [row.unit for row in ranking]
    listing = ", ".join(names if len(names) <= 6 else [*names[:3], "...", names[-1]])
    check_count("top_k", top_k, 1, len(names), f", the number of units to choose from ({listing})")
    return tuple(names[:top_k])


def fitting(
    ranking: Sequence[RankedUnit], sizes: Mapping[str, int], budget: float, model_parameters: int
) -> tuple[str, ...]:
    """Returns the best units in order while their `sizes` fit into `budget`, a share of `model_parameters`.

    It stops at the first unit that doesn't fit instead of trying smaller ones further down: so a larger budget never
    drops a unit. Raises ConfigError where not even the best unit fits.
    """
    units: list[str] = []
    total = 0
    for row in ranking:
        total += sizes[row.unit]
        if total > budget * model_parameters:
            break
        units.append(row.unit)
    if not units:
        name = ranking[0].unit
        raise ConfigError(
            f"budget={budget!r} is {budget * model_parameters:,.0f} of {model_parameters:,} parameters, less than the "
            f"{sizes[name]:,} of the best unit, {name}. Give a budget above {sizes[name] / model_parameters:.4f}, a "
            'smaller r, or granularity="block".'
        )
    return tuple(units)
