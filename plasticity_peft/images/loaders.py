"""Reads a DataLoader: the keys of its sampler, or whole batches if its collate_fn needs them.

A collate_fn that only stacks (that of torch, and the default ones of transformers) treats each image separately, so
images are read by key. Any other collate_fn may pad or mix images. Then batches are made as the loader makes them,
from the same keys and by the same collate_fn.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from plasticity_peft.images.seeding import seed_cpu

MOST_BATCHES = 2**18
"""Largest number of batches to draw from, for a DataLoader with a collate_fn of its own."""
MOST_KEYS = 2**24
"""Largest number of keys of a sampler to draw from."""
MOST_UNSIZED = 2**20
"""The same for a sampler without a length, which may never end."""


def state_of(data: Any) -> Callable[[], None]:
    """Returns a function that restores the present random states of a dataset or DataLoader.

    These are the states of random generators that the dataset, the loader, its samplers and its collate_fn have as
    attributes. All other attributes of samplers, such as the number of the epoch, are restored too.
    """
    if not isinstance(data, DataLoader):
        return _generators_of([data])
    loader = plain(data)
    samplers = list(_samplers(loader))
    before = [(vars(sampler), dict(vars(sampler))) for sampler in samplers if hasattr(sampler, "__dict__")]
    restore = _generators_of([data, loader, loader.dataset, loader.collate_fn, *samplers])

    def put_back() -> None:
        for attributes, old in before:
            attributes.clear()
            attributes.update(old)
        restore()

    return put_back


def _samplers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yields the samplers of a loader, and those that they wrap."""
    waiting, seen = [vars(loader).get("batch_sampler"), vars(loader).get("sampler")], set()
    while waiting:
        sampler = waiting.pop()
        if sampler is None or id(sampler) in seen:
            continue
        seen.add(id(sampler))
        yield sampler
        waiting += [getattr(sampler, "batch_sampler", None), getattr(sampler, "sampler", None)]


def _generators_of(holders: Iterable[Any]) -> Callable[[], None]:
    """Returns a function that restores the state of the generators that are attributes of some objects."""
    values = [value for holder in holders for value in (holder, *getattr(holder, "__dict__", {}).values())]
    torch_states = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]
    numpy_generators = [value.bit_generator for value in values if isinstance(value, np.random.Generator)]
    numpy_states = [(bits, copy.deepcopy(bits.state)) for bits in numpy_generators]
    legacy_states = [(value, value.get_state()) for value in values if isinstance(value, np.random.RandomState)]
    python_states = [(value, value.getstate()) for value in values if isinstance(value, random.Random)]

    def put_back() -> None:
        for generator, state in torch_states:
            generator.set_state(state)
        for bits, numpy_state in numpy_states:
            bits.state = numpy_state
        for legacy, legacy_state in legacy_states:
            legacy.set_state(legacy_state)
        for python, python_state in python_states:
            python.setstate(python_state)

    return put_back


def plain(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns the DataLoader that Accelerate wrapped, or the loader itself."""
    inner = vars(loader).get("base_dataloader")
    return inner if isinstance(inner, DataLoader) else loader


def streams(loader: DataLoader[Any]) -> bool:
    """Returns whether the loader is over a dataset that cannot be indexed."""
    return isinstance(loader.dataset, IterableDataset)


def treats_images_alone(loader: DataLoader[Any]) -> bool:
    """Returns whether the loader makes batches, and its collate_fn is known to treat each image separately."""
    from transformers.data.data_collator import DefaultDataCollator, default_data_collator

    collate = loader.collate_fn
    known = (default_collate, default_data_collator)
    return loader.batch_sampler is not None and (collate in known or type(collate) is DefaultDataCollator)


def keys_of(loader: DataLoader[Any]) -> Sequence[Any]:
    """Returns the keys of the images that the loader yields, in the order of the dataset if keys are numbers.

    A key is returned as often as the sampler yields it. A sampler that yields all images in a random order is not
    iterated, because images are drawn in a random order anyway.
    """
    batches = _batch_sampler(loader)
    if type(batches) is BatchSampler:
        found = _all_of(batches)
        keys = _read(batches.sampler, MOST_KEYS) if found is None else found
        ordered = found is None or type(batches.sampler) is SequentialSampler
        if batches.drop_last and ordered:
            keys = keys[: len(keys) - len(keys) % batches.batch_size]
        if found is not None:
            return keys
    else:
        keys = [key for batch in _read(batches, MOST_BATCHES) for key in batch]
    numbers = all(isinstance(key, (int, np.integer)) for key in keys)
    return sorted(keys) if numbers else keys


def batches_of(loader: DataLoader[Any], seeds: Sequence[int], in_order_below: int) -> tuple[int, Iterator[Any]]:
    """Returns the number of images, and an iterator over the batches as the loader makes them.

    The batches are made of the keys that the sampler yields. They come in the order of the sampler if there are at
    most `in_order_below` images. Otherwise `seeds` determine the order, so that the first batches do not depend on how
    the dataset is sorted.
    """
    batches = _batch_sampler(loader)
    keys = _read(loader.sampler if batches is None else batches, MOST_BATCHES)
    alone = batches is None
    count = sum(1 if alone and not isinstance(key, (list, tuple)) else len(key) for key in keys)
    order: Iterable[int] = range(len(keys))
    if count > in_order_below:
        order = np.random.default_rng(seeds).permutation(len(keys))
    return count, _made(loader, keys, [int(number) for number in order], seeds)


def iterated(loader: DataLoader[Any]) -> Iterator[Any]:
    """Returns an iterator over the batches of a stream. The loader itself does not change."""
    return iter(copy.copy(loader))


def _made(loader: DataLoader[Any], keys: Sequence[Any], order: Iterable[int], seeds: Sequence[int]) -> Iterator[Any]:
    dataset: Any = loader.dataset
    for number in order:
        seed_cpu(*seeds, number)
        if loader.batch_sampler is None:
            yield loader.collate_fn(dataset[keys[number]])
            continue
        together = getattr(dataset, "__getitems__", None)  # as DataLoader does
        items = together(keys[number]) if together else [dataset[key] for key in keys[number]]
        yield loader.collate_fn(items)


def _batch_sampler(loader: DataLoader[Any]) -> Any:
    """Returns the sampler of the batches; None if the loader has no batches.

    If Accelerate has split the sampler, the one for all processes is returned, as plasticity_peft spreads the images
    over the processes itself.
    """
    from accelerate.data_loader import BatchSamplerShard

    batches = loader.batch_sampler
    return batches.batch_sampler if isinstance(batches, BatchSamplerShard) else batches


def _all_of(batches: BatchSampler) -> Sequence[int] | None:
    """Returns the keys of a sampler that is known to yield each image once; None for other samplers."""
    from accelerate.data_loader import SeedableRandomSampler

    sampler: Any = batches.sampler
    if type(sampler) is SequentialSampler:
        return range(len(sampler.data_source))
    if type(sampler) is DistributedSampler:  # in all processes together
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    if type(sampler) in (RandomSampler, SeedableRandomSampler):
        count = len(sampler.data_source)
        return range(count) if not sampler.replacement and sampler.num_samples == count else None
    return None


def _read(sampler: Iterable[Any], most: int) -> list[Any]:
    """Returns the keys that a sampler yields, at most `most`."""
    try:
        size = len(sampler)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        size = MOST_UNSIZED
    return list(islice(sampler, min(size, most)))
