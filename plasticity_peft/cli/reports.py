"""Reads reports from a file, a folder or the Hub, prints them and draws them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer

from plasticity_peft.errors import AdapterError, ConfigError
from plasticity_peft.extras import require
from plasticity_peft.files import read_json, write_text
from plasticity_peft.hub import CONFIG_NAME, find_json
from plasticity_peft.report.forecast import Forecast
from plasticity_peft.report.format import reading
from plasticity_peft.report.page import as_page
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection, SelectionRule
from plasticity_peft.saved.record import AdapterRecord


def read_report(source: str, revision: str | None = None) -> PlasticityReport:
    """Returns the report in a file, in the folder of an adapter, or in an adapter on the Hub.

    Raises:
        ReportError: the report does not exist or is damaged.
    """
    if _names_a_file(source):
        return PlasticityReport.load(source)
    return PlasticityReport.from_pretrained(source, revision=revision)


def read_record(source: str, revision: str | None = None) -> AdapterRecord:
    """Returns the report and, if `source` is an adapter, the description of the adapter; see `read_report`."""
    if _names_a_file(source):
        return AdapterRecord.load(source)
    return AdapterRecord.read(source, revision=revision)


def _names_a_file(source: str) -> bool:
    return Path(source).suffix == ".json" or Path(source).is_file()


def print_json(values: Any) -> None:
    """Prints `values` as JSON on the standard output."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def check_file(path: Path | None, option: str) -> None:
    """Raises ConfigError if `path` is a folder or the folder of `path` is missing. Called before the work begins."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{option} must be a file in a folder that exists. Got {path}.")


def check_picture(path: Path | None, option: str = "--plot") -> None:
    """Raises an error if a picture cannot be drawn to `path`: matplotlib is missing, or does not know the format."""
    if path is None:
        return
    check_file(path, option)
    figure = require("matplotlib.figure", extra="plot", purpose=option).Figure()
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in known:
        raise ConfigError(
            f"{option} must end with one of {', '.join(f'.{name}' for name in sorted(known))}. Got {path}."
        )


def check_page(path: Path | None) -> None:
    """Raises an error if a page cannot be written to `path`: the extra is missing, or the name has another ending."""
    if path is None:
        return
    check_file(path, "--html")
    require("vl_convert", extra="html", purpose="--html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html must end with .html. Got {path}.")


def read_forecast(path: Path) -> Forecast:
    """Returns the forecast in a file that `plasticity-peft forecast --output` wrote.

    Raises:
        ReportError: the file is missing or is not a whole forecast.
    """
    with reading(f"the forecast {path}"):
        return Forecast.from_dict(read_json(path))


def save_page(path: Path, source: str, record: AdapterRecord, forecast: Path | None, revision: str | None) -> None:
    """Writes the page of the report in `record`, which was read from `source`; see `PlasticityReport.to_html`."""
    from plasticity_peft.saved.options import rule_of  # imports peft

    adapter, shown = record.adapter, None if forecast is None else read_forecast(forecast)
    rule = SelectionRule()
    if adapter is not None:
        hub = {} if revision is None else {"revision": revision}
        folder = str(Path(source).parent) if _names_a_file(source) else source
        config = find_json(folder, CONFIG_NAME, AdapterError, optional=True, **hub)
        rule = rule_of(config or {}, adapter.granularity, adapter.training)
    selection = adapter.selection if adapter else None
    write_text(path, as_page(record.report, rule, selection=selection, forecast=shown))


def save_picture(
    report: PlasticityReport, path: Path, view: str = "overview", selection: Selection | None = None
) -> None:
    """Writes a picture of the report to `path`; see `PlasticityReport.plot`."""
    np.ravel(report.plot(view, selection=selection))[0].figure.savefig(path)
