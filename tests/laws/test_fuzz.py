"""Damaged files: an error of ours or something that works, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fuzz import fuzz
from tests.support.processes import python


def test_a_few_damaged_files() -> None:
    found = fuzz(200, seed=1)
    assert not found["failures"], found["failures"][0]
    outcomes = " ".join(found["counts"])
    for outcome in ("report_values: accepted", "report_file: ReportError", "adapter: loaded", "adapter: AdapterError"):
        assert outcome in outcomes, outcomes


def test_the_fuzzer_sees_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that forgets a kind of damage is found out."""
    monkeypatch.setattr("plasticity_peft.report.report.PlasticityReport.check", lambda self: None)
    assert fuzz(200, seed=2)["failures"]


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files(tmp_path: Path) -> None:
    result = python("-m", "tests.support.fuzz", "--inputs", "100000", "--keep", tmp_path, timeout=7200)
    assert result.returncode == 0, result.stdout + result.stderr
