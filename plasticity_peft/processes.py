"""Several processes that measure one model: who does what, and one answer for all.

Processes are those of Accelerate: `accelerate launch` or `torchrun` start them. Without a launcher there is one, and
nothing of Accelerate is set up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from plasticity_peft.errors import PlasticityError
from plasticity_peft.moments import Moments


class Share(NamedTuple):
    """This process among all."""

    rank: int
    world_size: int


def this_process() -> Share:
    """Returns the place of this process among those that a launcher started; (0, 1) without a launcher."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if PartialState._shared_state or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        return Share(state.process_index, state.num_processes)
    return Share(0, 1)


def merge_over_processes(measure: Callable[[Share], tuple[Moments, int]]) -> tuple[Moments, int]:
    """Returns (moments, skipped pairs) of all processes together, the same in each, in the order of the processes.

    `measure` does the share of this process. Where it raises in any process, all raise, so that none waits for ever.
    """
    share = this_process()
    if share.world_size == 1:
        return measure(share)
    from accelerate.utils import gather_object

    error: Exception | None = None
    result: tuple[Moments, int] | str
    try:
        result = measure(share)
    except Exception as failure:
        error, result = failure, f"process {share.rank} of {share.world_size}: {type(failure).__name__}: {failure}"
    results = gather_object([result])
    if error is not None:
        raise error
    failures = [found for found in results if isinstance(found, str)]
    if failures:
        raise PlasticityError("Measuring failed in another process. " + "; ".join(failures))
    merged, skipped = results[0]
    for moments, more in results[1:]:
        merged, skipped = merged.merge(moments), skipped + more
    return merged, skipped
