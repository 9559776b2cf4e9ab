"""Laws of the drawing of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plasticity_peft.images import Images
from plasticity_peft.pairs import batches, draw_pairs

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


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_hold_the_images_of_their_pairs(batch_size: int) -> None:
    target = torch.arange(10.0)[:, None, None, None].expand(-1, 3, 2, 2)
    source = target + 100
    indices = draw_pairs(7, target=10, source=10, seed=0)
    seen = list(batches(Images(target, "target", 0), Images(source, "source", 0), indices, batch_size))
    seen = [(x["pixel_values"], y["pixel_values"]) for x, y in seen]
    assert [len(x) for x, _ in seen] == [len(rows) for rows in np.split(indices, range(batch_size, 7, batch_size))]
    x, y = (torch.cat(side)[:, 0, 0, 0].numpy() for side in zip(*seen, strict=True))
    np.testing.assert_array_equal(x, indices[:, 0] + 100)
    np.testing.assert_array_equal(y, indices[:, 1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_processes_share_out_every_pair_once(world_size: int) -> None:
    indices = draw_pairs(7, target=20, source=None, seed=0)
    shares = [indices[rank::world_size] for rank in range(world_size)]
    assert sorted(map(tuple, np.concatenate(shares))) == sorted(map(tuple, indices))
