"""From a ranking to a selection: the best units, by number or by a budget of parameters."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, NamedTuple

from annotated_types import Len

from plasticity_peft.arguments import check_arguments
from plasticity_peft.checks import GRANULARITIES, TRAINING_MODES, check_count
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.constraints import Count, PositiveCount, Text, allowed, one_of
from plasticity_peft.errors import ConfigError

BY_MODE = allowed(
    f"must have the keys {' and '.join(map(repr, TRAINING_MODES))}", lambda values: set(values) == set(TRAINING_MODES)
)


class RankedUnit(NamedTuple):
    """A unit of a ranking: a kind ("MHA") or a component ("3.MHA"), its score and the score's standard error."""

    unit: str
    score: float
    standard_error: float


@dataclass(frozen=True)
class Selection:
    """The units to train: the best ones of a ranking, in that order."""

    granularity: Annotated[str, one_of(GRANULARITIES)]
    """"kind" or "component"."""
    units: Annotated[tuple[Text, ...], Len(1)]
    """Canonical ids of the selected units, best first: kinds, or components if `granularity` is "component"."""
    components: tuple[Text, ...]
    """Canonical ids of all components in these units, in the order of the blocks."""
    modules: tuple[Text, ...]
    """Paths of their linear layers and norms, in the model that was measured."""
    parameters: Annotated[Mapping[str, Count], BY_MODE] = field(hash=False)
    """Number of parameters that train in each mode, without the head: {"lora": ..., "full": ...}."""
    model_parameters: PositiveCount
    """Number of parameters of the whole model that was measured. A budget is a share of it."""


def lora_parameters(
    modules: Sequence[str],
    features: Sequence[tuple[int, int]],
    *,
    r: int = 8,
    rank_pattern: Mapping[str, int] | None = None,
    use_dora: bool = False,
    lora_bias: bool = False,
) -> int:
    """Returns how many parameters LoRA trains in linear layers: r (in + out) per layer.

    DoRA adds one magnitude per output, and `lora_bias` one bias per output. `rank_pattern` overrides `r` if a key
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


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """Which units to select from the scores of a model: how many, of which kinds, and how they train.

    Every field is validated when the rule is created.

    Raises:
        ConfigError: a field is out of its range, or both `top_k` and `budget` are given.
    """

    top_k: int | None = None
    """Number of units. Without `top_k` and `budget` it is 1."""
    budget: float | None = None
    """Largest share of the model's parameters that the units may have together."""
    granularity: str = "kind"
    """"kind" or "component"."""
    candidates: tuple[str, ...] = KINDS
    """Kinds that may be selected."""
    training: str = "lora"
    """"lora" or "full"."""
    r: int = 8
    rank_pattern: Mapping[str, int] | None = None
    use_dora: bool = False
    lora_bias: bool = False

    def __post_init__(self) -> None:
        for name, value in check_arguments(vars(self)).items():
            object.__setattr__(self, name, value)

    def unit_of(self, component: Component) -> str:
        """Returns the unit that a component belongs to: its kind or its canonical id."""
        return component.kind if self.granularity == "kind" else component.id

    def parameters_of(self, component: Component) -> dict[str, int]:
        """Returns how many parameters of a component train, by mode.

        A layer norm, which LoRA cannot adapt, trains in full in both modes.
        """
        if not component.features:
            return dict.fromkeys(TRAINING_MODES, component.parameters)
        lora = lora_parameters(
            component.modules,
            component.features,
            r=self.r,
            rank_pattern=self.rank_pattern,
            use_dora=self.use_dora,
            lora_bias=self.lora_bias,
        )
        return {"lora": lora, "full": component.parameters}

    def choice(self, components: Iterable[Component], model_parameters: int) -> Choice:
        """Returns the choice that this rule makes among the components of a model.

        Raises:
            ConfigError: there are fewer than `top_k` units.
        """
        sizes: dict[str, int] = {}
        for component in components:
            if component.kind in self.candidates:
                unit = self.unit_of(component)
                sizes[unit] = sizes.get(unit, 0) + self.parameters_of(component)[self.training]
        units = tuple(sizes)
        if self.budget is not None:
            return Budget(units, self.budget, sizes, model_parameters)
        top_k = 1 if self.top_k is None else self.top_k
        listing = ", ".join(units if len(units) <= 6 else [*units[:3], "...", units[-1]])
        check_count("top_k", top_k, 1, len(units), f", the number of units to choose from ({listing})")
        return TopK(units, top_k)


class Choice(ABC):
    """Selects units from a ranking."""

    units: tuple[str, ...]
    """All units, in the order of the blocks."""

    @abstractmethod
    def chosen(self, ranking: Sequence[str]) -> tuple[str, ...]:
        """Returns the units that are selected from a ranking, best first; none if the best one is not possible."""

    def orders(self, ranking: Sequence[str]) -> list[tuple[str, str]]:
        """Returns the pairs (better, worse) of units whose order decides what is selected."""
        chosen = self.chosen(ranking)
        return [(better, worse) for better in chosen for worse in ranking[len(chosen) :]]

    @property
    @abstractmethod
    def possible_errors(self) -> int:
        """The largest number of pairs of units that could be in the wrong order in a wrong selection."""

    def check_possible(self, ranking: Sequence[str]) -> None:  # noqa: B027 - most choices are always possible
        """Raises ConfigError if nothing can be selected from a ranking."""


@dataclass(frozen=True)
class TopK(Choice):
    """The first `top_k` units of a ranking."""

    units: tuple[str, ...]
    top_k: int

    def chosen(self, ranking: Sequence[str]) -> tuple[str, ...]:
        """Returns the first `top_k` units."""
        return tuple(ranking[: self.top_k])

    @property
    def possible_errors(self) -> int:
        """A wrong selection has a unit that is not among the best `top_k` before one that is."""
        return max(1, self.top_k * (len(self.units) - self.top_k))


@dataclass(frozen=True)
class Budget(Choice):
    """The first units of a ranking that fit into a budget of parameters.

    The selection ends at the first unit that does not fit; smaller units further down are not tried. So a larger
    budget never drops a unit.
    """

    units: tuple[str, ...]
    budget: float
    """Share of the model's parameters."""
    sizes: Mapping[str, int]
    """Number of parameters that train, by unit."""
    model_parameters: int

    @property
    def limit(self) -> float:
        """The budget as a number of parameters."""
        return self.budget * self.model_parameters

    def chosen(self, ranking: Sequence[str]) -> tuple[str, ...]:
        """Returns the units that fit, best first."""
        totals = accumulate(self.sizes[unit] for unit in ranking)
        return tuple(unit for unit, total in zip(ranking, totals, strict=True) if total <= self.limit)

    def orders(self, ranking: Sequence[str]) -> list[tuple[str, str]]:
        """Returns the pairs (better, worse) of units whose order decides what is selected."""
        chosen = self.chosen(ranking)
        rest = ranking[len(chosen) :]
        if not rest:
            return []
        # A unit that fits must not belong in the position of the first one that does not.
        left = self.limit - sum(self.sizes[unit] for unit in chosen)
        return super().orders(ranking) + [(rest[0], worse) for worse in rest[1:] if self.sizes[worse] <= left]

    @property
    def possible_errors(self) -> int:
        """Any two units could be in the wrong order."""
        return max(1, len(self.units) * (len(self.units) - 1) // 2)

    def check_possible(self, ranking: Sequence[str]) -> None:
        """Raises ConfigError if not even the best unit fits."""
        if not self.chosen(ranking):
            best, size = ranking[0], self.sizes[ranking[0]]
            raise ConfigError(
                f"budget={self.budget!r} is {self.limit:,.0f} of {self.model_parameters:,} parameters, less than the "
                f"{size:,} of the best unit, {best}. Give a budget above {size / self.model_parameters:.4f}, a "
                'smaller r, or granularity="component".'
            )
