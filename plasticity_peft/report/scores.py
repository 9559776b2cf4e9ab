"""A score, of one component or of one kind: mean and spread over what a criterion observed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, ClassVar

from annotated_types import Len

from plasticity_peft.arguments import check_candidates
from plasticity_peft.checks import GRANULARITIES, OBSERVED, PROTOCOLS, canonical_granularity, shown
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.constraints import STRICT, Confidence, Count, NonNegative, PositiveCount, Seed, Text, one_of
from plasticity_peft.errors import ReportError
from plasticity_peft.report.provenance import Provenance
from plasticity_peft.report.selection import RankedUnit


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score, which has no unit, and how well what was observed determines it.

    It is the mean over pairs of images, for a criterion that looks at pairs; `PlasticityReport.observed` tells.
    """

    mean: NonNegative
    std: NonNegative
    """Sample standard deviation over pairs."""
    pairs: Count
    """How many pairs; 0 for a criterion that reads only weights, whose scores are exact."""

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`: std / sqrt(pairs)."""
        return float(self.std / self.pairs**0.5) if self.pairs else 0.0


@dataclass(frozen=True, kw_only=True)
class Score(Estimate, Component):
    """The plasticity of one component."""


@dataclass(frozen=True, kw_only=True)
class KindScore(Estimate):
    """The plasticity of a kind: the mean over its blocks. `std` is over pairs of the per-pair mean over blocks.

    Blocks share their pairs, so that the standard error is not that of independent blocks.
    """

    kind: Annotated[str, one_of(KINDS)]


@dataclass(frozen=True)
class Ending:
    """How a measurement ended that was to end as soon as a choice was settled."""

    settled: bool
    """False where the chosen units do not differ from the rest, for all that was observed."""
    units: Annotated[tuple[Text, ...], Len(1)]
    """What was chosen, best first."""
    granularity: Annotated[str, one_of(GRANULARITIES)]
    confidence: Confidence
    """Chance, at least, that no wrong choice is ever called settled."""
    most: Count
    """How many observations there would have been at most."""


@dataclass(frozen=True)
class Measurement:
    """Scores of all components of a model, with what is needed to read and compare them."""

    scores: tuple[Score, ...]
    """One row per block and kind, block by block, in the order LN1, MHA, LN2, FC1, FC2."""
    kinds: tuple[KindScore, ...]
    """One row per kind, in the same order."""
    model_type: Text
    """`config.model_type` of the measured model."""
    model_parameters: PositiveCount
    """Parameters of the measured model, head included."""
    inputs: Annotated[str, one_of(PROTOCOLS)] | None
    """Protocol: "embedding" (the paper's) or "activation"; None for a criterion without protocols."""
    pairs: Count
    """What was averaged: the number of pairs of images, or of what `observed` says; 0 where that is weights."""
    skipped: Count
    """Pairs left out because two inputs of a component were identical."""
    seed: Seed
    source: bool
    """True where each pair is one source and one target image, False where it is two target images."""
    versions: dict[Text, Text]
    """Releases of the packages that measured."""
    criterion: Text = "rate_of_change"
    """Name of the rule that scored; higher means train. "rate_of_change" is the paper's."""
    title: Text = "rate of change"
    """What the scores are, in words."""
    observed: Annotated[str, one_of(OBSERVED)] = "pairs"
    """What was observed: "pairs", "images", "batches" of images, or "weights", which have no standard error."""
    input_std: NonNegative | None = None
    """Spread of the features of a token at the input of block 0, mean over the tokens of one image; None for a
    criterion without protocols."""
    ending: Ending | None = None
    """How measuring ended; None where all was looked at that there was to look at, whatever was settled."""
    target_data: Provenance | None = None
    """Where the target images came from; None where there were none, or where that was not noted."""
    source_data: Provenance | None = None
    """The same of the source images."""

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT

    def ranking(self, granularity: str = "kind", candidates: Iterable[str] | None = None) -> list[RankedUnit]:
        """Returns (unit, score, standard_error) of every unit, best first.

        Args:
            granularity: "kind" ranks the kinds over all blocks, as the paper does; "component" ranks the components.
            candidates: kinds to rank; all five when None.

        Equal scores keep the order of the blocks and, within a block, LN1, MHA, LN2, FC1, FC2.

        Raises:
            ConfigError: `granularity` or a kind is unknown.
        """
        granularity = canonical_granularity(granularity)
        kinds = check_candidates(KINDS if candidates is None else candidates)
        if granularity == "kind":
            units = [RankedUnit(row.kind, row.mean, row.standard_error) for row in self.kinds if row.kind in kinds]
        else:
            units = [RankedUnit(row.id, row.mean, row.standard_error) for row in self.scores if row.kind in kinds]
        return sorted(units, key=lambda unit: -unit.score)

    def rows_of(self, kind: str) -> list[Score]:
        """Returns the scores of one kind, block by block."""
        return [row for row in self.scores if row.kind == kind]

    def check(self) -> None:
        """Raises ReportError if fields contradict each other: the order of rows, counts and sums."""
        self._check_rows()
        fewest = 0 if self.observed == "weights" else 2
        wrong = next((row for row in (*self.scores, *self.kinds) if row.pairs != self.pairs), None)
        if wrong is not None:
            raise ReportError(f"pairs must be {self.pairs} in every row of scores and kinds, got {wrong.pairs}")
        if self.pairs < fewest:
            raise ReportError(f"pairs must be at least {fewest}, got {self.pairs}")
        trainable = sum(row.parameters for row in self.scores)
        if self.model_parameters < trainable:
            raise ReportError(
                f"model_parameters must be at least {trainable}, the sum over scores, got {self.model_parameters}"
            )
        if self.ending:
            self._check_ending(self.ending)

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
        if ending.most < self.pairs:
            raise ReportError(f"ending.most must be at least {self.pairs}, the number of pairs, got {ending.most}")
        ids = KINDS if ending.granularity == "kind" else tuple(row.id for row in self.scores)
        unknown = [unit for unit in ending.units if unit not in ids]
        if unknown:
            raise ReportError(f"ending.units must be of granularity {ending.granularity!r}, got {shown(unknown[0])}")


def _consecutive(blocks: list[tuple[int | None, int]]) -> bool:
    """Returns whether blocks are numbered 0, 1, ..., or, in a model with stages, (0, 0), (0, 1), ..., (1, 0), ..."""
    stages = [(stage, len(list(rows))) for stage, rows in groupby(blocks, key=lambda block: block[0])]
    numbered = [(stage, block) for stage, count in stages for block in range(count)]
    return blocks == numbered and [stage for stage, _ in stages] in ([None], list(range(len(stages))))
