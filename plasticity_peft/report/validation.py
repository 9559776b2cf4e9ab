"""What a report that others wrote may say, beyond the types of its values.

Numbers that no measurement gives, and text that would do something to the terminal it is printed on, are refused, so
that whatever works on a report that was measured works on one that was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plasticity_peft.checks import GRANULARITIES, HIGHEST_SEED, shown
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ReportError

HIGHEST_COUNT = 2**63 - 1
LONGEST_TEXT = 1000


def check_believable(report: Any) -> None:
    """Raises ReportError where a value of a PlasticityReport, whose types are right, cannot have been measured."""
    for name, count, lowest, highest in _counts(report):
        if not lowest <= count <= highest:
            raise ReportError(f"{name}: expected {lowest} to {highest}, got {shown(count)}")
    for name, text in _texts(report):
        if not text.isprintable() or len(text) > LONGEST_TEXT:
            raise ReportError(f"{name}: expected printable text of up to {LONGEST_TEXT} characters, got {shown(text)}")
    if report.input_std is not None and report.input_std < 0:
        raise ReportError(f"input_std: expected a number of at least 0, got {report.input_std}")
    for row in report.scores:
        if not row.modules:
            raise ReportError(f"{row.id}: expected the paths of its modules, got none")
    if report.ending:
        _check_ending(report)


def _check_ending(report: Any) -> None:
    if report.ending.granularity not in GRANULARITIES:
        raise ReportError(f"ending.granularity: expected one of {', '.join(GRANULARITIES)}")
    ids = KINDS if report.ending.granularity == "kind" else tuple(row.id for row in report.scores)
    unknown = [unit for unit in report.ending.units if unit not in ids]
    if unknown:
        raise ReportError(f"ending.units: {shown(unknown[0])} is no {report.ending.granularity} of this report")


def _counts(report: Any) -> Iterator[tuple[str, int, int, int]]:
    """Yields (name, value, lowest, highest) of all whole numbers."""
    yield "pairs", report.pairs, 0, HIGHEST_COUNT
    yield "skipped", report.skipped, 0, HIGHEST_COUNT
    yield "seed", report.seed, 0, HIGHEST_SEED
    yield "model_parameters", report.model_parameters, sum(row.parameters for row in report.scores), HIGHEST_COUNT
    for row in report.scores:
        yield f"{row.kind}.parameters", row.parameters, 1, HIGHEST_COUNT
        for width in (width for widths in row.features for width in widths):
            yield f"{row.kind}.features", width, 1, HIGHEST_COUNT
    if report.ending:
        yield "ending.most", report.ending.most, 0, HIGHEST_COUNT


def _texts(report: Any) -> Iterator[tuple[str, str]]:
    """Yields (name, value) of all text that is printed or looked up."""
    yield from (("model_type", report.model_type), ("criterion", report.criterion), ("title", report.title))
    for row in report.scores:
        yield "path", row.path
        yield from (("modules", path) for path in row.modules)
    for package, version in report.versions.items():
        yield from (("versions", package), ("versions", version))
