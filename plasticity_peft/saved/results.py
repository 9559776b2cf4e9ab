"""Metrics that were measured with an adapter's weights, kept in plasticity.json for as long as these are its weights.

A model card is written anew by several hands (PEFT, Trainer, us); what was measured is therefore kept beside the
scores, with the SHA-256 of the weights file: weights that were trained further have no results until they are measured
again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.files import read_json, write_text
from plasticity_peft.hub import REPORT_NAME, WEIGHTS_NAME
from plasticity_peft.report.provenance import Provenance, provenance_of


@dataclass(frozen=True)
class Results:
    """Metrics on one dataset."""

    metrics: Mapping[str, float]
    """Values by name, such as {"accuracy": 0.94}."""
    dataset: Provenance
    weights: str
    """SHA-256 of the weights file that was measured."""

    def __post_init__(self) -> None:
        if not isinstance(self.metrics, Mapping) or not all(map(_is_metric, self.metrics.items())):
            raise ConfigError(f"metrics must be finite numbers by name. Got {self.metrics!r}.")


def _is_metric(item: tuple[Any, Any]) -> bool:
    name, value = item
    named = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 100
    return named and isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def results_of(metrics: Mapping[str, float], dataset: Any, split: str | None, weights: str) -> Results:
    """Returns metrics as results; `dataset` is a dataset, or its name, or its id on the Hub ("user/name")."""
    if isinstance(dataset, str):
        provenance = Provenance(form="dataset", name=dataset, repo_id=dataset if "/" in dataset else None, split=split)
    else:
        known = provenance_of(dataset)
        if known is None:
            raise ConfigError("dataset must be the dataset that the metrics were measured on, or its name. Got None.")
        provenance = Provenance(**{**asdict(known), "split": split or known.split})
    try:
        provenance.check("dataset")
    except ReportError as error:
        raise ConfigError(f"{error}.") from None
    results = Results(metrics, provenance, weights)
    return replace(results, metrics={name: float(value) for name, value in metrics.items()})


def read_results(folder: str | os.PathLike[str]) -> list[Results]:
    """Returns the results in the plasticity.json of `folder`, whatever weights they belong to; none without the file.

    Raises:
        ReportError: they are not of the form in which they are written.
    """
    from pydantic import TypeAdapter, ValidationError

    path = Path(folder, REPORT_NAME)
    try:
        values = read_json(path)
        found = TypeAdapter(list[Results]).validate_python(values.get("results", []))
        for number, one in enumerate(found):
            one.dataset.check(f"results.{number}.dataset")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ReportError(f"Cannot read the results in {os.fspath(path)}: {what}") from None
    return found


def results_for(folder: str | os.PathLike[str]) -> list[Results]:
    """Returns the results in `folder` that were measured with the weights that are there.

    There are none in a file that cannot be read: whoever asks is about to write it anew.
    """
    try:
        found = read_results(folder)
    except ReportError:
        return []
    weights = digest_in(folder) if found else None
    return [one for one in found if one.weights == weights]


def add_results(folder: str | os.PathLike[str], results: Results) -> None:
    """Writes `results` into the plasticity.json of `folder`, in the place of those on the same dataset and split."""
    path = Path(folder, REPORT_NAME)
    values = read_json(path)
    kept = [one for one in results_for(folder) if not _same_place(one, results)]
    values["results"] = [asdict(one) for one in (*kept, results)]
    write_text(path, json.dumps(values, indent=2) + "\n")


def _same_place(one: Results, other: Results) -> bool:
    """Returns whether both were measured on the same dataset and split."""
    return (str(one.dataset), one.dataset.split) == (str(other.dataset), other.dataset.split)


def digest(weights: bytes) -> str:
    """Returns the SHA-256 of the content of a weights file."""
    return hashlib.sha256(weights).hexdigest()


def digest_in(folder: str | os.PathLike[str]) -> str | None:
    """Returns the SHA-256 of the adapter's weights in `folder`; None where there are none."""
    path = Path(folder, WEIGHTS_NAME)
    return digest(path.read_bytes()) if path.is_file() else None
