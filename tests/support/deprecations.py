"""Deprecations that are errors beside those that pytest sees: in the logs of libraries, and in other processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

LIBRARIES = ("transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub")
DEPRECATION = re.compile(r"deprecat|will be removed in", re.IGNORECASE)

IN_OTHER_PROCESSES = ",".join(
    [
        "error::DeprecationWarning",
        "error::PendingDeprecationWarning",
        "error::FutureWarning",
        # As in pyproject.toml, where the reason is. Its words are nobody else's: Python drops the second of two equal
        # options, and so one of `-W` that stands after `-W error`.
        "ignore:`is_gradient_checkpointing` is:FutureWarning",
    ]
)
"""PYTHONWARNINGS of what tests start. Other warnings are the user's to see there, such as that of a norm that ranks
high."""


class Log(logging.Handler):
    """Keeps the deprecations among what a library logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if DEPRECATION.search(record.getMessage()):
            self.messages.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def no_deprecation_is_logged() -> Iterator[Log]:
    """Fails a test during which a library logs a deprecation: transformers warns in its log, once a process."""
    log = Log()
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(log)
    yield log
    for name in LIBRARIES:
        logging.getLogger(name).removeHandler(log)
    assert not log.messages, "; ".join(log.messages)
