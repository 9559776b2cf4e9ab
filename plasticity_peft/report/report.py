"""What was measured, to choose from, to show and to keep. No model and no torch.

A report is measured once and selected from many times: changing `top_k`, `budget`, `candidates` or `granularity`
touches no model. It keeps canonical ids, which survive the renaming of modules between releases of transformers.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from plasticity_peft.arguments import check_candidates
from plasticity_peft.checks import TRAINING_MODES
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.constraints import read_as
from plasticity_peft.errors import ReportError
from plasticity_peft.files import read_json, write_text
from plasticity_peft.hub import REPORT_NAME, find_file, without_report
from plasticity_peft.report.format import FORMAT, FORMAT_VERSION, current, reading
from plasticity_peft.report.plotting import draw
from plasticity_peft.report.scores import Measurement
from plasticity_peft.report.selection import Selection, SelectionRule
from plasticity_peft.report.text import as_html, as_text, why_norms_lead


@dataclass(frozen=True)
class PlasticityReport(Measurement):
    """Scores of all components of a model, with what is needed to read, compare and reuse them.

    Made by `measure_plasticity`; `print(report)` shows the table, `report.plot()` the pictures. What it holds is
    described at `plasticity_peft.report.measurement.Measurement`.
    """

    def select(
        self,
        top_k: int | None = None,
        budget: float | None = None,
        *,
        granularity: str = "kind",
        candidates: Iterable[str] = KINDS,
        training: str = "lora",
        r: int = 8,
        rank_pattern: Mapping[str, int] | None = None,
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> Selection:
        """Returns the best units, by number or by budget; with neither, the best one.

        Args:
            top_k: how many units, from 1 to as many as there are.
            budget: a share of the model's parameters, above 0 and at most 1: the best units are taken in order while
                they fit. They count as they are trained in the mode `training`; the head always trains and is not
                counted.
            granularity: "kind" or "component", as in `ranking`.
            candidates: kinds that may be chosen; all five by default.
            training: "lora" or "full": how the budget counts. A norm, which LoRA cannot take, counts in full.
            r: rank of LoRA, as in `peft.LoraConfig`, for the number of LoRA parameters; so are the next three.
            rank_pattern: see `r`.
            use_dora: see `r`.
            lora_bias: see `r`.

        Raises:
            ConfigError: an argument is out of its range, both `top_k` and `budget` are given, or not even the best
                unit fits into the budget.
        """
        rule = SelectionRule(
            top_k=top_k,
            budget=budget,
            granularity=granularity,
            candidates=check_candidates(candidates),
            training=training,
            r=r,
            rank_pattern=rank_pattern,
            use_dora=use_dora,
            lora_bias=lora_bias,
        )
        return self.select_by(rule)

    def select_by(self, rule: SelectionRule) -> Selection:
        """Returns what a rule selects; see `select`."""
        choice = rule.choice(self.scores, self.model_parameters)
        ranking = self.ranking(rule.granularity, rule.candidates)
        names = [row.unit for row in ranking]
        choice.check_possible(names)
        units = choice.chosen(names)
        explanation = why_norms_lead(self, (row for row in ranking if row.unit in units))
        if explanation:
            warnings.warn(explanation, stacklevel=3)
        rows = [row for row in self.scores if rule.unit_of(row) in units]
        counts = [rule.parameters_of(row) for row in rows]
        return Selection(
            granularity=rule.granularity,
            units=units,
            components=tuple(row.id for row in rows),
            modules=tuple(path for row in rows for path in row.modules),
            parameters={mode: sum(count[mode] for count in counts) for mode in TRAINING_MODES},
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
        report: PlasticityReport = read_as(cls, current(values), ReportError)
        report.check()
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON to `path`, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlasticityReport:
        """Reads a report that `save` wrote, or the plasticity.json of an adapter.

        Raises:
            ReportError: there is no such file, or it is no whole report; the message names the file.
        """
        with reading(f"the report {os.fspath(path)}"):
            return cls.from_dict(read_json(path))

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | os.PathLike[str], **hub: Any) -> PlasticityReport:
        """Returns the report that was saved or published with an adapter.

        Args:
            folder_or_repo: the folder of an adapter, or "user/repo" on the Hub.
            hub: `revision`, `token`, `subfolder`, `cache_dir` and other options of `huggingface_hub.hf_hub_download`.

        Raises:
            ReportError: there is no plasticity.json, it cannot be fetched, or it is no whole report.
        """
        path = find_file(folder_or_repo, REPORT_NAME, ReportError, **hub)
        if path is None:
            raise ReportError(without_report(folder_or_repo))
        return cls.load(path)

    def plot(self, view: str = "overview", *, selection: Selection | None = None, ax: Any = None) -> Any:
        """Returns the matplotlib axes of a picture of the scores, with 95 % confidence intervals.

        A figure is made without pyplot: nothing of it stays behind, and in a notebook `axes.figure` as the last line
        of a cell shows it. Needs the extra `plot`.

        Args:
            view: "overview" is the two next ones side by side. "depth": the scores over the blocks, a line a kind.
                "ranking": the units, best first. "heatmap": every block and kind.
            selection: what was chosen, to be marked; its granularity is that of the ranking.
            ax: axes to draw on, two for the overview; without them a figure is made.

        Returns:
            Axes; an array of two, shape (2,), for the overview.

        Raises:
            ConfigError: there is no such view, or `ax` are not as many axes as it needs.

        Examples:
            >>> from plasticity_peft import measure_plasticity
            >>> from transformers import ViTConfig, ViTModel
            >>> report = measure_plasticity(ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=2,
            ...     num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4)), criterion="bound")
            >>> depth, ranking = report.plot(selection=report.select(top_k=2))
            >>> depth.get_xlabel()
            'block'
        """
        return draw(self, view, selection=selection, ax=ax)

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        """Returns the table for a notebook."""
        return as_html(self)
