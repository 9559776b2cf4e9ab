"""One picture for all model cards, where these are written by the dozen: drawing takes longer than all the rest."""

from __future__ import annotations

from functools import cache

import pytest

from plasticity_peft import measure_plasticity
from plasticity_peft.report.plotting import png
from tests.support.models import tiny_model


@cache
def picture() -> bytes:
    return png(measure_plasticity(tiny_model(), criterion="bound"))


@pytest.fixture(autouse=True)
def one_picture_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every card gets the same picture. Those of tests/report and tests/saved are drawn of their own reports."""
    monkeypatch.setattr("plasticity_peft.card._png", lambda report, selection: picture())
