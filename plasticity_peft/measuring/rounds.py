"""The loop of a measurement: samples go through a criterion, round by round, until the selection is settled.

A round ends when the ranking is examined: after 32, 64, 128, ... samples. This does not depend on the number of
processes or the size of a pass, so all processes stop at the same sample with the same result. They exchange moments
once per round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from transformers.utils import logging

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.criteria.criterion import AnyCriterion, Observations
from plasticity_peft.errors import ModelError, NonFiniteError
from plasticity_peft.images.sampler import Batches, Sampler
from plasticity_peft.measuring.moments import Moments
from plasticity_peft.measuring.processes import Share, failing_together, gathered, same
from plasticity_peft.measuring.settling import Settling, looks
from plasticity_peft.report.selection import Choice

# A child of the logger of transformers, so that its verbosity applies here too.
logger = logging.get_logger(f"transformers.{__name__}")

Observe = Callable[[Any], Observations]
"""The return type of `Criterion.prepare`."""


@dataclass(frozen=True)
class Seen:
    """The observations of all processes together."""

    moments: Moments
    """The columns are the components in the order of the architecture, the kinds, and the differences of the units to
    select from. A kind is the mean over blocks of each sample, and its standard deviation is over samples."""
    skipped: int
    """Number of samples that were skipped because they have no value."""
    settled: bool = False


@dataclass(frozen=True)
class Columns:
    """The columns of the moments, and the selection that follows from them."""

    architecture: Architecture
    criterion: AnyCriterion
    settling: Settling

    @cached_property
    def names(self) -> list[str]:
        """Names of the columns that are scores."""
        return [*(component.id for component in self.architecture.components), *KINDS]

    @property
    def count(self) -> int:
        """Number of columns."""
        units = len(self.settling.choice.units)
        return len(self.names) + units * (units - 1) // 2

    def moments(self, values: torch.Tensor) -> Moments:
        """Returns the moments of some observations: float64 of shape (samples, components)."""
        seen = values.detach().cpu().numpy()
        of_kinds = seen.reshape(len(seen), len(self.architecture.blocks), len(KINDS)).mean(axis=1)
        scores = np.concatenate([seen, of_kinds], axis=1)
        differences = self.settling.differences(scores[:, self._units] * np.sign(self.criterion.power))
        return Moments.of(np.concatenate([scores, differences], axis=1))

    def ranking(self, moments: Moments) -> list[str]:
        """Returns the units to select from, best first."""
        means = moments.mean[self._units] * np.sign(self.criterion.power)
        return [self.settling.choice.units[number] for number in np.argsort(-means, kind="stable")]

    def settled(self, moments: Moments) -> bool:
        """Returns whether the units that would be selected are separated from the others."""
        first = len(self.names)
        differences = Moments(moments.count, moments.mean[first:], moments.m2[first:])
        return self.settling.settled(self.ranking(moments), differences)

    def check_finite(self, values: torch.Tensor) -> None:
        """Raises NonFiniteError, which names the component, if a value is NaN or infinite."""
        wrong = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
        if wrong:
            component = self.architecture.components[wrong[0]]
            raise NonFiniteError(
                f"The {self.criterion.name} of {component.id} ({component.path}) is NaN or infinite. In half "
                "precision this is often overflow: measure the model in float32 or bfloat16."
            )

    @cached_property
    def _units(self) -> list[int]:
        return [self.names.index(unit) for unit in self.settling.choice.units]


def observe_until_settled(
    observe: Observe, columns: Columns, sampler: Sampler, share: Share, stop_early: bool
) -> Seen:
    """Returns the observations of all processes together, the same in each.

    Args:
        observe: the function that the criterion prepared.
        columns: the columns of the moments, and the rule of the selection.
        sampler: the samples.
        share: the place of this process.
        stop_early: False to use all samples, even if the selection is settled earlier.
    """
    worker = _Worker(observe, columns, sampler)
    moments, skipped, settled, start = Moments.of(np.empty((0, columns.count))), 0, False, 0
    with Progress(sampler, share) as progress:
        for stop in looks(sampler.planned(), sampler.first_look):
            with failing_together(share):
                reached = sampler.available(stop)
                seen = worker.look_at(share.of(range(start, reached)), progress)
            start = same(share, f"number of {sampler.plural}", reached)
            for more, left_out in gathered(share, seen):
                moments, skipped = moments.merge(more), skipped + left_out
            settled = columns.settled(moments)
            progress.show(start, columns.ranking(moments), columns.settling.choice)
            if (settled and stop_early) or start < stop:
                break
        progress.end()
    return Seen(moments, skipped, settled)


class _Worker:
    """Observes in this process. The size of a pass is halved if memory runs out."""

    def __init__(self, observe: Observe, columns: Columns, sampler: Sampler) -> None:
        self._observe, self._columns, self._sampler = observe, columns, sampler
        self._per_pass = sampler.per_pass

    def look_at(self, numbers: Sequence[int], progress: Progress) -> tuple[Moments, int]:
        """Returns the moments of the samples with these numbers, and how many samples were skipped."""
        numbers = self._sampler.arranged(numbers)
        moments, skipped, done = Moments.of(np.empty((0, self._columns.count))), 0, 0
        while done < len(numbers):
            batch = self._sampler.alike(numbers[done : done + self._per_pass])
            # Accelerate's find_executable_batch_size is not used, as it collects garbage at its start, here in every
            # round, which takes longer than a round of a small model.
            try:
                values, left_out = self._observe(self._sampler.load(batch))
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                values = None
            if values is None:  # the error, which keeps tensors alive, is gone here
                clear_device_cache(garbage_collection=True)
                self._halve()
                continue
            self._columns.check_finite(values)
            moments, skipped = moments.merge(self._columns.moments(values)), skipped + left_out
            done += len(batch)
            progress.advance(len(batch))
        return moments, skipped

    def _halve(self) -> None:
        smaller, sampler = self._per_pass // 2, self._sampler
        if smaller == 0:
            whole = isinstance(sampler, Batches)  # the value of a batch is that of the batch as a whole
            what = f"a batch of {sampler.batch_size} images" if whole else f"one {sampler.singular}"
            raise ModelError(
                f"Out of memory for {what}, by criterion={self._columns.criterion.name!r}. Use "
                f'{"a smaller batch_size, " if whole else ""}smaller images, or dtype="bfloat16".'
            )
        self._per_pass = smaller
        logger.warning("Out of memory: measuring continues with %s %s per pass.", smaller, sampler.plural)


class Progress:
    """A progress bar of all processes, in the first one, unless transformers or huggingface_hub disable theirs."""

    def __init__(self, sampler: Sampler, share: Share, description: str = "Measuring plasticity") -> None:
        self._shown, self._share = 0, share
        self._bar = logging.tqdm(
            total=sampler.planned(),
            desc=description,
            unit=sampler.singular,
            disable=share.rank > 0 or are_progress_bars_disabled(),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, number: int) -> None:
        """Shows that this process, and probably each of the others, observed `number` more samples."""
        self._to(self._shown + number * self._share.world_size)

    def show(self, number: int, ranking: Sequence[str], choice: Choice) -> None:
        """Shows that all processes together observed `number` samples, and what they would select."""
        self._to(number)
        self._bar.set_postfix_str(f"selected so far: {', '.join(choice.chosen(ranking))}")

    def end(self) -> None:
        """Shows that no more samples are needed."""
        self._bar.total = self._shown
        self._bar.refresh()

    def _to(self, number: int) -> None:
        self._bar.update(number - self._shown)
        self._shown = number
