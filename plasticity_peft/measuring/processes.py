"""Several processes that measure one model together: how they share the work, and how they agree on the result.

The processes are those of Accelerate, started by `accelerate launch` or `torchrun`. Without a launcher there is one
process, and Accelerate is not set up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np

from plasticity_peft.errors import ConfigError, DataError, PlasticityError

T = TypeVar("T")


class Share(NamedTuple):
    """The place of this process among all processes."""

    rank: int
    world_size: int

    def of(self, numbers: range) -> range:
        """Returns the numbers for this process: every `world_size`-th one."""
        return numbers[self.rank :: self.world_size]


def this_process() -> Share:
    """Returns the place of this process among those that a launcher started; (0, 1) without a launcher.

    Raises:
        ConfigError: a launcher started several processes, and Accelerate takes each of them for the only one.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Schedulers of clusters set WORLD_SIZE alone, also for programs that are one process.
    started = int(os.environ.get("WORLD_SIZE", "1")) if {"RANK", "LOCAL_RANK"} & os.environ.keys() else 1
    if not PartialState._shared_state and started == 1:
        return Share(0, 1)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes == 1 < started and "LOCAL_RANK" in os.environ:
        raise ConfigError(
            f"A launcher started {started} processes, and Accelerate found no accelerator by which they could work "
            "together: each would do the work of all. On CPUs, set the environment variable ACCELERATE_USE_CPU=1."
        )
    return Share(state.process_index, state.num_processes)


@contextmanager
def failing_together(share: Share) -> Iterator[None]:
    """Inside, every process works on its own. If one of them fails, all of them raise, so that none hangs.

    The number of errors is exchanged, and their messages if there are any.

    Raises:
        Exception: in the process that failed: its own error.
        PlasticityError: in the other processes: an error with the message of that error.
    """
    if share.world_size == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    if not summed(share, np.array(error is not None))[0]:
        return
    message = None if error is None else f"process {share.rank} of {share.world_size}: {type(error).__name__}: {error}"
    messages = [found for found in gathered(share, message) if found is not None]
    if error is not None:
        raise error
    raise PlasticityError("Measuring failed in another process. " + "; ".join(messages))


def gathered(share: Share, value: T) -> list[T]:
    """Returns the values of all processes, in rank order and the same in each.

    Each process receives the values of all others, so values should be small. `summed` is for what can be added.

    Raises:
        PlasticityError: a process has ended, or has not answered for as long as the others wait.
    """
    if share.world_size == 1:
        return [value]
    from accelerate.utils import gather_object

    with _not_in_vain(share):
        found: list[T] = gather_object([value])
    return found


def summed(share: Share, *arrays: np.ndarray) -> list[np.ndarray]:
    """Returns the sum of each array over all processes, as float64 and the same in each.

    What a process sends and receives is at most twice the size of the arrays, however many processes there are.

    Raises:
        PlasticityError: a process has ended, or has not answered for as long as the others wait.
    """
    if share.world_size == 1:
        return list(arrays)
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    flat = np.concatenate([np.asarray(array, dtype=np.float64).reshape(-1) for array in arrays])
    with _not_in_vain(share):
        total = reduce(torch.from_numpy(flat).to(PartialState().device), "sum").cpu().numpy()
    parts = np.split(total, np.cumsum([array.size for array in arrays])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def pooled(
    share: Share, count: int, mean: np.ndarray, around: Callable[[np.ndarray], tuple[np.ndarray, ...]]
) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """Returns the count and the mean of what all processes observed, and sums of products of distances from that mean.

    Args:
        share: the place of this process.
        count: number of observations of this process, which may be 0.
        mean: their mean, of shape (k,).
        around: returns the sums of this process for distances from any mean.
    """
    *total, observations = summed(share, np.append(mean * count, count))[0]
    common = np.asarray(total) / max(observations, 1.0)
    return int(observations), common, summed(share, *around(common))


@contextmanager
def _not_in_vain(share: Share) -> Iterator[None]:
    """Inside, an error of the exchange is one of this package, which says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise PlasticityError(
            f"Process {share.rank} of {share.world_size} waited in vain for the results of the others. One has ended, "
            "has stopped, or works longer than the others wait. The command line and train.py set how long with "
            "--ddp_timeout, and a script with timeout=... of Accelerate's InitProcessGroupKwargs or of torch's "
            f"init_process_group. ({error})"
        ) from error


def same(share: Share, what: str, value: T) -> T:
    """Returns `value` if all processes have the same value.

    Raises:
        DataError: the values differ; `what` is the name of the value in the message.
    """
    values = gathered(share, value)
    if any(other != value for other in values):
        raise DataError(
            f"The processes must measure the same model on the same data, which plasticity_peft spreads over them. "
            f"They differ in {what}: {', '.join(map(str, values))}."
        )
    return value
