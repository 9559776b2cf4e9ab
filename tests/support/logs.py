"""What is logged, whatever handlers there are already."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from plasticity_peft.report.report import _warn_once


@contextmanager
def warned_of_selections() -> Iterator[list[str]]:
    """Yields the warnings, as they come, that a selection is not settled; those of before are forgotten."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.plasticity_peft.report.report")
    logger.addHandler(handler)
    _warn_once.cache_clear()
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
