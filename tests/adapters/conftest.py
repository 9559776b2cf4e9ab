"""Adapters are saved by the hundred here."""

from __future__ import annotations

from tests.support.pictures import one_picture_is_drawn  # noqa: F401
