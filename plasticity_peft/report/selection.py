"""From a ranking to what is trained: the best units, by number or by a budget of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from plasticity_peft.checks import (
    GRANULARITIES,
    TRAINING_MODES,
    check_amount,
    check_choice,
    check_count,
    check_lora,
    shown,
)
from plasticity_peft.components.component import KINDS, Component
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


def parameter_counts(components: Iterable[Component], **lora: Any) -> dict[str, dict[str, int]]:
    """Returns how many parameters of each component train in each mode, by canonical id.

    `lora` are arguments of `lora_parameters`. A norm, which LoRA cannot take, trains in full in both modes.
    """
    return {
        part.id: {
            "lora": lora_parameters(part.modules, part.features, **lora) if part.features else part.parameters,
            "full": part.parameters,
        }
        for part in components
    }


@dataclass(frozen=True)
class Choice:
    """What is to be chosen from a ranking of units: the first `top_k`, or the first that fit into a budget."""

    units: tuple[str, ...]
    """All units, in the order of the blocks."""
    top_k: int | None = None
    sizes: Mapping[str, int] | None = None
    """Parameters of each unit, where the choice is by budget."""
    limit: float = 0.0
    """How many parameters the budget is."""

    def chosen(self, ranking: Sequence[str]) -> tuple[str, ...]:
        """Returns the units that are chosen from a ranking, best first; none where not even the best one fits.

        A budget ends at the first unit that does not fit instead of trying smaller ones further down: so a larger
        budget never drops a unit.
        """
        if self.sizes is None:
            return tuple(ranking[: self.top_k])
        total, number = 0, 0
        for unit in ranking:
            total += self.sizes[unit]
            if total > self.limit:
                break
            number += 1
        return tuple(ranking[:number])

    def orders(self, ranking: Sequence[str]) -> list[tuple[str, str]]:
        """Returns the pairs (better, worse) of units whose order decides what is chosen."""
        chosen = self.chosen(ranking)
        rest = list(ranking[len(chosen) :])
        orders = [(better, worse) for better in chosen for worse in rest]
        if self.sizes is not None and rest:
            # One that fits must not belong in the place of the first that does not.
            left = self.limit - sum(self.sizes[unit] for unit in chosen)
            orders += [(rest[0], worse) for worse in rest[1:] if self.sizes[worse] <= left]
        return orders

    @property
    def possible_errors(self) -> int:
        """How many pairs of units, at most, could be told the wrong way round in a wrong choice.

        By number, a wrong choice holds a unit that is not among the best `top_k`, before one that is.
        """
        units = len(self.units)
        if self.sizes is None and self.top_k is not None:
            return max(1, self.top_k * (units - self.top_k))
        return max(1, units * (units - 1) // 2)


def choice_of(
    components: Iterable[Component],
    model_parameters: int,
    top_k: int | None,
    budget: float | None,
    *,
    granularity: str,
    candidates: Iterable[str],
    training: str,
    **lora: Any,
) -> Choice:
    """Returns what is to be chosen; the arguments are those of `PlasticityReport.select`.

    Raises:
        ConfigError: an argument is out of its range, or both `top_k` and `budget` are given.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("training", training, TRAINING_MODES)
    check_amount(top_k, budget)
    check_lora(**lora)
    kinds, components = check_candidates(candidates), tuple(components)
    counts = parameter_counts(components, **lora)
    sizes: dict[str, int] = {}
    for part in components:
        if part.kind in kinds:
            unit = part.kind if granularity == "kind" else part.id
            sizes[unit] = sizes.get(unit, 0) + counts[part.id][training]
    units = tuple(sizes)
    if budget is not None:
        return Choice(units, None, sizes, budget * model_parameters)
    top_k = 1 if top_k is None else top_k
    listing = ", ".join(units if len(units) <= 6 else [*units[:3], "...", units[-1]])
    check_count("top_k", top_k, 1, len(units), f", the number of units to choose from ({listing})")
    return Choice(units, top_k)


def check_candidates(candidates: Iterable[str]) -> tuple[str, ...]:
    """Returns the kinds as a tuple. Raises ConfigError where there is none, or one is unknown or named twice."""
    if isinstance(candidates, (set, frozenset)):  # whose order means nothing, and differs from run to run
        candidates = sorted(candidates, key=lambda kind: KINDS.index(kind) if kind in KINDS else -1)
    names = (candidates,) if isinstance(candidates, str) else candidates
    listed = isinstance(names, Iterable) and not isinstance(names, (bytes, Mapping))
    kinds = tuple(islice(names, len(KINDS) + 1)) if listed else ()
    if not kinds or not all(isinstance(kind, str) and kind in KINDS for kind in kinds) or len(set(kinds)) < len(kinds):
        raise ConfigError(f"candidates must be one or more of {', '.join(KINDS)}, each once. Got {shown(candidates)}.")
    return kinds
