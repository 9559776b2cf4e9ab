"""`plasticity-peft compare`: how much two reports of one kind of model agree."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from scipy import stats

from plasticity_peft.checks import GRANULARITIES, check_count
from plasticity_peft.cli import options
from plasticity_peft.cli.reports import print_json, read_report
from plasticity_peft.errors import ReportError
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.text import table

EXAMPLES = """\b
Examples:
  plasticity-peft compare digits.json fashion.json
  plasticity-peft compare first.json second.json --granularity component --top_k 12 --json
"""


def compare(
    first: options.Report,
    second: options.Report,
    top_k: Annotated[
        int | None,
        typer.Option("--top_k", help="How many of the best units to compare; a fifth of them by default."),
    ] = None,
    granularity: Annotated[
        str | None, options.one_of("--granularity", GRANULARITIES, "What is compared; both by default.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compares two reports: rank correlation of their scores, and overlap of their best components."""
    reports = read_report(first), read_report(second)
    check_comparable(*reports, names=(first, second))
    chosen = GRANULARITIES if granularity is None else (granularity,)
    found = [agreement(*reports, granularity=each, top_k=top_k) for each in chosen]
    if as_json:
        print_json({"first": _described(reports[0]), "second": _described(reports[1]), "agreement": found})
        return
    rows = [
        (
            row["granularity"],
            str(row["units"]),
            _number(row["spearman"]),
            _number(row["kendall"]),
            f"{row['shared']} of {row['top_k']}",
            ", ".join(row["best_of_both"]),
        )
        for row in found
    ]
    title = f"{first}: {_in_words(reports[0])}\n{second}: {_in_words(reports[1])}"
    typer.echo(table(title, ("by", "units", "Spearman", "Kendall", "best in common", "which"), rows))


def check_comparable(first: PlasticityReport, second: PlasticityReport, names: tuple[str, str]) -> None:
    """Raises ReportError unless both reports score the same components, by canonical id."""
    ids = [{row.id for row in report.scores} for report in (first, second)]
    if ids[0] != ids[1]:
        told = " and ".join(
            f"{name} scores the {len(own)} components of {report.model_type!r}, {report.scores[0].id} to "
            f"{report.scores[-1].id}"
            for name, own, report in zip(names, ids, (first, second), strict=True)
        )
        raise ReportError(f"The reports are of models with different components, and cannot be compared: {told}.")


def agreement(
    first: PlasticityReport, second: PlasticityReport, *, granularity: str, top_k: int | None = None
) -> dict[str, Any]:
    """Returns how much two rankings agree: Spearman's rho, Kendall's tau (b), and which of the best are the same.

    A correlation is None where all scores of a report are equal.

    Raises:
        ConfigError: there are not so many units.
    """
    rankings = [report.ranking(granularity) for report in (first, second)]
    units = sorted(row.unit for row in rankings[0])
    top_k = max(1, len(units) // 5) if top_k is None else top_k
    check_count("top_k", top_k, 1, len(units), f", the number of units by {granularity}")
    scores = [[{row.unit: row.score for row in ranking}[unit] for unit in units] for ranking in rankings]
    constant = any(len(set(values)) == 1 for values in scores)
    best = [[row.unit for row in ranking[:top_k]] for ranking in rankings]
    shared = [unit for unit in best[0] if unit in best[1]]
    return {
        "granularity": granularity,
        "units": len(units),
        "spearman": None if constant else float(stats.spearmanr(*scores).statistic),
        "kendall": None if constant else float(stats.kendalltau(*scores).statistic),
        "top_k": top_k,
        "shared": len(shared),
        "overlap": len(shared) / top_k,
        "best_of_both": shared,
        "best_of_first": best[0],
        "best_of_second": best[1],
    }


def _described(report: PlasticityReport) -> dict[str, Any]:
    names = ("model_type", "criterion", "inputs", "observed", "pairs", "seed")
    return {name: getattr(report, name) for name in names}


def _in_words(report: PlasticityReport) -> str:
    inputs = "" if report.inputs is None else f", {report.inputs} inputs"
    return f"{report.title} of {report.model_type}{inputs}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
