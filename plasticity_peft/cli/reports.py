"""Reads reports from a file, a folder or the Hub, prints them and draws them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer

from plasticity_peft.errors import ConfigError
from plasticity_peft.extras import require
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection
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


def save_picture(
    report: PlasticityReport, path: Path, view: str = "overview", selection: Selection | None = None
) -> None:
    """Writes a picture of the report to `path`; see `PlasticityReport.plot`."""
    np.ravel(report.plot(view, selection=selection))[0].figure.savefig(path)
