"""plasticity.json, the file next to an adapter: the report, a description of the adapter, and results of its weights.

This module reads and writes it. `PlasticityReport` reads only the report in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Len

from plasticity_peft.checks import TRAINING_MODES, shown
from plasticity_peft.constraints import STRICT, Name, one_of, read_as
from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.files import read_json, write_text
from plasticity_peft.hub import REPORT_NAME, WEIGHTS_NAME, find_json, without_report
from plasticity_peft.report.format import current, reading
from plasticity_peft.report.provenance import Provenance, provenance_of
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection


@dataclass(frozen=True, kw_only=True)
class AdapterDescription(Selection):
    """The components that an adapter trains, the training mode, and the labels that it predicts."""

    training: Annotated[str, one_of(TRAINING_MODES)]
    """"lora" or "full"."""
    id2label: dict[int, str] | None = None
    """Names of the labels; None for a model without a head."""

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT

    @classmethod
    def of(cls, selection: Selection, training: str, id2label: Mapping[int, str] | None) -> AdapterDescription:
        """Returns the description of an adapter that trains `selection`."""
        labels = None if id2label is None else dict(id2label)
        return cls(**_fields(selection), training=training, id2label=labels)

    @property
    def selection(self) -> Selection:
        """The selection alone."""
        return Selection(**_fields(self))

    def labels(self) -> dict[int, str]:
        """Returns the names of the labels by number; empty if there are none.

        Raises:
            ReportError: the labels are not numbered 0, 1, 2, ...
        """
        labels = self.id2label or {}
        if sorted(labels) != list(range(len(labels))):
            raise ReportError(f"adapter.id2label must number the labels from 0, got {shown(sorted(labels))}")
        return labels


def _fields(selection: Selection) -> dict[str, Any]:
    return {field.name: getattr(selection, field.name) for field in fields(Selection)}


@dataclass(frozen=True)
class Results:
    """Metrics of an adapter on one dataset."""

    metrics: Mapping[Name, float]
    """Values by name, such as {"accuracy": 0.94}."""
    dataset: Provenance
    weights: Annotated[str, Len(64, 64)]
    """SHA-256 of the weights file that was evaluated."""

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT


@dataclass(frozen=True)
class AdapterRecord:
    """The content of plasticity.json.

    A report file has the same format, without `adapter` and `results`.
    """

    report: PlasticityReport
    adapter: AdapterDescription | None = None
    """None for a report without an adapter."""
    results: tuple[Results, ...] = ()
    """Metrics of the adapter, or of the weights that it had before."""

    @classmethod
    def find(cls, folder_or_repo: str | os.PathLike[str], **hub: Any) -> AdapterRecord | None:
        """Returns the record of an adapter, or None if the adapter was not trained with this package.

        Args:
            folder_or_repo: the folder of an adapter, or "user/repo" on the Hub.
            hub: options of `huggingface_hub.hf_hub_download`.

        Raises:
            ReportError: the file cannot be fetched, or is damaged.
        """
        values = find_json(folder_or_repo, REPORT_NAME, ReportError, optional=True, **hub)
        return None if values is None else cls._of(values, folder_or_repo)

    @classmethod
    def read(cls, folder_or_repo: str | os.PathLike[str], **hub: Any) -> AdapterRecord:
        """Returns the record of an adapter that was trained with this package. The arguments are those of `find`.

        Raises:
            ReportError: the file is missing, cannot be fetched, or is damaged.
        """
        values = find_json(folder_or_repo, REPORT_NAME, ReportError, **hub)
        if values is None:
            raise ReportError(without_report(folder_or_repo))
        return cls._of(values, folder_or_repo)

    @classmethod
    def _of(cls, values: object, folder_or_repo: str | os.PathLike[str]) -> AdapterRecord:
        with reading_record(folder_or_repo):
            return cls.from_dict(values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdapterRecord:
        """Returns the content of a file: a saved report, or the plasticity.json of an adapter.

        Raises:
            ReportError: the file is missing or damaged.
        """
        with reading(f"the report {os.fspath(path)}"):
            return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, values: object) -> AdapterRecord:
        """Returns the record that `to_dict` converted. Other keys are ignored.

        Raises:
            ReportError: a value is missing, or not allowed; the message names it.

        Examples:
            >>> AdapterRecord.from_dict({"scores": []})
            Traceback (most recent call last):
            plasticity_peft.errors.ReportError: it is not a plasticity report: "format" must be "plasticity_peft"
        """
        values = current(values)
        described = values.get("adapter")
        return cls(
            report=PlasticityReport.from_dict(values),
            adapter=None if described is None else read_as(AdapterDescription, described, ReportError, "adapter"),
            results=read_as(tuple[Results, ...], values.get("results", ()), ReportError, "results"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as values that JSON can represent."""
        values = self.report.to_dict()
        if self.adapter is not None:
            values["adapter"] = asdict(self.adapter)
        if self.results:
            values["results"] = [asdict(one) for one in self.results]
        return values

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes plasticity.json into `folder` in one step."""
        write_text(Path(folder, REPORT_NAME), json.dumps(self.to_dict(), indent=2) + "\n")

    def described(self) -> AdapterDescription:
        """Returns `adapter`. Raises ReportError if there is none."""
        if self.adapter is None:
            raise ReportError("adapter is missing")
        return self.adapter

    def with_results(self, results: Results) -> AdapterRecord:
        """Returns the record with `results` and with those of the same weights on other datasets or splits."""
        kept = [one for one in self.results if one.weights == results.weights and _place(one) != _place(results)]
        return replace(self, results=(*kept, results))


def reading_record(folder_or_repo: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Inside, an error about the content of the plasticity.json of `folder_or_repo` names that file."""
    return reading(f"{REPORT_NAME} of {os.fspath(folder_or_repo)}")


def _place(results: Results) -> tuple[str, str | None]:
    return str(results.dataset), results.dataset.split


def present_results(folder: str | os.PathLike[str]) -> tuple[Results, ...]:
    """Returns the results in `folder` that belong to the present weights.

    PEFT, Trainer and this package all write model cards, and weights may be trained further. So results are saved next
    to the adapter with the SHA-256 of its weights, and count as long as it has these weights.
    """
    results = all_results(folder)
    weights = digest_in(folder) if results else None
    return tuple(one for one in results if one.weights == weights)


def all_results(folder: str | os.PathLike[str]) -> tuple[Results, ...]:
    """Returns all results in `folder`; none if the file there cannot be read, as it is about to be replaced."""
    if not os.path.isdir(folder):
        return ()
    try:
        record = AdapterRecord.find(folder)
    except ReportError:
        return ()
    return () if record is None else record.results


def make_results(metrics: Mapping[str, float], dataset: Any, split: str | None, weights: str) -> Results:
    """Returns metrics as results.

    Args:
        metrics: values by name, such as {"accuracy": 0.94}.
        dataset: the dataset of the metrics, its name, or its id on the Hub ("user/name").
        split: the split of the dataset; None for the split that the dataset names, if any.
        weights: SHA-256 of the weights file.

    Raises:
        ConfigError: a metric is not a finite number, or a name is not allowed.
    """
    if isinstance(dataset, str):
        provenance = Provenance(form="dataset", name=dataset, repo_id=dataset if "/" in dataset else None, split=split)
    else:
        known = provenance_of(dataset)
        if known is None:
            raise ConfigError("dataset must be the dataset that the metrics were measured on, or its name. Got None.")
        provenance = replace(known, split=split or known.split)
    values = {"metrics": _plain(metrics), "dataset": asdict(provenance), "weights": weights}
    try:
        results: Results = read_as(Results, values, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{error}.") from None
    return results


def _plain(metrics: object) -> object:
    """Returns metrics with the numbers of other packages, such as numpy.float32, as float."""
    if not isinstance(metrics, Mapping):
        return metrics
    return {
        name: float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
        for name, value in metrics.items()
    }


def digest(weights: bytes) -> str:
    """Returns the SHA-256 of the content of a weights file."""
    return hashlib.sha256(weights).hexdigest()


def digest_in(folder: str | os.PathLike[str]) -> str | None:
    """Returns the SHA-256 of the adapter's weights in `folder`; None if there are none."""
    path = Path(folder, WEIGHTS_NAME)
    return digest(path.read_bytes()) if path.is_file() else None
