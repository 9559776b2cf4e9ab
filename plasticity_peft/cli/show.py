"""`plasticity-peft show`: the scores of a report, as a table, a picture, a page or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plasticity_peft.cli import options

EXAMPLES = """\b
Examples:
  plasticity-peft show beans.json
  plasticity-peft show path/to/adapter --plot scores.png --view heatmap
  plasticity-peft show user/repo --json
  plasticity-peft show path/to/adapter --html page.html --forecast forecast.json
"""


def show(
    report: options.Report,
    plot: options.Picture = None,
    view: options.View = "overview",
    html: options.Page = None,
    forecast: Annotated[
        Path | None, typer.Option("--forecast", help="Forecast file to show on the page of --html.")
    ] = None,
    revision: options.Revision = None,
    as_json: options.AsJson = False,
) -> None:
    """Shows the scores of a report, or of an adapter and what it trains, as a table, a picture, a page or JSON."""
    from plasticity_peft.cli.reports import check_page, check_picture, print_json, read_record, save_page, save_picture
    from plasticity_peft.report.text import sure_in_words

    check_picture(plot)
    check_page(html)
    if forecast is not None and html is None:
        raise typer.BadParameter("--forecast is shown on a page. Give --html too.")
    record = read_record(report, revision)
    found, adapter = record.report, record.adapter
    if plot is not None:
        save_picture(found, plot, view, adapter.selection if adapter else None)
    if html is not None:
        save_page(html, report, record, forecast, revision)
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo(str(found))
    if adapter:
        units, parameters = ", ".join(adapter.units), adapter.parameters[adapter.training]
        typer.echo(f"Selected: {units} ({adapter.training}, {parameters:,} parameters without the head)")
        if adapter.cost is not None:
            typer.echo(f"Cost: {adapter.cost}")
        typer.echo(f"Confidence of the selection: {sure_in_words(found, adapter.selection)}")
