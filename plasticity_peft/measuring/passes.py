"""Passes of samples through a model, in a size that fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

from plasticity_peft.errors import ModelError
from plasticity_peft.images.sampler import Batches, Sampler

# Below the logger of transformers, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

T = TypeVar("T")
INSTEAD = 'smaller images, or dtype="bfloat16"'
AnySampler = TypeVar("AnySampler", bound=Sampler)


class Passes(Generic[AnySampler]):
    """Passes of the samples of a sampler. Their size is halved if memory runs out, and stays so."""

    def __init__(self, sampler: AnySampler, doing: str, purpose: str, instead: str = INSTEAD) -> None:
        """Starts with as many samples in a pass as the sampler has.

        Args:
            sampler: the samples.
            doing: what goes on with smaller passes, as in "measuring".
            purpose: what memory does not suffice for if even one sample is too much, as in "to fit the head".
            instead: what helps then.
        """
        self.sampler, self._doing, self._purpose, self._instead = sampler, doing, purpose, instead
        self._size = sampler.per_pass

    def results(self, numbers: Sequence[int], work: Callable[[Sequence[int]], T]) -> Iterator[tuple[Sequence[int], T]]:
        """Yields the numbers of the samples of each pass, and what `work` returns for them.

        Samples whose images differ in shape go in passes of their own, and not in the order of `numbers`.

        Args:
            numbers: the numbers of all samples.
            work: passes samples through the model, by their numbers. If memory runs out, it is called again with fewer
                of them, so what it does before must have no effect.

        Raises:
            ModelError: memory does not suffice for one sample.
        """
        numbers, done = self.sampler.arranged(numbers), 0
        while done < len(numbers):
            few = self.sampler.alike(numbers[done : done + self._size])
            found = tried(partial(work, few))
            if not found:
                self._halve()
                continue
            done += len(few)
            yield few, found[0]

    def _halve(self) -> None:
        smaller, sampler = self._size // 2, self.sampler
        if smaller == 0:
            whole = isinstance(sampler, Batches)  # the value of a batch is that of the batch as a whole
            what = f"a batch of {sampler.batch_size} images" if whole else f"one {sampler.singular}"
            raise ModelError(
                f"Out of memory for {what}, {self._purpose}. Use "
                f"{'a smaller batch_size, ' if whole else ''}{self._instead}."
            )
        self._size = smaller
        say_smaller(self._doing, f"{smaller} {sampler.plural}")


def tried(work: Callable[[], T]) -> list[T]:
    """Returns what `work` returns, in a list, which is empty if memory ran out.

    Accelerate's find_executable_batch_size collects garbage before each call, which takes longer than a pass of a
    small model. This does so only if memory ran out.
    """
    try:
        return [work()]
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
    clear_device_cache(garbage_collection=True)  # the error, which keeps tensors alive, is gone here
    return []


def say_smaller(doing: str, samples: str) -> None:
    """Warns that passes are smaller from now on."""
    logger.warning("Out of memory: %s continues with %s per pass.", doing, samples)
