"""Tests of a law on all combinations of several things, and which of them the default run tries: one rule for all.

Where a law is the same for all combinations, and so is the code that they go through, each value has its turn by
default: every value of the first axis once, every combination of the other axes once. The slow tests try the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def crossed(*, possible: Callable[..., bool] = lambda *_: True, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Returns the parametrization of a test by all possible combinations; those that have no turn are slow.

    A value of an axis may be a `pytest.param`: one that is marked, as slow, has no turn.

    Args:
        possible: whether there is such a case, of a value of each axis.
        axes: the values of each argument of the test.

    Example:
        >>> mark = crossed(family=["vit", "swin", "clip"], inputs=["embedding", "activation"])
        >>> [case.values for case in mark.args[1] if not case.marks]
        [('vit', 'embedding'), ('swin', 'activation'), ('clip', 'embedding')]
    """
    values = [[value if isinstance(value, Case) else pytest.param(value) for value in axis] for axis in axes.values()]
    places = [
        place
        for place in itertools.product(*map(range, map(len, values)))
        if possible(*(part.values[0] for part in _at(values, place)))
    ]
    turns = _turns(values, set(places))
    return pytest.mark.parametrize(tuple(axes), [_joined(_at(values, place), place in turns) for place in places])


Case = type(pytest.param())
Place = tuple[int, ...]
"""Which value of each axis."""


def _at(values: list[list[Any]], place: Place) -> list[Any]:
    return [axis[index] for axis, index in zip(values, place, strict=True)]


def _turns(values: list[list[Any]], possible: set[Place]) -> set[Place]:
    """Returns the cases of the default run; instead of one that is impossible, the next that is possible."""
    own, *others = ([index for index, part in enumerate(axis) if not part.marks] for axis in values)
    combinations = list(itertools.product(*others))
    turns = set()
    for number in range(max(len(own), len(combinations))):
        first = own[number % len(own)]
        after = ((first, *combinations[(number + step) % len(combinations)]) for step in range(len(combinations)))
        turns |= set(itertools.islice((place for place in after if place in possible), 1))
    return turns


def _joined(parts: list[Any], in_turn: bool) -> Any:
    """Returns a case of several arguments."""
    marks = [mark for part in parts for mark in part.marks]
    if not in_turn and not marks:
        marks = [pytest.mark.slow]
    name = "-".join(part.id or str(part.values[0]) for part in parts)
    return pytest.param(*(part.values[0] for part in parts), marks=marks, id=name)
