"""A report in and out: read from wherever it lies, printed, drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer

from plasticity_peft.errors import ConfigError
from plasticity_peft.extras import require
from plasticity_peft.hub import REPORT_NAME
from plasticity_peft.report import PlasticityReport


def read_report(source: str, revision: str | None = None) -> PlasticityReport:
    """Returns the report in a file, in the folder of an adapter, or beside an adapter on the Hub.

    Raises:
        ReportError: there is none, or it is damaged.
    """
    path = Path(source)
    if path.is_dir():
        path /= REPORT_NAME
    return PlasticityReport.load(path)


def print_json(values: Any) -> None:
    """Prints `values` as JSON on the standard output."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def print_report(report: PlasticityReport, as_json: bool) -> None:
    """Prints the report on the standard output: as JSON, or as its table."""
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))


def check_file(path: Path | None, option: str) -> None:
    """Raises ConfigError where `path` cannot be written because its folder is missing: before, not after the work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{option} must be a file in a folder that exists. Got {path}.")


def check_picture(path: Path | None, option: str = "--plot") -> None:
    """Raises where a picture cannot be drawn to `path`: matplotlib is missing, or does not know the format."""
    if path is None:
        return
    check_file(path, option)
    figure = require("matplotlib.figure", extra="plots", purpose=option).Figure()
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in known:
        raise ConfigError(
            f"{option} must end with one of {', '.join(f'.{name}' for name in sorted(known))}. Got {path}."
        )


def save_picture(report: PlasticityReport, path: Path) -> None:
    """Writes the picture of the report to `path`."""
    np.ravel(report.plot())[0].figure.savefig(path)
