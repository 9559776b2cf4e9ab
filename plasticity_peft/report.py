"""What was measured: data only, no model and no torch.

A report is measured once and selected from many times: changing `top_k`, `budget`, `candidates` or `granularity`
touches no model. It keeps canonical ids, which survive the renaming of modules between releases of transformers.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from typing import Any, ClassVar

from plasticity_peft.believable import check_believable
from plasticity_peft.checks import (
    GRANULARITIES,
    OBSERVED,
    PROTOCOLS,
    TRAINING_MODES,
    check_candidates,
    check_choice,
    shown,
)
from plasticity_peft.components import KINDS, MATRIX_KINDS, Component
from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.files import read_json, write_text
from plasticity_peft.formatting import table
from plasticity_peft.plotting import Line, draw_lines
from plasticity_peft.scores import Estimate, KindScore, Score
from plasticity_peft.selection import RankedUnit, Selection, choice_of, parameter_counts
from plasticity_peft.settling import Ending

FORMAT = "plasticity_peft"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PlasticityReport:
    """Scores of all components of a model, with what is needed to read, compare and reuse them.

    Made by `measure_plasticity`; `print(report)` shows the table.
    """

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

    __pydantic_config__: ClassVar[dict[str, bool]] = {"strict": True, "allow_inf_nan": False}

    def ranking(self, granularity: str = "kind", candidates: Iterable[str] | None = None) -> list[RankedUnit]:
        """Returns (unit, score, standard_error) of every unit, best first.

        Args:
            granularity: "kind" ranks the kinds over all blocks, as the paper does; "block" ranks single components.
            candidates: kinds to rank; all five when None.

        Equal scores keep the order of the blocks and, within a block, LN1, MHA, LN2, FC1, FC2.

        Raises:
            ConfigError: `granularity` or a kind is unknown.
        """
        check_choice("granularity", granularity, GRANULARITIES)
        kinds = check_candidates(KINDS if candidates is None else candidates)
        if granularity == "kind":
            units = [RankedUnit(row.kind, row.mean, row.standard_error) for row in self.kinds if row.kind in kinds]
        else:
            units = [RankedUnit(row.id, row.mean, row.standard_error) for row in self.scores if row.kind in kinds]
        return sorted(units, key=lambda unit: -unit.score)

    def select(
        self,
        top_k: int | None = None,
        budget: float | None = None,
        *,
        granularity: str = "kind",
        candidates: Iterable[str] = KINDS,
        training: str = "lora",
        **lora: Any,
    ) -> Selection:
        """Returns the best units, by number or by budget; with neither, the best one.

        Args:
            top_k: how many units, from 1 to as many as there are.
            budget: a share of the model's parameters, above 0 and at most 1: the best units are taken in order while
                they fit. They count as they are trained in the mode `training`; the head always trains and is not
                counted.
            granularity: "kind" or "block", as in `ranking`.
            candidates: kinds that may be chosen; all five by default.
            training: "lora" or "full": how the budget counts. A norm, which LoRA cannot take, counts in full.
            lora: `r`, `rank_pattern`, `use_dora`, `lora_bias` as in `peft.LoraConfig`, for the number of LoRA
                parameters.

        Raises:
            ConfigError: an argument is out of its range, both `top_k` and `budget` are given, or not even the best
                unit fits into the budget.
        """
        candidates = check_candidates(candidates)
        choice = choice_of(
            self.scores,
            self.model_parameters,
            top_k,
            budget,
            granularity=granularity,
            candidates=candidates,
            training=training,
            **lora,
        )
        ranking = self.ranking(granularity, candidates)
        units = choice.chosen([row.unit for row in ranking])
        if not units:
            name = ranking[0].unit
            size = (choice.sizes or {})[name]
            raise ConfigError(
                f"budget={budget!r} is {choice.limit:,.0f} of {self.model_parameters:,} parameters, less than the "
                f"{size:,} of the best unit, {name}. Give a budget above {size / self.model_parameters:.4f}, a "
                'smaller r, or granularity="block".'
            )
        counts = parameter_counts(self.scores, **lora)
        explanation = self._why_norms_lead(row for row in ranking if row.unit in units)
        if explanation:
            warnings.warn(explanation, stacklevel=2)
        rows = [row for row in self.scores if (row.kind if granularity == "kind" else row.id) in units]
        return Selection(
            granularity=granularity,
            units=units,
            components=tuple(row.id for row in rows),
            modules=tuple(path for row in rows for path in row.modules),
            parameters={mode: sum(counts[row.id][mode] for row in rows) for mode in TRAINING_MODES},
            model_parameters=self.model_parameters,
        )

    def check_matches(self, model_type: str, components: Iterable[Component]) -> None:
        """Raises ReportError unless this report was measured on a model with the given components."""
        measured = {row.id: row.parameters for row in self.scores}
        given = {component.id: component.parameters for component in components}
        if self.model_type != model_type or measured != given:
            raise ReportError(
                f"The report was measured on another architecture: {self.model_type!r}, {len(measured)} components, "
                f"{sum(measured.values()):,} parameters in them; the model is {model_type!r}, {len(given)} "
                f"components, {sum(given.values()):,} parameters. Measure this model, or give the report that belongs "
                "to it."
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON knows."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> PlasticityReport:
        """Returns the report that `to_dict` described; keys that it doesn't know are left alone.

        Raises:
            ReportError: a value is missing, of the wrong type, not finite, or contradicts another.
        """
        from pydantic import ValidationError

        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ReportError(f'it is no plasticity report: "format" must be "{FORMAT}"')
        found = values.get("format_version")
        if type(found) is not int or found != FORMAT_VERSION:
            raise ReportError(
                f"it has format version {shown(found)}, and this release of plasticity_peft reads "
                f"version {FORMAT_VERSION}"
            )
        try:
            text = json.dumps(dict(values), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ReportError(f"it holds what JSON cannot say: {error}") from error
        try:
            report: PlasticityReport = _reader().validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it cannot be read"
            raise ReportError(f"{place}: {first['msg']} ({error.error_count()} in all)") from None
        report._check_rows()
        check_believable(report)
        return report

    def _check_rows(self) -> None:
        """Raises ReportError unless there is one row per block and kind, in order, with possible numbers."""
        if self.inputs not in (*PROTOCOLS, None):
            raise ReportError(f"inputs: expected one of {', '.join(PROTOCOLS)} or null, got {self.inputs!r}")
        ending = self.ending
        if ending and not (0 < ending.confidence < 1 and self.pairs <= ending.most and len(set(ending.units))):
            raise ReportError(f"ending: contradicts itself, or pairs, which is {self.pairs}: {ending}")
        if self.observed not in OBSERVED:
            raise ReportError(f"observed: expected one of {', '.join(OBSERVED)}, got {self.observed!r}")
        fewest = 0 if self.observed == "weights" else 2
        blocks = [(row.stage, row.block) for row in self.scores[:: len(KINDS)]]
        expected = [(stage, block, kind) for stage, block in blocks for kind in KINDS]
        if not blocks or not _consecutive(blocks):
            raise ReportError("scores: expected blocks (in stages, if the model has stages) numbered from 0, in order")
        if [(row.stage, row.block, row.kind) for row in self.scores] != expected:
            raise ReportError(f"scores: expected one row per block and kind, in the order {', '.join(KINDS)}")
        if [row.kind for row in self.kinds] != list(KINDS):
            raise ReportError(f"kinds: expected one row per kind, in the order {', '.join(KINDS)}")
        rows: list[Estimate] = [*self.scores, *self.kinds]
        for row in rows:
            if row.mean < 0 or row.std < 0 or row.pairs != self.pairs or self.pairs < fewest:
                raise ReportError(
                    f"{row}: a mean and a std are at least 0, and pairs is {self.pairs}, at least {fewest}"
                )
        for score in self.scores:
            if len(score.features) not in (0, len(score.modules)):
                raise ReportError(f"{score.id}: features must be given for all of its modules or for none")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON to `path`, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlasticityReport:
        """Reads a report that `save` wrote, or the plasticity.json of an adapter.

        Raises:
            ReportError: there is no such file, or it is no whole report; the message names the file.
        """
        try:
            return cls.from_dict(read_json(path))
        except OSError as error:
            raise ReportError(f"Cannot read the report {os.fspath(path)}: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ReportError) else f"it is no whole JSON file ({error})"
            raise ReportError(f"Cannot read the report {os.fspath(path)}: {reason}.") from error

    def plot(self, ax: Any = None) -> Any:
        """Returns matplotlib axes with the rate of change over the blocks, a line a kind, with 95 % confidence bands.

        `ax` are axes to draw on; without them a figure is made. Needs the extra `plots`.
        """
        rows_of = {kind: [row for row in self.scores if row.kind == kind] for kind in KINDS}
        return draw_lines(
            [
                Line(kind, [row.mean for row in rows], [1.96 * row.standard_error for row in rows])
                for kind, rows in rows_of.items()
            ],
            title=self._heading(),
            xlabel="block",
            ylabel=self.title,
            ax=ax,
        )

    def _heading(self) -> str:
        """Returns what was measured, in a line."""
        criterion = "Plasticity" if self.criterion == "rate_of_change" else self.title.capitalize()
        protocol = "" if self.inputs is None else f", {self.inputs} inputs"
        seen = "weights" if self.observed == "weights" else f"{self.pairs} {self.observed}"
        return f"{criterion} of {self.model_type}{protocol}, {seen}"

    def __str__(self) -> str:
        kinds_of_pairs = f" of {'a source and a target image' if self.source else 'two target images'}"
        details = kinds_of_pairs if self.observed == "pairs" and self.criterion != "token_sensitivity" else ""
        skipped = f" ({self.skipped} skipped)" if self.skipped else ""
        rows_of = {kind: [row for row in self.scores if row.kind == kind] for kind in KINDS}
        text = table(
            f"{self._heading()}{skipped}{details}, seed {self.seed}",
            ("rank", "kind", self.title, "std. error", "lowest block", "highest block", "parameters"),
            [
                (
                    str(rank),
                    kind,
                    f"{score:.4f}",
                    f"{error:.4f}",
                    _with_block(min(rows_of[kind], key=lambda row: row.mean)),
                    _with_block(max(rows_of[kind], key=lambda row: row.mean)),
                    f"{sum(row.parameters for row in rows_of[kind]):,}",
                )
                for rank, (kind, score, error) in enumerate(self.ranking(), start=1)
            ],
        )
        return "\n".join(filter(None, [text, self._how_it_ended(), self._why_norms_lead(self.ranking()[:1])]))

    def _how_it_ended(self) -> str:
        if self.ending is None:
            return ""
        units, confidence = ", ".join(self.ending.units), f"{self.ending.confidence:.0%} confidence"
        if self.ending.settled:
            return f"Settled after {self.pairs} of {self.ending.most} {self.observed}: {units} ({confidence})."
        return f"Not settled: {units} does not stand out from the rest ({confidence})."

    def _why_norms_lead(self, units: Iterable[RankedUnit]) -> str:
        """Returns an explanation where norms are among `units`, the best, because the tokens are small; else ""."""
        norms = [row.unit for row in units if row.unit.split(".")[-1] not in MATRIX_KINDS]
        if self.criterion != "rate_of_change" or self.input_std is None or self.input_std >= 1 or not norms:
            return ""
        return (
            f"{norms[0]} ranks high because a layer norm divides by the spread of its input, which is "
            f"{self.input_std:.2g} in the tokens that enter block 0: its rate of change is its gain over that, and "
            "says little about how well it trains. In four of the five experiments of examples/results norms gained "
            'less than attention. criterion="parameter_plasticity" does not depend on this scale, and '
            'candidates=("MHA", "FC1", "FC2") leaves the norms out.'
        )


def _with_block(row: Score) -> str:
    return f"{row.mean:.4f} (block {row.block_id})"


def _consecutive(blocks: list[tuple[int | None, int]]) -> bool:
    """Returns whether blocks are numbered 0, 1, ..., or, in a model with stages, (0, 0), (0, 1), ..., (1, 0), ..."""
    stages = [(stage, len(list(rows))) for stage, rows in groupby(blocks, key=lambda block: block[0])]
    numbered = [(stage, block) for stage, count in stages for block in range(count)]
    return blocks == numbered and [stage for stage, _ in stages] in ([None], list(range(len(stages))))


@cache
def _reader() -> Any:
    """Returns what checks the types of a report's values; to make it takes longer than to use it."""
    from pydantic import TypeAdapter

    return TypeAdapter(PlasticityReport)
