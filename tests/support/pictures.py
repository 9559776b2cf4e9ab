"""One picture for all model cards, where these are written by the dozen, and pages without the scripts that draw."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace

import pytest

from plasticity_peft import measure_plasticity
from plasticity_peft.report.page import as_page, library
from plasticity_peft.report.plotting import png
from tests.support.models import tiny_model


@cache
def picture() -> bytes:
    return png(measure_plasticity(tiny_model(), criterion="bound"))


@pytest.fixture
def pages_have_no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages are written as with the extra `html`, but for the scripts that it brings, which take seconds."""
    monkeypatch.setitem(sys.modules, "vl_convert", SimpleNamespace(javascript_bundle=lambda own: own))
    monkeypatch.setattr("plasticity_peft.card._page", as_page)  # as_page, which forgets what it wrote
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(autouse=True)
def one_picture_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every card gets the same picture. Those of tests/report and tests/saved are drawn of their own reports."""
    monkeypatch.setattr("plasticity_peft.card._png", lambda report, selection: picture())
