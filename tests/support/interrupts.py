"""Interrupts at every line or bytecode: KeyboardInterrupt where a signal may bring it, by a trace function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from tests.support.injection import LEFT_EARLY


class Interrupter:
    """Counts lines or bytecodes of functions in files whose path holds one of `parts`, and interrupts at one of them.

    Generators that are left early are passed over: they are resumed to be closed, and nothing can leave them then.
    """

    def __init__(self, parts: tuple[str, ...], at: int | None, opcodes: bool) -> None:
        self.parts, self.at, self.opcodes = parts, at, opcodes
        self.places: dict[tuple[CodeType, int], list[int]] = {}
        """First and last number of each place, a line or a bytecode."""
        self.count, self.place = 0, ""
        self._known: dict[CodeType, bool] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        wanted = self._known.get(code)
        if wanted is None:
            wanted = code.co_name not in LEFT_EARLY and any(part in code.co_filename for part in self.parts)
            self._known[code] = wanted
        if not wanted:
            return None
        frame.f_trace_opcodes = self.opcodes
        return self._trace

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event != ("opcode" if self.opcodes else "line"):
            return self._trace
        self.count += 1
        if self.at is None:
            place = (frame.f_code, frame.f_lasti if self.opcodes else frame.f_lineno)
            self.places.setdefault(place, [self.count, self.count])[1] = self.count
        elif self.count == self.at:
            self.place = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
            raise KeyboardInterrupt(self.place)
        return self._trace


@contextmanager
def interrupted(parts: tuple[str, ...], at: int | None, opcodes: bool = False) -> Iterator[Interrupter]:
    """Inside, line or bytecode number `at` (from 1) is where an interrupt comes; None: none comes."""
    interrupter, before = Interrupter(parts, at, opcodes), sys.gettrace()
    sys.settrace(interrupter)
    try:
        yield interrupter
    finally:
        sys.settrace(before)


def moments(parts: tuple[str, ...], work: Callable[[], Any], opcodes: bool = False) -> list[int]:
    """Returns numbers of lines or bytecodes of `work`: the first and the last time that each place is reached."""
    with interrupted(parts, None, opcodes) as interrupter:
        work()
    return sorted({number for both in interrupter.places.values() for number in both})
