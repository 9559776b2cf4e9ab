"""Laws of the drawing of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from plasticity_peft.images.indexed import Images
from plasticity_peft.images.pairs import PairOrder, draw_pairs
from plasticity_peft.measuring.processes import Share

SIZES = (2, 3, 4, 5, 8, 13)
SEEDS = (0, 1, 2, 3, 4)


def assert_dealt_evenly(draws: np.ndarray, images: int) -> None:
    """No image is used twice before all have been used."""
    for start in range(0, len(draws), images):
        hand = draws[start : start + images]
        assert len(set(hand)) == len(hand)
        assert set(hand) <= set(range(images))


@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_target_alone(images: int, seed: int) -> None:
    drawn = draw_pairs(1000, target=images, source=None, seed=seed)
    assert drawn.shape == (max(2, images * (images - 1) // 2), 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert_dealt_evenly(drawn.flatten(), images)


@pytest.mark.parametrize("target", SIZES)
@pytest.mark.parametrize("source", SIZES)
def test_source_and_target(source: int, target: int) -> None:
    drawn = draw_pairs(40, target=target, source=source, seed=0)
    assert drawn.shape == (min(40, source * target), 2)
    assert_dealt_evenly(drawn[:, 0], source)
    assert_dealt_evenly(drawn[:, 1], target)


@pytest.mark.parametrize("source", [None, 30])
def test_the_seed_decides(source: int | None) -> None:
    first, again, other = (draw_pairs(50, target=20, source=source, seed=seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def as_stream(images: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from images


def order(pairs: int, target: Any, source: Any = None) -> PairOrder:
    source = None if source is None else Images(source, "source", pairs)
    return PairOrder(pairs, target=Images(target, "target", 2 * pairs), source=source, seed=0)


@pytest.mark.parametrize("with_source", [False, True])
def test_any_part_of_the_order_can_be_read_by_itself(with_source: bool) -> None:
    images = torch.zeros(10, 3, 2, 2)
    source = torch.zeros(8, 3, 2, 2) if with_source else None
    drawn = draw_pairs(20, target=10, source=8 if with_source else None, seed=0)
    found = order(20, images, source)
    assert found.available(7) == 7
    assert found.available(50) == len(drawn) == 20
    assert found.rows([3, 19]) == [tuple(drawn[3]), tuple(drawn[19])]


def test_a_stream_is_read_no_further_than_asked_and_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plasticity_peft.images.sources.BUFFER_IMAGES", 7)
    read = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            read.append(len(read))
            yield torch.zeros(3, 2, 2)

    found = order(1000, endless())
    assert found.available(5) == 5
    assert found.rows(range(5)) == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert len(read) == 17
    with_source = order(1000, endless(), torch.zeros(4, 3, 2, 2))
    assert with_source.available(4) == 4
    assert with_source.rows(range(4)) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_what_is_beyond_the_end_of_a_stream_is_drawn_from_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plasticity_peft.images.sources.BUFFER_IMAGES", 2)
    images = torch.zeros(9, 3, 2, 2)
    found = order(20, as_stream(images))
    assert [found.available(wanted) for wanted in (4, 5, 20)] == [4, 5, 20]
    assert found.rows(range(4)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert found.rows(range(4, 20)) == [tuple(row) for row in draw_pairs(20, target=9, source=None, seed=0)[4:]]
    assert order(20, as_stream(images[:3])).available(20) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_processes_share_out_every_number_once(world_size: int) -> None:
    shares = [Share(rank, world_size).of(range(3, 10)) for rank in range(world_size)]
    assert sorted(number for share in shares for number in share) == list(range(3, 10))
