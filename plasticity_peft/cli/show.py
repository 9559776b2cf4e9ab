"""`plasticity-peft show`: the scores of a report, as a table, a picture or JSON."""

from __future__ import annotations

import typer

from plasticity_peft.cli import options

EXAMPLES = """\b
Examples:
  plasticity-peft show beans.json
  plasticity-peft show path/to/adapter --plot scores.png --view heatmap
  plasticity-peft show user/repo --json
"""


def show(
    report: options.Report,
    plot: options.Picture = None,
    view: options.View = "overview",
    revision: options.Revision = None,
    as_json: options.AsJson = False,
) -> None:
    """Shows the scores of a report, or of an adapter and what it trains, as a table, a picture or JSON."""
    from plasticity_peft.cli.reports import check_picture, print_json, read_record, save_picture
    from plasticity_peft.report.confidence import in_words

    check_picture(plot)
    record = read_record(report, revision)
    found, adapter = record.report, record.adapter
    if plot is not None:
        save_picture(found, plot, view, adapter.selection if adapter else None)
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo(str(found))
    if adapter:
        units, parameters = ", ".join(adapter.units), adapter.parameters[adapter.training]
        typer.echo(f"Selected: {units} ({adapter.training}, {parameters:,} parameters without the head)")
        if adapter.cost is not None:
            typer.echo(f"Cost: {adapter.cost}")
        typer.echo(f"Confidence of the selection: {in_words(adapter.selection.confidence, adapter.selection.tied)}")
