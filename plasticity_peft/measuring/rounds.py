"""The loop: batches through a criterion into moments, round by round over all processes, until a choice is settled.

A round ends where one looks at the ranking: after 32, 64, 128, ... observations, whatever the number of processes and
the size of a batch, so that all stop at the same place with the same answer. What the processes tell each other is
their moments, once a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from transformers.utils import logging

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.errors import DataError, ModelError, NonFiniteError
from plasticity_peft.images.sampler import Probe
from plasticity_peft.measuring.moments import Moments
from plasticity_peft.measuring.processes import Share, in_step
from plasticity_peft.measuring.settling import Settling, looks
from plasticity_peft.report.selection import Choice

# Below the logger of transformers, so that its verbosity, set once, holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """What all processes observed together."""

    moments: Moments
    """Columns: the components in the order of the architecture, then the kinds: the mean over blocks, observation by
    observation, whose spread is the uncertainty of a kind; then the differences of the units to choose from."""
    skipped: int
    """Pairs that were left out because they have no value."""
    settled: bool = False


@dataclass(frozen=True)
class Table:
    """Which column belongs to what."""

    architecture: Architecture
    rule: Criterion
    settling: Settling

    @cached_property
    def names(self) -> list[str]:
        """Names of the columns that are scores."""
        return [*(part.id for part in self.architecture.components), *KINDS]

    @property
    def columns(self) -> int:
        """How many columns there are."""
        units = len(self.settling.choice.units)
        return len(self.names) + units * (units - 1) // 2

    def moments(self, values: torch.Tensor) -> Moments:
        """Returns the moments of some observations: float64 (observations, components)."""
        seen = values.detach().cpu().numpy()
        of_kinds = seen.reshape(len(seen), len(self.architecture.blocks), len(KINDS)).mean(axis=1)
        scores = np.concatenate([seen, of_kinds], axis=1)
        differences = self.settling.differences(scores[:, self._units] * np.sign(self.rule.power))
        return Moments.of(np.concatenate([scores, differences], axis=1))

    def ranking(self, moments: Moments) -> list[str]:
        """Returns the units to choose from, best first."""
        means = moments.mean[self._units] * np.sign(self.rule.power)
        return [self.settling.choice.units[number] for number in np.argsort(-means, kind="stable")]

    def settled(self, moments: Moments) -> bool:
        """Returns whether what would be chosen differs from the rest."""
        first = len(self.names)
        differences = Moments(moments.count, moments.mean[first:], moments.m2[first:])
        return self.settling.settled(self.ranking(moments), differences)

    @cached_property
    def _units(self) -> list[int]:
        return [self.names.index(unit) for unit in self.settling.choice.units]


def observe_until_settled(
    observe: Callable[[Any], Observations], table: Table, probe: Probe, share: Share, stop_early: bool
) -> Seen:
    """Returns what all processes observe, the same in each.

    Args:
        observe: what the criterion prepared.
        table: the columns of the moments, and what is to be chosen.
        probe: the images.
        share: this process among all.
        stop_early: False to look at all images, whatever is settled.
    """
    observed = table.rule.observed
    worker = _Worker(observe, table, probe)
    moments, skipped, settled, start = Moments.of(np.empty((0, table.columns))), 0, False, 0
    with _Progress(probe.planned(observed), observed, share) as progress:
        for stop in looks(probe.planned(observed), observed):

            def work(start: int = start, stop: int = stop) -> tuple[int, Moments, int]:
                reached = probe.available(observed, stop)
                return reached, *worker.look_at(share.of(range(start, reached)), progress)

            parts = in_step(share, work)
            start = check_same(f"number of {observed}", [reached for reached, _, _ in parts])
            for _, more, left_out in parts:
                moments, skipped = moments.merge(more), skipped + left_out
            settled = table.settled(moments)
            progress.show(start, table.ranking(moments), table.settling.choice)
            if (settled and stop_early) or start < stop:
                break
        progress.end()
    return Seen(moments, skipped, settled)


def check_same(what: str, values: list[T]) -> T:
    """Returns the value that all processes have. Raises DataError where they differ."""
    if any(value != values[0] for value in values):
        raise DataError(
            f"The processes must measure the same model on the same data, which plasticity_peft spreads over them. "
            f"They differ in {what}: {', '.join(map(str, values))}."
        )
    return values[0]


class _Worker:
    """Observes in this process, with batches that are halved where memory does not suffice."""

    def __init__(self, observe: Callable[[Any], Observations], table: Table, probe: Probe) -> None:
        self._observe, self._table = observe, table
        self._observed = table.rule.observed
        self._load: Callable[[Sequence[int]], Any] = {
            "pairs": probe.pairs, "images": probe.images, "batches": probe.batches
        }[self._observed]  # fmt: skip
        self._batch_size = 1 if self._observed == "batches" else probe.batch_size
        self._images = probe.batch_size

    def look_at(self, numbers: range, progress: _Progress) -> tuple[Moments, int]:
        """Returns the moments of what is observed, and how many pairs were skipped."""
        moments, skipped, done = Moments.of(np.empty((0, self._table.columns))), 0, 0
        while done < len(numbers):
            batch = numbers[done : done + self._batch_size]
            # Not Accelerate's find_executable_batch_size: it collects garbage before it begins, here in every round,
            # which takes longer than a round of a small model.
            try:
                values, left_out = self._observe(self._load(batch))
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                values = None
            if values is None:  # here the error no longer holds what was in memory
                clear_device_cache(garbage_collection=True)
                self._halve()
                continue
            check_finite(self._table, values)
            moments, skipped = moments.merge(self._table.moments(values)), skipped + left_out
            done += len(batch)
            progress.advance(len(batch))
        return moments, skipped

    def _halve(self) -> None:
        smaller = self._batch_size // 2
        if smaller == 0:
            whole = self._observed == "batches"  # its value is that of the batch as a whole
            raise ModelError(
                f"Out of memory for {f'a batch of {self._images} images' if whole else f'one of the {self._observed}'}"
                f", by criterion={self._table.rule.name!r}. Give {'a smaller batch_size, ' if whole else ''}smaller "
                'images, or dtype="bfloat16".'
            )
        self._batch_size = smaller
        logger.warning("Out of memory: measuring goes on with %s %s in a pass.", self._batch_size, self._observed)


def check_finite(table: Table, values: torch.Tensor) -> None:
    """Raises NonFiniteError where a value is NaN or infinite; the message names the component."""
    columns = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
    if columns:
        part = table.architecture.components[columns[0]]
        raise NonFiniteError(
            f"The {table.rule.name} of {part.id} ({part.path}) is NaN or infinite. In half precision this is often "
            "overflow: measure the model in float32 or bfloat16."
        )


class _Progress:
    """A progress bar on the first process, for all; off where those of transformers or huggingface_hub are."""

    def __init__(self, total: int, observed: str, share: Share) -> None:
        self._shown, self._share = 0, share
        self._bar = logging.tqdm(
            total=total,
            desc="Measuring plasticity",
            unit={"pairs": "pair", "images": "image", "batches": "batch"}[observed],
            disable=share.rank > 0 or are_progress_bars_disabled(),
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, number: int) -> None:
        """Shows that this process, and probably each, did `number` more."""
        self._to(self._shown + number * self._share.world_size)

    def show(self, number: int, ranking: Sequence[str], choice: Choice) -> None:
        """Shows that all together did `number`, and what they would choose."""
        self._to(number)
        self._bar.set_postfix_str(f"chosen so far: {', '.join(choice.chosen(ranking))}")

    def end(self) -> None:
        """Shows that no more is needed."""
        self._bar.total = self._shown
        self._bar.refresh()

    def _to(self, number: int) -> None:
        self._bar.update(number - self._shown)
        self._shown = number
