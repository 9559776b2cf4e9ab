"""Failures at every place: an exception at the n-th call of a Python function of given files, by a profile function.

Every function, hook, lambda and resumed generator counts, so that whatever a measurement does can fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

LEFT_EARLY = ("<genexpr>", "walk", "_deal", "_matching")
"""Generators that are left early, and then resumed to be closed: no exception can leave them then."""


class InjectedError(Exception):
    """What is raised at the chosen call."""


class Injection:
    """Counts calls, and raises at one of them."""

    def __init__(self, parts: tuple[str, ...], at: int | None) -> None:
        self.parts, self.at = parts, at
        self.count = 0
        self.place = ""
        self._known: dict[Any, bool] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        wanted = self._known.get(code)
        if wanted is None:
            wanted = code.co_name not in LEFT_EARLY and any(part in code.co_filename for part in self.parts)
            self._known[code] = wanted
        if not wanted:
            return
        self.count += 1
        if self.count == self.at:
            self.place = f"{code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {code.co_name}"
            raise InjectedError(self.place)


@contextmanager
def injected(parts: tuple[str, ...], at: int | None) -> Iterator[Injection]:
    """Inside, call number `at` (from 1) of functions in files whose path holds one of `parts` raises; None: none."""
    injection = Injection(parts, at)
    before = sys.getprofile()
    sys.setprofile(injection)
    try:
        yield injection
    finally:
        sys.setprofile(before)


def calls(parts: tuple[str, ...], work: Callable[[], Any]) -> int:
    """Returns how many such calls `work` makes."""
    with injected(parts, None) as injection:
        work()
    return injection.count
