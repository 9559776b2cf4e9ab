"""`plasticity-peft compare`: how much two reports of the same kind of model agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from plasticity_peft.checks import GRANULARITIES
from plasticity_peft.cli import options

if TYPE_CHECKING:
    from plasticity_peft.report.report import PlasticityReport

EXAMPLES = """\b
Examples:
  plasticity-peft compare digits.json fashion.json --plot both.png
  plasticity-peft compare first.json second.json --granularity component --top_k 12 --json
"""


def compare(
    first: options.Report,
    second: options.Report,
    top_k: Annotated[
        int | None,
        typer.Option("--top_k", help="Number of best units to compare. By default a fifth of all units."),
    ] = None,
    granularity: Annotated[
        str | None,
        options.one_of(
            "--granularity", GRANULARITIES, "What is compared. By default both.", options.FORMER_GRANULARITIES
        ),
    ] = None,
    plot: options.Picture = None,
    as_json: options.AsJson = False,
) -> None:
    """Compares two reports: rank correlation of their scores, and overlap of their best components."""
    from plasticity_peft.cli.reports import check_picture, print_json, read_report
    from plasticity_peft.report.agreement import agreement, check_comparable
    from plasticity_peft.report.plotting import draw_agreement
    from plasticity_peft.report.tables import table

    check_picture(plot)
    reports = read_report(first), read_report(second)
    check_comparable(*reports, names=(first, second))
    chosen = GRANULARITIES if granularity is None else (granularity,)
    found = [agreement(*reports, granularity=each, top_k=top_k) for each in chosen]
    if plot is not None:
        draw_agreement(reports, (first, second), found).savefig(plot)
    if as_json:
        print_json({"first": _described(reports[0]), "second": _described(reports[1]), "agreement": found})
        return
    title = f"{first}: {_in_words(reports[0])}\n{second}: {_in_words(reports[1])}"
    columns = ("by", "units", "Spearman", "Kendall", "best in common", "which")
    typer.echo(table(title, columns, [_row(each) for each in found]))


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        found["granularity"],
        str(found["units"]),
        _number(found["spearman"]),
        _number(found["kendall"]),
        f"{found['shared']} of {found['top_k']}",
        ", ".join(found["best_of_both"]),
    )


def _described(report: PlasticityReport) -> dict[str, Any]:
    names = ("model_type", "criterion", "inputs", "observed", "samples", "seed")
    return {name: getattr(report, name) for name in names}


def _in_words(report: PlasticityReport) -> str:
    inputs = "" if report.inputs is None else f", {report.inputs} inputs"
    return f"{report.title} of {report.model_type}{inputs}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
