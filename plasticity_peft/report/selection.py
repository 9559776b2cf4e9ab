"""From a ranking to a selection: the best units, by number or by a budget of parameters, time or memory."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, floor, log10
from typing import Annotated, NamedTuple, TypeVar

from annotated_types import Len

from plasticity_peft.arguments import check_arguments, parse_budget
from plasticity_peft.checks import GRANULARITIES, TRAINING_MODES, check_count
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.constraints import Chance, Count, PositiveCount, Text, allowed, one_of
from plasticity_peft.errors import ConfigError, SelectionError
from plasticity_peft.report.cost import Cost, Costs, Trained, check_known

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
    confidence: Chance | None = None
    """How sure the selection is: lower bound of the probability that no other unit belongs in the place of a selected
    one, see `plasticity_peft.report.confidence`. None if the report does not contain it."""
    tied: tuple[Text, ...] = ()
    """Units of equal score, selected and others, whose order decided the selection: that of the blocks, best first."""
    cost: Cost | None = None
    """What a training step costs. None if the report does not contain what follows from it."""


def rounded_up(share: float, digits: int = 2) -> float:
    """Returns the smallest number of some digits that is not below `share`.

    Examples:
        >>> rounded_up(0.01336), rounded_up(0.2), rounded_up(0.00995), rounded_up(0.10884, digits=3)
        (0.014, 0.2, 0.01, 0.109)
    """
    places = digits - 1 - floor(log10(share) + 1e-12)
    return float(round(ceil(share * 10**places - 1e-9) / 10**places, places))


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
    ranks = _ranks(modules, r, rank_pattern or {})
    extra = use_dora + lora_bias
    return sum(
        rank * (inputs + outputs) + outputs * extra for rank, (inputs, outputs) in zip(ranks, features, strict=True)
    )


def _ranks(modules: Sequence[str], r: int, rank_pattern: Mapping[str, int]) -> list[int]:
    """Returns the rank of LoRA in each of the layers."""
    found = []
    for path in modules:
        ranks = (rank for key, rank in rank_pattern.items() if re.match(rf"(.*\.)?({key})$", path))
        found.append(next(ranks, r))
    return found


Part = TypeVar("Part", bound=Component)


def among(components: Iterable[Part], candidates: Sequence[str]) -> list[Part]:
    """Returns the components that are candidates.

    Raises:
        ConfigError: a candidate is a component that the model does not have.
    """
    parts = list(components)
    ids = [part.id for part in parts]
    unknown = next((name for name in candidates if name not in KINDS and name not in ids), None)
    if unknown is not None:
        raise ConfigError(f"candidates must name components of the model, {ids[0]} to {ids[-1]}. Got {unknown!r}.")
    return [part for part in parts if part.is_among(candidates)]


def _together(units: Iterable[str], trained: Mapping[str, list[Trained]]) -> list[Trained]:
    return [part for unit in units for part in trained[unit]]


def mode(r: int | None, rank_pattern: Mapping[str, int] | None, use_dora: bool, lora_bias: bool) -> str:
    """Returns how components train if that is not given: by LoRA if an option of LoRA is given, otherwise in full.

    Examples:
        >>> mode(None, None, False, False), mode(8, None, False, False)
        ('full', 'lora')
    """
    given = r is not None or rank_pattern is not None or use_dora is not False or lora_bias is not False
    return "lora" if given else "full"


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """Which units to select from the scores of a model: how many, of which kinds, and how they train.

    Every field is validated when the rule is created.

    Raises:
        ConfigError: a field is out of its range, or both `top_k` and `budget` are given.
    """

    top_k: int | None = None
    """Number of units. Without `top_k` and `budget` it is 1."""
    budget: float | str | None = None
    """Largest share of the model's parameters that the units may have together; or "0.6 time", "0.5 memory"."""
    granularity: str = "kind"
    """"kind" or "component"."""
    candidates: tuple[str, ...] = KINDS
    """Kinds that may be selected, and canonical ids of components."""
    training: str | None = None
    """"lora" or "full". By default "lora" if one of the next fields has another value than in `LoraConfig()`, else
    "full"."""
    r: int = 8
    rank_pattern: Mapping[str, int] | None = field(default=None, hash=False)
    use_dora: bool = False
    lora_bias: bool = False

    def __post_init__(self) -> None:
        for name, value in check_arguments(vars(self)).items():
            object.__setattr__(self, name, value)
        if self.training is None:
            of_lora = self.r != 8 or self.rank_pattern or self.use_dora or self.lora_bias
            object.__setattr__(self, "training", "lora" if of_lora else "full")

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

    def units(self, components: Iterable[Component]) -> tuple[str, ...]:
        """Returns the units to choose from, in the order of the blocks.

        Raises:
            ConfigError: there are fewer than `top_k` units, or the model does not have a candidate.
        """
        units = tuple(dict.fromkeys(map(self.unit_of, among(components, self.candidates))))
        if self.budget is None:
            listing = ", ".join(units if len(units) <= 6 else [*units[:3], "...", units[-1]])
            reason = f", the number of units to choose from ({listing})"
            check_count("top_k", self.top_k or 1, 1, len(units), reason)
        return units

    def check_possible(self, components: Sequence[Component], model_parameters: int) -> None:
        """Raises an error if it is known before measuring that nothing can be selected.

        Raises:
            ConfigError: there are fewer than `top_k` units.
            SelectionError: no unit fits into the budget of parameters. Budgets of time and memory need the costs.
        """
        self.units(components)
        if self.budget is not None and parse_budget("budget", self.budget)[1] == "parameters":
            self.choice(components, model_parameters, lambda: None).check_ever_possible()

    def choice(
        self,
        components: Sequence[Component],
        model_parameters: int,
        costs: Callable[[], Costs | None],
        trained: Mapping[str, list[Trained]] | None = None,
    ) -> Choice:
        """Returns the choice that this rule makes among the components of a model.

        Args:
            components: all components of the model.
            model_parameters: number of parameters of the model.
            costs: returns what training costs, if the budget is one of time or memory.
            trained: what `self.trained(components)` returns, if it is known.

        Raises:
            ConfigError: there are fewer than `top_k` units, or the costs are unknown.
        """
        units = self.units(components)
        if self.budget is None:
            return TopK(units, self.top_k or 1)
        limit, unit = parse_budget("budget", self.budget)
        parts = self.trained(components) if trained is None else trained
        if unit == "parameters":
            sizes = {name: sum(part.parameters for part in parts[name]) for name in units}
            return Budget(units, limit, sizes, model_parameters)
        known = check_known(costs(), self.budget)
        return CostBudget(units, limit, unit, lambda chosen: known.of(_together(chosen, parts)))

    def trained(self, components: Iterable[Component]) -> dict[str, list[Trained]]:
        """Returns how the components of each unit train."""
        found: dict[str, list[Trained]] = {}
        for row, part in enumerate(components):
            if part.is_among(self.candidates):
                trained = Trained(row, self.parameters_of(part)[str(self.training)], self._lora(part))
                found.setdefault(self.unit_of(part), []).append(trained)
        return found

    def cost(self, components: Iterable[Component], units: Iterable[str], costs: Costs) -> Cost:
        """Returns what training some units costs."""
        return costs.of(_together(units, self.trained(components)))

    def _lora(self, component: Component) -> tuple[tuple[int, int, int], ...]:
        """Returns (rank, inputs, outputs) of each layer that LoRA trains."""
        if self.training != "lora":
            return ()
        ranks = _ranks(component.modules, self.r, self.rank_pattern or {}) if component.features else []
        return tuple((rank, *sizes) for rank, sizes in zip(ranks, component.features, strict=True))


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

    def check_possible(self, ranking: Sequence[str]) -> None:  # noqa: B027 - most choices are always possible
        """Raises SelectionError if nothing can be selected from a ranking."""

    def check_ever_possible(self) -> None:  # noqa: B027 - most choices are always possible
        """Raises SelectionError if nothing can be selected, whatever the ranking is."""


@dataclass(frozen=True)
class TopK(Choice):
    """The first `top_k` units of a ranking."""

    units: tuple[str, ...]
    top_k: int

    def chosen(self, ranking: Sequence[str]) -> tuple[str, ...]:
        """Returns the first `top_k` units."""
        return tuple(ranking[: self.top_k])


class Limited(Choice):
    """Selects units that fit into a budget."""

    @abstractmethod
    def price(self, units: Collection[str]) -> float:
        """Returns what some units take, in the unit of the budget."""

    @abstractmethod
    def fits(self, units: Collection[str]) -> bool:
        """Returns whether some units fit into the budget together."""


@dataclass(frozen=True)
class Budget(Limited):
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
        """The budget as a number of parameters. 0.0768 of 10,000 is 768, although the product is a little less."""
        return round(self.budget * self.model_parameters, 6)

    def price(self, units: Collection[str]) -> float:
        """Returns how many parameters of some units train."""
        return sum(self.sizes[unit] for unit in units)

    def fits(self, units: Collection[str]) -> bool:
        """Returns whether some units fit into the budget together."""
        return self.price(units) <= self.limit

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

    def check_possible(self, ranking: Sequence[str]) -> None:
        """Raises SelectionError if not even the best unit fits."""
        if not self.chosen(ranking):
            best, size = ranking[0], self.sizes[ranking[0]]
            raise SelectionError(
                f"{self._in_words()}, less than the {size:,} of the best unit, {best}. Give a budget of at least "
                f'{self._least(best):g}, a smaller r, or granularity="component".'
            )

    def check_ever_possible(self) -> None:
        """Raises SelectionError if not even the smallest unit fits."""
        small, large = (pick(self.units, key=self.sizes.__getitem__) for pick in (min, max))
        if self.sizes[small] > self.limit:
            raise SelectionError(
                f"{self._in_words()}, less than the {self.sizes[small]:,} of the smallest unit, {small}. A budget of "
                f"{self._least(small):g} fits {small}, and one of {self._least(large):g} fits whichever unit is best. "
                'Or give a smaller r, or granularity="component".'
            )

    def _in_words(self) -> str:
        return f"budget={self.budget!r} is {self.limit:,.0f} of {self.model_parameters:,} parameters"

    def _least(self, unit: str) -> float:
        """Returns the smallest budget, of three digits, that a unit fits into."""
        return rounded_up(self.sizes[unit] / self.model_parameters, digits=3)


@dataclass(frozen=True)
class CostBudget(Limited):
    """The units of a ranking that fit into a budget of time or memory.

    The units are tried in order, and those that do not fit are passed over. A backward pass ends at the first block
    that trains. So units of early blocks cost more, and a small budget selects units of late blocks.
    """

    units: tuple[str, ...]
    limit: float
    """Largest ratio to the cost of finetuning everything."""
    unit: str
    """"time" or "memory"."""
    cost: Callable[[Collection[str]], Cost]
    """Returns the cost of training some units."""
    _found: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was chosen, by ranking: it takes a cost for every unit, and is asked for several times."""

    def price(self, units: Collection[str]) -> float:
        """Returns the cost of training some units, as a ratio to that of finetuning everything."""
        return float(getattr(self.cost(units), self.unit))

    def fits(self, units: Collection[str]) -> bool:
        """Returns whether some units fit into the budget together."""
        return self.price(units) <= self.limit

    def chosen(self, ranking: Sequence[str]) -> tuple[str, ...]:
        """Returns the units that fit, best first."""
        known = tuple(ranking)
        if known not in self._found:
            found: list[str] = []
            for unit in ranking:
                if self.fits([*found, unit]):
                    found.append(unit)
            self._found[known] = tuple(found)
        return self._found[known]

    def orders(self, ranking: Sequence[str]) -> list[tuple[str, str]]:
        """Returns the pairs (better, worse) of units whose order decides what is selected."""
        # A unit that was passed over would not fit behind a worse one either: the cost only grows.
        chosen = set(self.chosen(ranking))
        return [
            (better, worse)
            for place, better in enumerate(ranking)
            if better in chosen
            for worse in ranking[place + 1 :]
            if worse not in chosen
        ]

    def check_possible(self, ranking: Sequence[str]) -> None:
        """Raises SelectionError if no unit fits."""
        if not self.chosen(ranking):
            ratios = {unit: self.price([unit]) for unit in ranking}
            cheapest = min(ranking, key=ratios.__getitem__)
            advice = "" if "." in cheapest else ', or granularity="component"'
            raise SelectionError(
                f"The {self.unit} of a training step may be at most {self.limit:g} of that of finetuning everything, "
                f"and no unit fits: the cheapest, {cheapest}, takes {ratios[cheapest]:.4f}. Give a budget of at least "
                f"'{ratios[cheapest]:g} {self.unit}'{advice}."
            )

    def check_ever_possible(self) -> None:
        """Raises SelectionError if no unit fits, which does not depend on the ranking."""
        self.check_possible(self.units)
