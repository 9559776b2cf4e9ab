"""A report in and out: read from wherever it lies, printed, drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer

from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.extras import require
from plasticity_peft.files import read_json
from plasticity_peft.hub import REPORT_NAME, find_file
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection
from plasticity_peft.saved.record import KEY, AdapterDescription


def read_report(source: str, revision: str | None = None) -> PlasticityReport:
    """Returns the report in a file, in the folder of an adapter, or beside an adapter on the Hub.

    Raises:
        ReportError: there is none, or it is damaged.
    """
    if _names_a_file(source):
        return PlasticityReport.load(source)
    return PlasticityReport.from_pretrained(source, revision=revision)


def read_description(source: str, revision: str | None = None) -> AdapterDescription | None:
    """Returns what an adapter trains, and how; None for a report that belongs to no adapter.

    Raises:
        ReportError: it is damaged.
    """
    path: Path | None = Path(source)
    if not _names_a_file(source):
        path = find_file(source, REPORT_NAME, ReportError, revision=revision)
    if path is None:
        return None
    values = read_json(path)
    return AdapterDescription.from_file(values, path.name) if KEY in values else None


def _names_a_file(source: str) -> bool:
    return Path(source).suffix == ".json" or Path(source).is_file()


def print_json(values: Any) -> None:
    """Prints `values` as JSON on the standard output."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def check_file(path: Path | None, option: str) -> None:
    """Raises ConfigError where `path` cannot be written because its folder is missing: before, not after the work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{option} must be a file in a folder that exists. Got {path}.")


def check_picture(path: Path | None, option: str = "--plot") -> None:
    """Raises where a picture cannot be drawn to `path`: matplotlib is missing, or does not know the format."""
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
