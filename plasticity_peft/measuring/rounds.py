"""The loop of a measurement: samples go through a criterion, round by round, until the selection is settled.

A round ends when the ranking is examined: after 32, 64, 128, ... samples. This does not depend on the number of
processes or the size of a pass, so all processes stop at the same sample with the same result. They exchange sums of
what they observed once per round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from transformers.utils import logging

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.criteria.criterion import AnyCriterion, Observations, WeightCriterion
from plasticity_peft.errors import NonFiniteError
from plasticity_peft.images.sampler import Sampler
from plasticity_peft.measuring.passes import Passes
from plasticity_peft.measuring.processes import Share, failing_together, same, summed
from plasticity_peft.measuring.settling import Settling, distances, looks
from plasticity_peft.measuring.sharing import Observed, Spread
from plasticity_peft.report.confidence import MOST_COMPONENTS, Separation
from plasticity_peft.report.selection import Choice

Observe = Callable[[Any], Observations]
"""The return type of `Criterion.prepare`."""


@dataclass(frozen=True)
class Seen:
    """The observations of all processes together."""

    observed: Observed
    """Columns: the components in the order of the architecture; the kinds, each the mean over blocks sample by sample,
    whose spread is the uncertainty of a kind, because blocks share their samples."""
    skipped: int
    """Number of samples that were skipped because they have no value."""
    settled: bool = False


@dataclass(frozen=True)
class Columns:
    """The components and kinds, and what the observations say about a selection of them."""

    architecture: Architecture
    criterion: AnyCriterion
    settling: Settling

    @cached_property
    def ids(self) -> list[str]:
        """Canonical ids of the components."""
        return [component.id for component in self.architecture.components]

    @cached_property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [*self.ids, *KINDS]

    def nothing(self) -> Observed:
        """Returns the state before anything is observed."""
        return Observed.of(np.empty((0, len(self.names))), np.empty((0, 0), dtype=np.int64))

    def observed(self, values: torch.Tensor, keys: np.ndarray) -> Observed:
        """Returns the state after some observations of the components: float64 of shape (samples, components)."""
        seen = values.detach().cpu().numpy()
        of_kinds = seen.reshape(len(seen), len(self.architecture.blocks), len(KINDS)).mean(axis=1)
        return Observed.of(np.concatenate([seen, of_kinds], axis=1), keys)

    def spread(self, observed: Observed) -> Spread:
        """Returns the spread of the means of all columns."""
        if isinstance(self.criterion, WeightCriterion):
            return Spread(np.zeros_like(observed.moments.m2), np.inf)
        return Spread.of(observed)

    def ranking(self, observed: Observed) -> list[str]:
        """Returns the units to select from, best first."""
        choice = self.settling.choice
        columns = [self.names.index(unit) for unit in choice.units]
        means = observed.moments.mean[columns] * np.sign(self.criterion.power)
        return [choice.units[number] for number in np.argsort(-means, kind="stable")]

    def reached(self, observed: Observed) -> float:
        """Returns the confidence of what would be selected."""
        if observed.moments.count < 2:
            return 0.0
        kinds = self.settling.choice.units[0] in KINDS
        columns = self._kinds if kinds else self._components
        apart = distances(observed.moments.mean[columns], self.spread(observed).only(columns))
        return self.settling.reached(self.ranking(observed), KINDS if kinds else self.ids, apart.tolist())

    def separation(self, observed: Observed, selecting: bool) -> Separation:
        """Returns how far apart the units are; of what would be selected, if measuring was to settle it."""
        means, spread = observed.moments.mean, self.spread(observed)
        kinds, components = (
            tuple(distances(means[columns], spread.only(columns)).round(6).tolist())
            for columns in (self._kinds, self._components)
        )
        return Separation(
            kinds=kinds,
            components=components if len(self.ids) <= MOST_COMPONENTS else None,
            looks=self.settling.looks,
            reached=self.reached(observed) if selecting else None,
        )

    @property
    def _components(self) -> slice:
        return slice(0, len(self.ids))

    @property
    def _kinds(self) -> slice:
        return slice(len(self.ids), None)

    def check_finite(self, values: torch.Tensor) -> None:
        """Raises NonFiniteError, which names the component, if a value is NaN or infinite."""
        wrong = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
        if wrong:
            component = self.architecture.components[wrong[0]]
            raise NonFiniteError(
                f"The {self.criterion.name} of {component.id} ({component.path}) is NaN or infinite. In half "
                "precision this is often overflow: measure the model in float32 or bfloat16."
            )


def observe_until_settled(
    observe: Observe, columns: Columns, sampler: Sampler, share: Share, stop_early: bool
) -> Seen:
    """Returns the observations of all processes together, the same in each.

    Args:
        observe: the function that the criterion prepared.
        columns: the components and kinds, and the rule of the selection.
        sampler: the samples.
        share: the place of this process.
        stop_early: False to use all samples, even if the selection is settled earlier.
    """
    worker = _Worker(observe, columns, sampler)
    observed, skipped, settled, start = columns.nothing(), 0, False, 0
    with Progress(sampler, share) as progress:
        for stop in looks(sampler.planned(), sampler.first_look):
            with failing_together(share):
                reached = sampler.available(stop)
                seen, left_out = worker.look_at(share.of(range(start, reached)), progress)
            start = same(share, f"number of {sampler.plural}", reached)
            observed = observed.merge(seen.of_all(share))
            skipped += int(summed(share, np.array(left_out))[0])
            settled = columns.reached(observed) >= columns.settling.confidence
            progress.show(start, columns.ranking(observed), columns.settling.choice)
            if (settled and stop_early) or start < stop:
                break
        progress.end()
    return Seen(observed, skipped, settled)


class _Worker:
    """Observes in this process."""

    def __init__(self, observe: Observe, columns: Columns, sampler: Sampler) -> None:
        self._observe, self._columns, self._sampler = observe, columns, sampler
        self._passes = Passes(sampler, "measuring", f"by criterion={columns.criterion.name!r}")

    def look_at(self, numbers: Sequence[int], progress: Progress) -> tuple[Observed, int]:
        """Returns what is observed of the samples with these numbers, and how many samples were skipped."""
        observed, skipped = self._columns.nothing(), 0
        for batch, (more, left_out) in self._passes.results(numbers, self._observed):
            observed, skipped = observed.merge(more), skipped + left_out
            progress.advance(len(batch))
        return observed, skipped

    def _observed(self, batch: Sequence[int]) -> tuple[Observed, int]:
        """Returns what is observed of the samples in one pass, and how many were skipped."""
        values, skipped, kept = self._observe(self._sampler.load(batch))
        self._columns.check_finite(values)
        keys = self._sampler.image_keys(batch)
        if len(values) < len(keys):
            if kept is None and keys.shape[1]:  # the criterion does not report which samples the values are of
                return self._one_by_one(batch)
            keys = keys[: len(values)] if kept is None else keys[kept.cpu().numpy()]
        return self._columns.observed(values, keys), skipped

    def _one_by_one(self, batch: Sequence[int]) -> tuple[Observed, int]:
        observed, skipped = self._columns.nothing(), 0
        for number in batch:
            values, left_out, _ = self._observe(self._sampler.load([number]))
            keys = self._sampler.image_keys([number])[: len(values)]
            observed, skipped = observed.merge(self._columns.observed(values, keys)), skipped + left_out
        return observed, skipped


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
        self._bar.set_postfix_str(f"selected so far: {', '.join(choice.chosen(ranking)) or 'nothing fits'}")

    def end(self) -> None:
        """Shows that no more samples are needed."""
        self._bar.total = self._shown
        self._bar.refresh()

    def _to(self, number: int) -> None:
        self._bar.update(number - self._shown)
        self._shown = number
