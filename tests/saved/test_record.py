"""plasticity.json: one reader and one writer, that agree, and that refuse what is not allowed."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.saved.record import (
    AdapterDescription,
    AdapterRecord,
    Results,
    digest,
    make_results,
    present_results,
)
from tests.report.test_report import REPORT
from tests.support.models import REPOSITORY

SELECTION = REPORT.select(top_k=2)
ADAPTER = AdapterDescription.of(SELECTION, "full", {0: "cat", 1: "x\n```"})
WEIGHTS = digest(b"weights")
RESULTS = make_results({"accuracy": 0.5}, "digits", "test", WEIGHTS)
RECORD = AdapterRecord(REPORT, ADAPTER, (RESULTS,))


def edited(*path: str | int, value: object = ...) -> dict[str, Any]:
    """Returns the record as a dictionary with the value at `path` replaced, or gone."""
    values = json.loads(json.dumps(RECORD.to_dict()))
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return values


@pytest.mark.parametrize(
    "record",
    [RECORD, replace(RECORD, results=()), replace(RECORD, adapter=None, results=()),
     replace(RECORD, adapter=replace(ADAPTER, id2label=None))],
)  # fmt: skip
def test_what_is_written_is_what_is_read(record: AdapterRecord, tmp_path: Path) -> None:
    record.write(tmp_path)
    (path,) = tmp_path.iterdir()
    for again in (AdapterRecord.read(tmp_path), AdapterRecord.find(tmp_path), AdapterRecord.load(path)):
        assert again == record
    assert PlasticityReport.load(path) == PlasticityReport.from_pretrained(tmp_path) == record.report
    assert set(json.loads(path.read_text())) - set(REPORT.to_dict()) == {
        name for name in ("adapter", "results") if getattr(record, name)
    }


def test_a_report_file_is_the_record_of_no_adapter(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "report.json")
    assert AdapterRecord.load(tmp_path / "report.json") == AdapterRecord(REPORT)
    with pytest.raises(ReportError, match="adapter is missing"):
        AdapterRecord(REPORT).described()


def test_a_description_contains_its_selection() -> None:
    assert ADAPTER.selection == SELECTION
    assert type(ADAPTER.selection) is type(SELECTION)
    assert ADAPTER.labels() == {0: "cat", 1: "x\n```"}
    assert replace(ADAPTER, id2label=None).labels() == {}
    with pytest.raises(ReportError, match=r"adapter.id2label must number the labels from 0, got \[1\]"):
        replace(ADAPTER, id2label={1: "dog"}).labels()


def test_a_folder_without_a_record(tmp_path: Path) -> None:
    assert AdapterRecord.find(tmp_path) is None
    with pytest.raises(
        ReportError, match=r"No plasticity.json in .* This adapter was not trained with plasticity_peft"
    ):
        AdapterRecord.read(tmp_path)
    with pytest.raises(ReportError, match=r"Cannot read the report .*missing.json: No such file or directory"):
        AdapterRecord.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (edited("adapter", "training"), "adapter.training is missing"),
        (edited("adapter", "training", value="half"), "adapter.training must be one of 'lora', 'full', got 'half'"),
        (
            edited("adapter", "granularity", value="head"),
            "adapter.granularity must be one of 'kind', 'component', got",
        ),
        (edited("adapter", "units", value=[]), r"adapter.units must have at least 1 item, got \[\]"),
        (edited("adapter", "units", 0, value="MHA\x1b[2J"), r"adapter.units.0 must be printable text, got 'MHA\\x1b"),
        (edited("adapter", "modules", 0, value=5), "adapter.modules.0 must be a valid string, got 5"),
        (edited("adapter", "parameters", "lora"), "adapter.parameters must have the keys 'lora' and 'full', got"),
        (edited("adapter", "parameters", "lora", value=-1), "parameters.lora must be greater than or equal to 0, got"),
        (edited("adapter", "id2label", value={"x": "cat"}), "adapter.id2label.x must be a valid integer"),
        (edited("adapter", "id2label", "0", value=5), "adapter.id2label.0 must be a valid string, got 5"),
        (edited("results", value=3), "results must be a valid array, got 3"),
        (edited("results", 0, "metrics", "accuracy", value="x"), "results.0.metrics.accuracy must be a valid number"),
        (edited("results", 0, "metrics", value={"": 1}), "results.0.metrics must have at least 1 character, got ''"),
        (edited("results", 0, "weights", value="x"), "results.0.weights must have at least 64 characters, got 'x'"),
        (
            edited("results", 0, "dataset", "repo_id", value="/home/me"),
            "repo_id must be the id of a dataset on the Hub",
        ),
        (edited("results", 0, "dataset", "images", value=0), "images must be greater than or equal to 1, got 0"),
        (edited("scores", 1, "kind", value="\x1b[2J"), r"scores.1.kind must be one of .*, got '\\x1b\[2J'"),
        (edited("format_version", value=99), "it has format version 99"),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(values: dict[str, Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "plasticity.json").write_text(json.dumps(values))
    with pytest.raises(ReportError, match=rf"Cannot read plasticity.json of .*: (\w+\.)*{text}") as raised:
        AdapterRecord.read(tmp_path)
    assert str(raised.value).isprintable()


def test_results_end_with_the_weights_they_belong_to(tmp_path: Path) -> None:
    other = make_results({"accuracy": 0.75}, "digits", "train", WEIGHTS)
    better = make_results({"accuracy": 1.0}, "digits", "test", WEIGHTS)
    of_old_weights = make_results({"accuracy": 0.25}, "birds", None, digest(b"old"))
    record = replace(RECORD, results=(RESULTS, other, of_old_weights)).with_results(better)
    assert record.results == (other, better)
    record.write(tmp_path)
    assert present_results(tmp_path) == ()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    assert present_results(tmp_path) == (other, better)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"trained further")
    assert present_results(tmp_path) == ()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "plasticity.json").write_text("damaged")
    assert present_results(tmp_path) == ()
    assert present_results(tmp_path / "missing") == ()


def test_numbers_of_other_packages_are_metrics() -> None:
    import numpy as np

    results = make_results({"accuracy": np.float32(0.5), "count": np.int64(3)}, "user/birds", None, WEIGHTS)
    assert results.metrics == {"accuracy": 0.5, "count": 3.0}
    assert {type(value) for value in results.metrics.values()} == {float}
    assert results.dataset.repo_id == "user/birds"
    assert isinstance(results, Results)
    with pytest.raises(ConfigError, match=r"metrics.accuracy must be a valid number, got True\."):
        make_results({"accuracy": True}, "digits", None, WEIGHTS)


def test_one_module_names_the_file_and_three_use_the_name() -> None:
    package = REPOSITORY / "plasticity_peft"
    named, used = set(), set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value == "plasticity.json":
                named.add(path.name)
            if isinstance(node, ast.Name) and node.id == "REPORT_NAME":
                used.add(path.name)
    assert named == {"hub.py"}
    assert used == {"hub.py", "record.py", "report.py"}
