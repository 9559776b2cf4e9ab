"""The section of a model card about one adapter: metadata, and text made from `card_template.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from plasticity_peft.components.component import MATRIX_KINDS
from plasticity_peft.report.plotting import MOST_UNITS
from plasticity_peft.report.selection import RankedUnit
from plasticity_peft.report.text import decision_rows, heading, how_it_ended, observed, sure_in_words
from plasticity_peft.saved.options import readable
from plasticity_peft.saved.record import Results
from plasticity_peft.saved.snippets import MOST_LABELS, own_snippet, stock_snippet
from plasticity_peft.saved.trained import TrainedAdapter

TAG = "plasticity_peft"
FORECAST_TEXT = (
    "Before training, `forecast_finetuning` expected these accuracies in percent, from {images} labeled images, if a "
    "set is finetuned in full. Time and memory of a training step are shares of finetuning everything."
)
TEMPLATE = Path(__file__).with_name("card_template.md")


def section_of(adapter: TrainedAdapter, *, picture: str | None, page: str | None) -> ModelCard:
    """Returns a card that consists of the section about an adapter.

    `picture` and `page` are the paths of its picture and of the page of its report, if there are any.
    """
    report, selection, forecast = adapter.report, adapter.selection, adapter.report.forecast
    rows = report.ranking(selection.granularity)
    most = max(MOST_UNITS, len(selection.units)) if selection.granularity == "component" else len(rows)
    card: ModelCard = ModelCard.from_template(
        _metadata(adapter),
        template_path=str(TEMPLATE),
        begin=comment("begin", adapter.name),
        end=comment("end", adapter.name),
        heading="What was trained, and why" + ("" if adapter.name == "default" else f" ({adapter.name})"),
        report=report,
        title=_cell(report.title),
        blocks=len(report.scores) // len(report.kinds),
        selection=selection,
        granularity="kind" if selection.granularity == "kind" else "component",
        the_best="the best" if _are_first(adapter) else "the best of those that were candidates",
        how_trained=_how_trained(adapter),
        count=_count(adapter),
        picture=picture,
        page=page,
        picture_text=_cell(heading(report)),
        ranking=[_ranked(adapter, rank, row) for rank, row in enumerate(rows[:most], start=1)],
        left_out=len(rows[most:]),
        decision=[]
        if forecast is None
        else [[_cell(value) for value in row] for row in decision_rows(report, forecast)],
        decision_text="" if forecast is None else FORECAST_TEXT.format(images=forecast.head.images),
        advice="" if forecast is None else forecast.advice(),
        facts=[(name, _cell(value)) for name, value in _facts(adapter) if value],
        results=[row for one in adapter.results for row in _result_rows(one)],
        stock_snippet=stock_snippet(adapter),
        own_snippet=own_snippet(adapter) if readable(adapter.options) else "",
        labels=_labels(adapter.id2label or {}) if adapter.has_labels else "",
    )
    return card


def comment(which: str, name: str) -> str:
    """Returns the comment at the "begin" or the "end" of the section about the adapter `name`."""
    return f"<!-- plasticity_peft: {which} {re.sub(r'[^0-9A-Za-z_.-]', '_', name)} -->"


def eval_results_of(results: Results, task: str | None) -> list[EvalResult]:
    """Returns results in the form of the Hub's model-index. Without a task, the model gives features of images."""
    data, task = results.dataset, task or "image-feature-extraction"
    name = data.repo_id or data.name or data.form
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").title(),
            dataset_type=data.repo_id or re.sub(r"[^\w.-]+", "-", name.lower()),
            dataset_name=name,
            dataset_split=data.split,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in results.metrics.items()
    ]


def _metadata(adapter: TrainedAdapter) -> ModelCardData:
    datasets = [adapter.report.target_provenance, *(one.dataset for one in adapter.results)]
    ids = sorted({one.repo_id for one in datasets if one is not None and one.repo_id})
    results = [result for one in adapter.results for result in eval_results_of(one, adapter.task)]
    return ModelCardData(
        library_name="peft",
        base_model=adapter.hub_model,
        pipeline_tag=adapter.task,
        datasets=ids or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=[TAG],
        model_name="adapter" if results else None,
        eval_results=results or None,
    )


def _are_first(adapter: TrainedAdapter) -> bool:
    """Returns whether the selected units are the first in the ranking, which may contain kinds that were excluded."""
    ranking = adapter.report.ranking(adapter.selection.granularity)
    return {row.unit for row in ranking[: len(adapter.selection.units)]} == set(adapter.selection.units)


def _how_trained(adapter: TrainedAdapter) -> str:
    if adapter.training == "full":
        return "in full"
    options = [f"{name}={adapter.options[name]}" for name in ("r", "lora_alpha") if name in adapter.options]
    options += [f"{name}=True" for name in ("use_dora", "use_rslora") if adapter.options.get(name)]
    kinds = {name.rsplit(".", 1)[-1] for name in adapter.selection.components}
    norms = "" if kinds <= set(MATRIX_KINDS) else "; layer norms, which LoRA cannot adapt, in full"
    return f"with LoRA ({', '.join(options)}{norms})"


def _count(adapter: TrainedAdapter) -> str:
    chosen, total = adapter.selection.parameters[adapter.training], adapter.selection.model_parameters
    beside = adapter.saved_parameters - chosen
    shares = f": {chosen:,} in the selected components and {beside:,} in the head and other modules"
    share = 100 * adapter.saved_parameters / total
    return (
        f"The adapter contains {adapter.saved_parameters:,} trained parameters, {share:.2f} % of the {total:,} of the "
        f"model{shares if beside > 0 else ', all of them in the selected components'}."
    )


def _ranked(adapter: TrainedAdapter, rank: int, row: RankedUnit) -> dict[str, Any]:
    return {
        "rank": rank,
        "unit": row.unit,
        "score": f"{row.score:.4g}",
        "error": "exact" if adapter.report.observed == "weights" else f"{row.standard_error:.2g}",
        "selected": "yes" if row.unit in adapter.selection.units else "",
    }


def _facts(adapter: TrainedAdapter) -> Iterator[tuple[str, str]]:
    """Yields the facts about the measurement, by name. A fact that is not known is empty."""
    report = adapter.report
    yield "base model", adapter.hub_model or f"a {report.model_type} model that is not on the Hub"
    yield "criterion", report.criterion
    yield "inputs (protocol)", report.inputs or ""
    pairs = f", {report.skipped} skipped" if report.skipped else ""
    sources = {True: ", each of a source and a target image", False: ", each of two target images"}
    yield "observed", observed(report) + (sources[report.uses_source] if report.observed == "pairs" else "") + pairs
    yield "images per batch", "" if report.batch_size is None else f"up to {report.batch_size}"
    yield (
        "settled",
        how_it_ended(report) or ("" if report.observed == "weights" else "not tested: all samples were measured"),
    )
    yield "confidence of the selection", sure_in_words(report, adapter.selection)
    yield "cost by formula, without the head", str(adapter.selection.cost or "")
    yield "target images", str(report.target_provenance or "")
    yield "source images", str(report.source_provenance or "")
    yield "seed", str(report.seed)
    yield "ranked by", "kind, over all blocks" if adapter.selection.granularity == "kind" else "component"
    yield "versions", ", ".join(f"{name} {release}" for name, release in report.versions.items())


def _result_rows(results: Results) -> Iterator[tuple[str, ...]]:
    data = results.dataset
    for name, value in results.metrics.items():
        dataset = _cell(data.repo_id or data.name or data.form)
        yield dataset, _cell(data.split or ""), _cell(name), f"{value:.4g}"


def _labels(labels: Mapping[int, str]) -> str:
    shown = [f"{index}: {_cell(label)}" for index, label in list(labels.items())[:MOST_LABELS]]
    more = len(labels) - len(shown)
    return ", ".join(shown) + (f", and {more} more in `plasticity.json`" if more > 0 else "")


def _cell(text: str) -> str:
    """Returns text for a cell of a table that cannot end the cell or the comments around the section."""
    plain = re.sub(r"\s+", " ", text).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)
