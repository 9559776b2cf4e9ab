"""`PlasticityReport`: the scores of a model, for selecting, showing and saving. It does not need a model or torch.

A model is measured once, and its report can be used for any number of selections. A report contains canonical ids,
which stay the same if transformers renames modules.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.constraints import read_as
from plasticity_peft.errors import ReportError, SelectionError
from plasticity_peft.files import read_json, write_text
from plasticity_peft.hub import REPORT_NAME, find_file, without_report
from plasticity_peft.report.confidence import SURE, in_words
from plasticity_peft.report.forecast import Forecast
from plasticity_peft.report.format import FORMAT, VERSION, current, reading
from plasticity_peft.report.page import as_page
from plasticity_peft.report.plotting import draw
from plasticity_peft.report.scores import BaseReport
from plasticity_peft.report.selecting import selected_by
from plasticity_peft.report.selection import Selection, SelectionRule, mode
from plasticity_peft.report.text import as_html, as_text, observed, why_norms_lead

# Below the logger of transformers, which is not imported here, so that its verbosity holds here too.
logger = logging.getLogger(f"transformers.{__name__}")


@dataclass(frozen=True)
class PlasticityReport(BaseReport):
    """Scores of all components of a model, and how they were measured.

    `measure_plasticity` returns one. `print(report)` prints the ranking of the kinds, `report.plot()` draws the
    scores, and `report.select(...)` selects the best units.

    Attributes:
        scores: one row per component, block by block, in the order LN1, MHA, LN2, FC1, FC2. A row has `id` ("3.MHA"),
            `kind`, `block`, `mean`, `std`, `samples`, `standard_error`, `parameters` and the paths `modules`.
        kinds: one row per kind, in the same order: `kind`, `mean`, `std`, `samples` and `standard_error`.
        model_type: `config.model_type` of the measured model.
        model_parameters: number of parameters of the measured model, including its head.
        inputs: protocol of the criterion, "embedding" (the paper's) or "activation"; None for a criterion without
            protocols.
        samples: number of samples that each score is the mean of; 0 if `observed` is "weights".
        skipped: number of pairs that were skipped because a component got the same input for both images.
        seed: seed of the drawing of images and of the criterion's random numbers.
        uses_source: True if a pair is one source and one target image, False if it is two target images.
        versions: versions of the packages that were used to measure, by name.
        criterion: name of the criterion; components with higher scores should train.
        title: name of the scores, in words.
        observed: what a sample is: "pairs", "images", "batches" or, for a criterion that reads only weights,
            "weights". The scores of such a criterion are exact.
        input_std: standard deviation over the features of a token that enters block 0, mean over the tokens of one
            image; None for a criterion without protocols.
        ending: how the measurement ended; None if all samples were measured regardless of the ranking.
        target_provenance: origin of the target images; None if there were none, or if it is unknown.
        source_provenance: origin of the source images; None if there were none, or if it is unknown.
        batch_size: largest number of images in a batch if `observed` is "batches", else None. Scores of gradients
            depend on it: compare them only between reports of one batch size.
        separation: how far apart the units are, from which `select` computes `Selection.confidence`; None in reports
            of older releases.
        costs: work and memory of a training step, from which `select` computes `Selection.cost`; None in reports of
            older releases, and if they could not be counted.
        forecast: the accuracy that finetuning is expected to give, by set of components; None unless it was asked for.
    """

    def select(
        self,
        top_k: int | None = None,
        budget: float | str | None = None,
        *,
        granularity: str = "kind",
        candidates: Iterable[str] = KINDS,
        training: str | None = None,
        r: int | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> Selection:
        """Returns the best units, by number or by budget. Without `top_k` and `budget`, the best unit is selected.

        `Selection.confidence` is how sure the selection is. A warning is logged if it is below the `settle` of the
        measurement, or below 95 % without one, and if equal scores decided.

        Args:
            top_k: number of units.
            budget: share of the model's parameters, above 0 and at most 1. The best units are selected in order while
                their parameters fit. Parameters count as they train in the mode `training`; the head is not counted.
                "0.6 time" or "0.5 memory" is a share of what a training step takes if everything is finetuned. Units
                that do not fit are then passed over. Those of late blocks cost less, because the backward pass ends
                there; `granularity="component"` can select them.
            granularity: "kind" or "component", as in `ranking`.
            candidates: kinds that may be selected, all five by default; if components are selected, also the
                canonical ids of some, such as "3.MHA".
            training: "lora" or "full". In both, all parameters of a layer norm count, as LoRA cannot adapt it. By
                default "lora" if one of the next arguments is given, else "full".
            r: rank of LoRA, as in `peft.LoraConfig`, by default 8. This and the next three arguments determine the
                number of LoRA parameters.
            rank_pattern: see `r`.
            use_dora: see `r`.
            lora_bias: see `r`.

        Raises:
            ConfigError: an argument is out of its range, both `top_k` and `budget` are given, or the report does not
                contain the costs that a budget needs.
            SelectionError: nothing fits into the budget; the message has the smallest one that works. It is a
                ConfigError, and its attribute `report` is this report.
        """
        rule = SelectionRule(
            top_k=top_k,
            budget=budget,
            granularity=granularity,
            candidates=candidates,  # type: ignore[arg-type]  # the rule makes it a tuple
            training=mode(r, rank_pattern, use_dora, lora_bias) if training is None else training,
            r=8 if r is None else r,
            rank_pattern=rank_pattern,
            use_dora=use_dora,
            lora_bias=lora_bias,
        )
        return self.select_by(rule)

    def select_by(self, rule: SelectionRule) -> Selection:
        """Returns the selection that `rule` makes; see `select`."""
        try:
            selection = selected_by(self, rule)
        except SelectionError as error:
            error.report = self
            raise
        ranking = self.ranking(rule.granularity, rule.candidates)
        explanation = why_norms_lead(self, (row for row in ranking if row.unit in selection.units))
        if explanation:
            warnings.warn(explanation, stacklevel=3)
        warn_if_not_settled(self, selection.units, selection.confidence, selection.tied)
        return selection

    def check_matches(self, model_type: str, components: Iterable[Component]) -> None:
        """Raises ReportError unless this report was measured on a model with the given components."""
        measured = {row.id: row.parameters for row in self.scores}
        given = {component.id: component.parameters for component in components}
        if self.model_type != model_type or measured != given:
            raise ReportError(
                f"The report was measured on another architecture: {self.model_type!r}, {len(measured)} components, "
                f"{sum(measured.values()):,} parameters in them; the model is {model_type!r}, {len(given)} "
                f"components, {sum(given.values()):,} parameters. Measure this model, or give its own report."
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON can represent."""
        return {"format": FORMAT, "format_version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> PlasticityReport:
        """Returns the report that `to_dict` converted, also from older versions of the format.

        Unknown keys are ignored.

        Raises:
            ReportError: a value is missing, is not allowed, or contradicts another.
        """
        report: PlasticityReport = read_as(cls, current(values), ReportError)
        report.check()
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON to `path` in one step."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlasticityReport:
        """Returns the report in a file that `save` wrote, or in the plasticity.json of an adapter.

        Raises:
            ReportError: the file does not exist or is not a whole report; the message contains the path.
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
            ReportError: there is no plasticity.json, it cannot be fetched, or it is not a whole report.
        """
        path = find_file(folder_or_repo, REPORT_NAME, ReportError, **hub)
        if path is None:
            raise ReportError(without_report(folder_or_repo))
        return cls.load(path)

    def plot(self, view: str = "overview", *, selection: Selection | None = None, ax: Any = None) -> Any:
        """Returns the matplotlib axes of a picture of the scores, with 95 % confidence intervals.

        The figure is made without pyplot. In a notebook, `axes.figure` as the last line of a cell shows it. Needs the
        extra `plot`.

        Args:
            view: "depth" draws the scores over the blocks, one line per kind; "ranking" the units, best first;
                "heatmap" every block and kind; "forecast" the expected gain of each set, if the report has a forecast;
                "overview" draws "depth" and "ranking" side by side.
            selection: selection to mark. The ranking is drawn by its granularity.
            ax: axes to draw on, two for the overview. By default, a new figure is made.

        Returns:
            Axes; for the overview an array of two, shape (2,).

        Raises:
            ConfigError: the view is unknown, or `ax` does not have the number of axes that the view needs.

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

    def to_html(
        self, *, selection: Selection | None = None, forecast: Forecast | None = None, **arguments: Any
    ) -> str:
        """Returns a page that shows the ranking, the scores over depth, a heat map and what training costs.

        A reader moves the cut, by number or by budget, and sees what `select` would select and what that costs. The
        page is one file of about 1 MB, for any browser, and needs no network. Needs the extra `html`.

        Args:
            selection: selection to show first. It is called the one that was trained. If it cannot be made of the
                candidates, the page has those of which it can.
            forecast: what `forecast_finetuning` returned, to show with it; by default that of the report.
            arguments: `granularity`, `training`, `candidates`, `r`, `rank_pattern`, `use_dora` and `lora_bias`, as in
                `select`. The first two are those of the ranking that the page shows first.

        Returns:
            HTML, to write into a file in UTF-8.

        Raises:
            ConfigError: an argument is unknown or out of its range.
            MissingExtraError: vl-convert-python, which has the scripts that draw, is not installed.
        """
        return as_page(self, SelectionRule(**arguments), selection=selection, forecast=forecast)

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        """Returns the table for a notebook."""
        return as_html(self)


def warn_if_not_settled(
    report: BaseReport, units: Sequence[str], confidence: float | None, tied: Sequence[str]
) -> None:
    """Logs a warning, once, if the confidence of a selection is below what measuring promised, or below 95 %."""
    promised = SURE if report.ending is None else report.ending.confidence
    if not tied and (confidence is None or confidence >= promised):
        return
    advice = "Another" if tied else f"More {report.observed} (max_samples=...), or another"
    _warn_once(
        f"The selection of {', '.join(units) or 'nothing'} from {observed(report)} is not settled: its confidence is "
        f"{in_words(confidence, tied)}. {advice} top_k or budget may settle it."
    )


@lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    logger.warning(message)
