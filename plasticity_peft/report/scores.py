"""The scores in a report: of components and of kinds, each a mean over samples with its standard error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated, ClassVar

from annotated_types import Len

from plasticity_peft.arguments import check_candidates
from plasticity_peft.checks import GRANULARITIES, OBSERVED, PROTOCOLS, canonical_granularity, shown
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.constraints import STRICT, Confidence, Count, NonNegative, PositiveCount, Seed, Text, one_of
from plasticity_peft.deprecation import renamed_attribute
from plasticity_peft.errors import ReportError
from plasticity_peft.report.confidence import Separation
from plasticity_peft.report.cost import Costs
from plasticity_peft.report.forecast import Forecast
from plasticity_peft.report.provenance import Provenance
from plasticity_peft.report.selection import RankedUnit, among


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score and its uncertainty. It is the mean over samples, see `PlasticityReport.samples`, and has no unit."""

    mean: NonNegative
    std: NonNegative
    """Sample standard deviation over samples."""
    samples: Count
    """Number of samples; 0 for a criterion that reads only weights, whose scores are exact."""

    error: NonNegative | None = None
    """Standard error of `mean`; None in reports of older releases. It takes into account that pairs share images, and
    is increased for few images, so that two standard errors on both sides contain the true mean with a probability of
    about 95 %."""

    pairs = renamed_attribute("Score", "pairs", "samples")

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`: `error`, or std / sqrt(samples) in reports of older releases."""
        if self.error is not None:
            return self.error
        return float(self.std / self.samples**0.5) if self.samples else 0.0


@dataclass(frozen=True, kw_only=True)
class Score(Estimate, Component):
    """The score of one component."""


@dataclass(frozen=True, kw_only=True)
class KindScore(Estimate):
    """The score of a kind: the mean over its blocks. `std` is over samples of the mean over blocks of one sample.

    All blocks see the same samples, so the standard error is not that of independent blocks.
    """

    kind: Annotated[str, one_of(KINDS)]


@dataclass(frozen=True)
class Ending:
    """The outcome of a measurement that stops once the selection is settled."""

    settled: bool
    """True if the selected units are statistically separated from the others."""
    units: Annotated[tuple[Text, ...], Len(1)]
    """The selected units, best first."""
    granularity: Annotated[str, one_of(GRANULARITIES)]
    confidence: Confidence
    """Lower bound of the probability that no wrong selection is called settled."""
    planned: Count
    """Number of samples without early stopping."""

    most = renamed_attribute("Ending", "most", "planned")


@dataclass(frozen=True)
class BaseReport:
    """The fields of a `PlasticityReport`, whose docstring describes them, and its ranking.

    The modules for text and pictures use this class, so that the report can import them.
    """

    scores: tuple[Score, ...]
    kinds: tuple[KindScore, ...]
    model_type: Text
    model_parameters: PositiveCount
    inputs: Annotated[str, one_of(PROTOCOLS)] | None
    samples: Count
    skipped: Count
    seed: Seed
    uses_source: bool
    versions: dict[Text, Text] = field(hash=False)
    criterion: Text = "rate_of_change"
    title: Text = "rate of change"
    observed: Annotated[str, one_of(OBSERVED)] = "pairs"
    input_std: NonNegative | None = None
    ending: Ending | None = None
    target_provenance: Provenance | None = None
    source_provenance: Provenance | None = None
    batch_size: PositiveCount | None = None
    separation: Separation | None = None
    costs: Costs | None = None
    forecast: Forecast | None = None

    pairs = renamed_attribute("PlasticityReport", "pairs", "samples")
    source = renamed_attribute("PlasticityReport", "source", "uses_source")
    target_data = renamed_attribute("PlasticityReport", "target_data", "target_provenance")
    source_data = renamed_attribute("PlasticityReport", "source_data", "source_provenance")

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT

    def ranking(self, granularity: str = "kind", candidates: Iterable[str] | None = None) -> list[RankedUnit]:
        """Returns (unit, score, standard_error) of every unit, best first.

        Equal scores keep the order of the blocks and, within a block, LN1, MHA, LN2, FC1, FC2.

        Args:
            granularity: "kind" ranks the kinds over all blocks, as the paper does; "component" ranks the components.
            candidates: kinds to rank, or, if components are ranked, also the canonical ids of some; None for all.

        Returns:
            Named tuples, one per unit: a kind ("MHA") or the canonical id of a component ("3.MHA").

        Raises:
            ConfigError: `granularity`, a kind or a component is unknown.
        """
        granularity = canonical_granularity(granularity, stacklevel=3)
        names = check_candidates(KINDS if candidates is None else candidates, granularity)
        if granularity == "kind":
            units = [RankedUnit(row.kind, row.mean, row.standard_error) for row in self.kinds if row.kind in names]
        else:
            units = [RankedUnit(row.id, row.mean, row.standard_error) for row in among(self.scores, names)]
        return sorted(units, key=lambda unit: -unit.score)

    def rows_of(self, kind: str) -> list[Score]:
        """Returns the scores of one kind, block by block."""
        return [row for row in self.scores if row.kind == kind]

    def check(self) -> None:
        """Raises ReportError if fields contradict each other: the order of rows, counts and sums."""
        self._check_rows()
        fewest = 0 if self.observed == "weights" else 2
        rows: list[Estimate] = [*self.scores, *self.kinds]
        wrong = next((row for row in rows if row.samples != self.samples), None)
        if wrong is not None:
            raise ReportError(f"samples must be {self.samples} in every row of scores and kinds, got {wrong.samples}")
        if self.samples < fewest:
            raise ReportError(f"samples must be at least {fewest}, got {self.samples}")
        trainable = sum(row.parameters for row in self.scores)
        if self.model_parameters < trainable:
            raise ReportError(
                f"model_parameters must be at least {trainable}, the sum over scores, got {self.model_parameters}"
            )
        if self.ending:
            self._check_ending(self.ending)
        if self.separation:
            self._check_separation(self.separation)
        if self.costs:
            self._check_costs(self.costs)
        if self.forecast:
            self._check_forecast(self.forecast)

    def _check_rows(self) -> None:
        blocks = [(row.stage, row.block) for row in self.scores[:: len(KINDS)]]
        expected = [(stage, block, kind) for stage, block in blocks for kind in KINDS]
        if not blocks or not _consecutive(blocks):
            raise ReportError(
                "scores must contain blocks (in stages, if the model has stages) numbered from 0, in order"
            )
        if [(row.stage, row.block, row.kind) for row in self.scores] != expected:
            raise ReportError(f"scores must contain one row per block and kind, in the order {', '.join(KINDS)}")
        if [row.kind for row in self.kinds] != list(KINDS):
            raise ReportError(f"kinds must contain one row per kind, in the order {', '.join(KINDS)}")
        for number, row in enumerate(self.scores):
            if len(row.features) not in (0, len(row.modules)):
                raise ReportError(
                    f"scores.{number}.features must be empty or have one entry per module, got {shown(row.features)}"
                )

    def _check_ending(self, ending: Ending) -> None:
        if ending.planned < self.samples:
            raise ReportError(f"ending.planned must be at least {self.samples}, the samples, got {ending.planned}")
        ids = KINDS if ending.granularity == "kind" else tuple(row.id for row in self.scores)
        unknown = [unit for unit in ending.units if unit not in ids]
        if unknown:
            raise ReportError(f"ending.units must be of granularity {ending.granularity!r}, got {shown(unknown[0])}")

    def _check_separation(self, separation: Separation) -> None:
        for name, units in (("kinds", len(KINDS)), ("components", len(self.scores))):
            found, pairs = getattr(separation, name), units * (units - 1) // 2
            if found is not None and len(found) != pairs:
                raise ReportError(
                    f"separation.{name} must have {pairs} entries, one per pair of {name}, got {len(found)}"
                )

    def _check_forecast(self, forecast: Forecast) -> None:
        ids = {row.id for row in self.scores}
        unknown = [name for one in forecast.sets for name in one.components if name not in ids]
        if unknown:
            raise ReportError(f"forecast.sets must consist of components of the report, got {shown(unknown[0])}")

    def _check_costs(self, costs: Costs) -> None:
        blocks = len(self.scores) // len(KINDS)
        if len(costs.blocks) != blocks or len(costs.components) != len(self.scores):
            raise ReportError(
                f"costs must have {blocks} blocks and {len(self.scores)} components, got {len(costs.blocks)} and "
                f"{len(costs.components)}"
            )
        for number, row in enumerate(costs.components):
            if row.block != number // len(KINDS):
                raise ReportError(f"costs.components.{number}.block must be {number // len(KINDS)}, got {row.block}")


def _consecutive(blocks: list[tuple[int | None, int]]) -> bool:
    """Returns whether blocks are numbered 0, 1, ..., or, in a model with stages, (0, 0), (0, 1), ..., (1, 0), ..."""
    stages = [(stage, len(list(rows))) for stage, rows in groupby(blocks, key=lambda block: block[0])]
    numbered = [(stage, block) for stage, count in stages for block in range(count)]
    return blocks == numbered and [stage for stage, _ in stages] in ([None], list(range(len(stages))))
