"""Several processes that measure one model: who does what, and one answer for all.

Processes are those of Accelerate: `accelerate launch` or `torchrun` start them. Without a launcher there is one, and
nothing of Accelerate is set up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from plasticity_peft.errors import PlasticityError

T = TypeVar("T")


class Share(NamedTuple):
    """This process among all."""

    rank: int
    world_size: int

    def of(self, numbers: range) -> range:
        """Returns what falls to this process: every `world_size`-th number."""
        return numbers[self.rank :: self.world_size]


def this_process() -> Share:
    """Returns the place of this process among those that a launcher started; (0, 1) without a launcher."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if PartialState._shared_state or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        return Share(state.process_index, state.num_processes)
    return Share(0, 1)


def in_step(share: Share, work: Callable[[], T]) -> list[T]:
    """Does `work` in every process, and returns what all returned, in the order of the processes: the same in each.

    Where it raises in any process, all raise, so that none waits for ever: that process its own error, the others a
    PlasticityError with the message. What `work` returns goes to all others, and should be small.
    """
    if share.world_size == 1:
        return [work()]
    from accelerate.utils import gather_object

    error: Exception | None = None
    result: tuple[bool, T | str]
    try:
        result = (True, work())
    except Exception as failure:
        error = failure
        result = (False, f"process {share.rank} of {share.world_size}: {type(failure).__name__}: {failure}")
    results: list[tuple[bool, T]] = gather_object([result])
    if error is not None:
        raise error
    failures = [str(message) for succeeded, message in results if not succeeded]
    if failures:
        raise PlasticityError("Measuring failed in another process. " + "; ".join(failures))
    return [found for _, found in results]
