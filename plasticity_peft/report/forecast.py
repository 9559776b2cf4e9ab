"""What finetuning sets of components is expected to give; see `plasticity_peft.forecast_finetuning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Len

from plasticity_peft.constraints import STRICT, Chance, NonNegative, PositiveCount, Seed, Text, read_as
from plasticity_peft.errors import ReportError
from plasticity_peft.report.cost import Cost
from plasticity_peft.report.head import HeadFit
from plasticity_peft.report.tables import table

COVERAGE = 0.8
"""Probability that an interval contains the value that it is for."""
HALF_WIDTH = 1.2816
"""Half of the width of such an interval, in standard errors of a normal distribution."""


@dataclass(frozen=True, kw_only=True)
class SetForecast:
    """What finetuning one set of components is expected to give."""

    name: Text
    """The units of the set, such as "MHA + FC1", or "everything"."""
    components: Annotated[tuple[Text, ...], Len(1)]
    """Canonical ids of its components, in the order of the blocks."""
    parameters: PositiveCount
    """Number of their weights and biases."""
    accuracy: Chance
    """Expected accuracy on new images after the set was finetuned in full, from 0 to 1."""
    error: NonNegative
    """Standard error of `accuracy`."""
    gain: float
    """Expected accuracy, less that of the fitted head."""
    gain_error: NonNegative
    """Standard error of `gain`. It is smaller than `error`, because both accuracies are of the same images."""
    depth: Chance | None = None
    """Share of the blocks from the first one on in which the set trains: 1 if it trains in the first block. None in
    forecasts of older releases."""
    raised: NonNegative = 0.0
    """By how much `gain` is above what gradients show; see `Forecast.raised`. 0 in forecasts of older releases."""
    squared_error: NonNegative | None = None
    """Leave-one-out squared error of targets of -1 and 1: sum over classes, mean over images. None in forecasts of
    older releases."""
    excess_error: NonNegative | None = None
    """Standard error of the difference between `squared_error` and the smallest one of all sets."""
    cost: Cost | None = None
    """What a training step costs. None if it could not be counted."""
    rates: dict[Text, NonNegative] | None = None
    """Recommended learning rates, times `Forecast.rate_factor`: of the "head", of each "matrix", and of each "vector".
    None if the components cannot train in full as they are."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `PlasticityConfig`, and of `PlasticityReport.select`, that choose exactly these components."""
        return {"granularity": "component", "candidates": self.components, "top_k": len(self.components)}

    @property
    def price(self) -> float:
        """What orders sets from cheap to expensive: the time of a step, or the parameters if it is unknown."""
        return float(self.parameters) if self.cost is None else self.cost.time


@dataclass(frozen=True, kw_only=True)
class PilotRun:
    """What a short run of everything gained, on images that it was not trained on."""

    steps: PositiveCount
    """Number of training steps."""
    gain: float
    """Leave-one-out accuracy of a head that is fitted after the run, less that of one that is fitted before."""
    gain_error: NonNegative
    """Standard error of `gain`."""
    rate_factor: NonNegative = 1.0
    """What the recommended learning rates were multiplied by, but for that of the head."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What `forecast_finetuning` expects of several sets of components.

    Examples:
        >>> head = HeadFit("single_label_classification", score=0.684, loss=0.91, penalty=31.6, temperature=4.1,
        ...                images=640, features=96, outputs=10)
        >>> norms = SetForecast(name="LN1 + LN2", components=("0.LN1", "0.LN2"), parameters=384, accuracy=0.69,
        ...                     error=0.021, gain=0.006, gain_error=0.013)
        >>> forecast = Forecast(model_type="vit", seed=0, head=head, head_error=0.018, sets=(norms,))
        >>> print(forecast)
        Forecast of vit, 640 images, seed 0
        | trained     | accuracy | 80 % interval | gain | 80 % interval | parameters |
        |-------------|----------|---------------|------|---------------|------------|
        | head fitted |     68.4 |  66.1 to 70.7 |      |               |            |
        | LN1 + LN2   |     69.0 |  66.3 to 71.7 | +0.6 |  -1.1 to +2.3 |        384 |
        Finetuning is not expected to pay: no set is above the fitted head by more than its standard error.
        For images unlike those of pretraining, a forecast without a short run can be far too low.
        >>> Forecast.from_dict(forecast.to_dict()) == forecast
        True
    """

    model_type: Text
    """`config.model_type` of the backbone."""
    seed: Seed
    """Seed of the drawing of images and of the directions."""
    head: HeadFit
    """The head that is fitted in closed form, with which finetuning is compared. The model does not get it."""
    head_error: NonNegative
    """Standard error of its leave-one-out accuracy."""
    head_squared_error: NonNegative | None = None
    """Its leave-one-out squared error, as `SetForecast.squared_error`."""
    sets: Annotated[tuple[SetForecast, ...], Len(1)]
    """In the order in which they were given."""
    pilot: PilotRun | None = None
    """A short run of everything. None if there was none, or if it diverged."""
    raised: NonNegative = 0.0
    """By how much the gain of everything is above what gradients show, because the run gained more than they show. A
    set is raised by the share of this that is the share of the depth from its first block on."""

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT

    @property
    def rate_factor(self) -> float:
        """What to multiply the recommended learning rates by, as the argument of `create_plasticity_optimizer`.

        It is below 1 if a short run at smaller rates gained far more than one at the recommended ones.
        """
        return 1.0 if self.pilot is None else self.pilot.rate_factor

    @property
    def best(self) -> SetForecast:
        """The set of the highest expected accuracy; the cheapest of equals."""
        return _best(self.sets)

    @property
    def pays(self) -> bool:
        """Whether finetuning is expected to pay: the best set gains more than its standard error."""
        return self.best.gain > self.best.gain_error

    @property
    def recommended(self) -> SetForecast | None:
        """The cheapest set that is within one standard error of the best; None if finetuning does not pay.

        The cheapest has the shortest training step, or the fewest parameters if costs are unknown. Only sets that
        train in the first block are considered, unless none of them pays: in our experiments, sets of late blocks
        gained less than their forecast.
        """
        if not self.pays:
            return None
        best = _best(self._early)
        near = [one for one in self._early if one.gain >= best.gain - best.gain_error]
        return min(near, key=lambda one: (one.price, -one.gain))

    @property
    def _early(self) -> tuple[SetForecast, ...]:
        """The sets that train in the first block, if one of them gains more than its standard error; else all sets."""
        early = tuple(one for one in self.sets if one.depth in (None, 1.0))
        return early if any(one.gain > one.gain_error for one in early) else self.sets

    @property
    def safest(self) -> SetForecast | None:
        """The cheapest set whose squared error is within one standard error of the smallest one.

        Squared errors tell sets apart that have the same accuracy within its error. So this set usually saves less
        than `recommended`, and loses less. The same sets are considered. If a short run showed that features move far,
        which squared errors do not show, only those that are raised most are. None if finetuning does not pay, or if a
        squared error is unknown.
        """
        errors = {one.name: one.squared_error for one in self.sets if one.squared_error is not None}
        if not self.pays or len(errors) < len(self.sets):
            return None
        most = max(one.raised for one in self._early)
        considered = [one for one in self._early if one.raised == most]
        smallest = min(errors[one.name] for one in considered)
        near = [one for one in considered if errors[one.name] - smallest <= (one.excess_error or 0.0)]
        return min(near, key=lambda one: (one.price, errors[one.name]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the forecast as values that JSON can represent."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Forecast:
        """Returns the forecast that `to_dict` converted.

        Raises:
            ReportError: a value is missing or is not allowed.
        """
        found: Forecast = read_as(cls, values, ReportError)
        return found

    def __str__(self) -> str:
        title = f"Forecast of {self.model_type}, {self.head.images} images, seed {self.seed}"
        return "\n".join([table(title, self.columns(), self.rows()), self.advice()])

    def advice(self) -> str:
        """Returns what is recommended, and what a short run added, in sentences."""
        chosen, best = self.recommended, _best(self._early)
        if chosen is None:
            why = "no set is above the fitted head by more than its standard error"
            said = f"Finetuning is not expected to pay: {why}."
        else:
            of = "the best" if best is self.best else "the best of those that train in the first block"
            why = of if chosen is best else f"the cheapest within one standard error of {of}, {best.name}"
            said = f"Recommended: {chosen.name}, {why}."
            if self.safest not in (None, chosen):
                said += f"\nTo lose less: {self.safest.name}, the cheapest whose squared error is near the smallest."
        return "\n".join(filter(None, [said, self._about_pilot(), self._about_rates()]))

    def _about_rates(self) -> str:
        """Returns that the rates are not the recommended ones; "" if they are."""
        if self.rate_factor == 1 or not self._rates_known:
            return ""
        return (
            f"The rates are {self.rate_factor:g} times the recommended ones, because a short run gained far more at "
            f"them: give rate_factor={self.rate_factor:g} to create_plasticity_optimizer."
        )

    def _about_pilot(self) -> str:
        """Returns what a short run adds to the forecast; "" if that is nothing."""
        if self.pilot is None:
            return "For images unlike those of pretraining, a forecast without a short run can be far too low."
        if not self.raised:
            return ""
        return (
            f"A run of everything for {self.pilot.steps} steps gained {100 * self.pilot.gain:.1f} points on other "
            f"images, more than gradients show. Gains are raised by {100 * self.raised:.1f}, and by less for sets "
            "without the first blocks."
        )

    def columns(self) -> tuple[str, ...]:
        """Returns the names of the columns of its table. Costs and rates are left out if they are unknown."""
        interval = f"{COVERAGE:.0%} interval".replace("%", " %")
        squared = ("squared error",) if self.head_squared_error is not None else ()
        costs = ("time", "memory") if self._costs_known else ()
        rates = ("rate of matrices", "of vectors") if self._rates_known else ()
        return ("trained", "accuracy", interval, "gain", interval, *squared, "parameters", *costs, *rates)

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the rows of its table: the fitted head, then the sets, in percent."""
        accuracy = f"{100 * self.head.score:.1f}", _interval(self.head.score, self.head_error)
        squared = self._squared(self.head_squared_error)
        head = ("head fitted", *accuracy, "", "", *squared, *[""] * (len(self.columns()) - 5 - len(squared)))
        return [head, *map(self._row, self.sets)]

    def _squared(self, error: float | None) -> tuple[str, ...]:
        """Returns the cell of a squared error; none if the table does not have them."""
        return () if self.head_squared_error is None else ("" if error is None else f"{error:.3f}",)

    def _row(self, one: SetForecast) -> tuple[str, ...]:
        accuracy = f"{100 * one.accuracy:.1f}", _interval(one.accuracy, one.error)
        gain = f"{100 * one.gain:+.1f}", _interval(one.gain, one.gain_error, "+")
        cost = (f"{one.cost.time:.2f}", f"{one.cost.memory:.2f}") if self._costs_known and one.cost else ()
        rates = (
            [f"{one.rates[name]:.1e}" if name in one.rates else "" for name in ("matrix", "vector")]
            if (self._rates_known and one.rates)
            else []
        )
        return (one.name, *accuracy, *gain, *self._squared(one.squared_error), f"{one.parameters:,}", *cost, *rates)

    @property
    def _costs_known(self) -> bool:
        return all(one.cost is not None for one in self.sets)

    @property
    def _rates_known(self) -> bool:
        return all(one.rates is not None for one in self.sets)


def _interval(value: float, error: float, sign: str = "") -> str:
    """Returns the interval of a share, in percent; that of an accuracy ends at 0 and 100."""
    ends = [100 * (value + side * HALF_WIDTH * error) for side in (-1, 1)]
    low, high = ends if sign else [min(max(end, 0.0), 100.0) for end in ends]
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def _best(sets: Sequence[SetForecast]) -> SetForecast:
    """Returns the set of the highest expected accuracy; the cheapest of equals."""
    return min(sets, key=lambda one: (-one.gain, one.price))
