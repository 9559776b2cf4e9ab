"""A score, of one component or of one kind: mean and spread over what a criterion observed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from plasticity_peft.checks import OBSERVED, PROTOCOLS, canonical_granularity
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.errors import ReportError
from plasticity_peft.report.provenance import Provenance
from plasticity_peft.report.selection import RankedUnit, check_candidates


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score, which has no unit, and how well what was observed determines it.

    It is the mean over pairs of images, for a criterion that looks at pairs; `PlasticityReport.observed` tells.
    """

    mean: float
    std: float
    """Sample standard deviation over pairs."""
    pairs: int
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

    kind: str


@dataclass(frozen=True)
class Ending:
    """How a measurement ended that was to end as soon as a choice was settled."""

    settled: bool
    """False where the chosen units do not differ from the rest, for all that was observed."""
    units: tuple[str, ...]
    """What was chosen, best first."""
    granularity: str
    confidence: float
    """Chance, at least, that no wrong choice is ever called settled."""
    most: int
    """How many observations there would have been at most."""


@dataclass(frozen=True)
class Measurement:
    """Scores of all components of a model, with what is needed to read and compare them."""

    scores: tuple[Score, ...]
    """One row per block and kind, block by block, in the order LN1, MHA, LN2, FC1, FC2."""
    kinds: tuple[KindScore, ...]
    """One row per kind, in the same order."""
    model_type: str
    """`config.model_type` of the measured model."""
    model_parameters: int
    """Parameters of the measured model, head included."""
    inputs: str | None
    """Protocol: "embedding" (the paper's) or "activation"; None for a criterion without protocols."""
    pairs: int
    """What was averaged: the number of pairs of images, or of what `observed` says; 0 where that is weights."""
    skipped: int
    """Pairs left out because two inputs of a component were identical."""
    seed: int
    source: bool
    """True where each pair is one source and one target image, False where it is two target images."""
    versions: dict[str, str]
    """Releases of the packages that measured."""
    criterion: str = "rate_of_change"
    """Name of the rule that scored; higher means train. "rate_of_change" is the paper's."""
    title: str = "rate of change"
    """What the scores are, in words."""
    observed: str = "pairs"
    """What was observed: "pairs", "images", "batches" of images, or "weights", which have no standard error."""
    input_std: float | None = None
    """Spread of the features of a token at the input of block 0, mean over the tokens of one image; None for a
    criterion without protocols."""
    ending: Ending | None = None
    """How measuring ended; None where all was looked at that there was to look at, whatever was settled."""
    target_data: Provenance | None = None
    """Where the target images came from; None where there were none, or where that was not noted."""
    source_data: Provenance | None = None
    """The same of the source images."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"strict": True, "allow_inf_nan": False}

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
        """Raises ReportError unless there is one row per block and kind, in order, with possible numbers."""
        if self.inputs not in (*PROTOCOLS, None):
            raise ReportError(f"inputs: expected one of {', '.join(PROTOCOLS)} or null, got {self.inputs!r}")
        ending = self.ending
        if ending and not (0 < ending.confidence < 1 and self.pairs <= ending.most and len(set(ending.units))):
            raise ReportError(f"ending: contradicts itself, or pairs, which is {self.pairs}: {ending}")
        if self.observed not in OBSERVED:
            raise ReportError(f"observed: expected one of {', '.join(OBSERVED)}, got {self.observed!r}")
        for place in ("target_data", "source_data"):
            provenance = getattr(self, place)
            if provenance is not None:
                provenance.check(place)
        blocks = [(row.stage, row.block) for row in self.scores[:: len(KINDS)]]
        expected = [(stage, block, kind) for stage, block in blocks for kind in KINDS]
        if not blocks or not _consecutive(blocks):
            raise ReportError("scores: expected blocks (in stages, if the model has stages) numbered from 0, in order")
        if [(row.stage, row.block, row.kind) for row in self.scores] != expected:
            raise ReportError(f"scores: expected one row per block and kind, in the order {', '.join(KINDS)}")
        if [row.kind for row in self.kinds] != list(KINDS):
            raise ReportError(f"kinds: expected one row per kind, in the order {', '.join(KINDS)}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        fewest = 0 if self.observed == "weights" else 2
        rows: list[Estimate] = [*self.scores, *self.kinds]
        for row in rows:
            if row.mean < 0 or row.std < 0 or row.pairs != self.pairs or self.pairs < fewest:
                raise ReportError(
                    f"{row}: a mean and a std are at least 0, and pairs is {self.pairs}, at least {fewest}"
                )
        for score in self.scores:
            if len(score.features) not in (0, len(score.modules)):
                raise ReportError(f"{score.id}: features must be given for all of its modules or for none")


def _consecutive(blocks: list[tuple[int | None, int]]) -> bool:
    """Returns whether blocks are numbered 0, 1, ..., or, in a model with stages, (0, 0), (0, 1), ..., (1, 0), ..."""
    stages = [(stage, len(list(rows))) for stage, rows in groupby(blocks, key=lambda block: block[0])]
    numbered = [(stage, block) for stage, count in stages for block in range(count)]
    return blocks == numbered and [stage for stage, _ in stages] in ([None], list(range(len(stages))))
