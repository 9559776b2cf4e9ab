"""Laws of the standard errors of means over samples that share images."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from plasticity_peft import measure_plasticity
from plasticity_peft.criteria import rate_of_change
from plasticity_peft.criteria.rate_of_change import ratios
from plasticity_peft.images.pairs import draw_pairs
from plasticity_peft.measuring import sharing
from plasticity_peft.measuring.processes import Share
from plasticity_peft.measuring.settling import FARTHEST, distances
from plasticity_peft.measuring.sharing import Observed, Spread
from tests.support.models import random_images, tiny_model
from tests.support.processes import in_threads

GENERATOR = np.random.default_rng(0)
DESIGNS = {"target": (9, None, 30), "source and target": (9, 7, 40), "few pairs": (30, None, 12)}


def drawn(name: str) -> np.ndarray:
    target, source, pairs = DESIGNS[name]
    rows = draw_pairs(pairs, target=target, source=source, seed=1)
    return 2 * rows + np.array([source is not None, False])


def parts(spread: Spread) -> list[np.ndarray]:
    return [*spread.of_means(), *spread.of_differences(), spread.separate, *(matrix for matrix, _ in spread.shared)]


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("cuts", [(), (1,), (3, 3, 9), tuple(range(1, 11))])
def test_any_split_and_order_gives_the_spread_of_the_whole(name: str, cuts: tuple[int, ...]) -> None:
    keys = drawn(name)
    values = GENERATOR.lognormal(sigma=2, size=(len(keys), 4))
    whole = parts(Spread.of(Observed.of(values, keys)))
    pieces = [Observed.of(*piece) for piece in zip(np.split(values, cuts), np.split(keys, cuts), strict=True)]
    for order in (pieces, pieces[::-1]):
        merged = Observed.of(values[:0], keys[:0, :0])
        for piece in order:
            merged = merged.merge(piece)
        for one, other in zip(parts(Spread.of(merged)), whole, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("cuts", [(1,), (3, 3, 9)])
def test_all_processes_have_the_spread_of_the_whole(name: str, cuts: tuple[int, ...]) -> None:
    """Also if some have observed nothing, and each has observed other images."""
    keys = drawn(name)
    values = GENERATOR.lognormal(sigma=2, size=(len(keys), 4))
    pieces = [Observed.of(*piece) for piece in zip(np.split(values, cuts), np.split(keys, cuts), strict=True)]
    pieces = [piece if len(piece.keys) else Observed.of(values[:0], np.empty((0, 0), np.int64)) for piece in pieces]
    whole = Observed.of(values, keys)
    for together in in_threads(len(pieces), lambda rank: pieces[rank].of_all(Share(rank, len(pieces)))):
        for one, other in zip(parts(Spread.of(together)), parts(Spread.of(whole)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
        assert together.groups.tolist() == whole.groups.tolist()


def test_all_processes_together_may_have_observed_nothing() -> None:
    nothing = Observed.of(np.empty((0, 4)), np.empty((0, 0), np.int64))
    for together in in_threads(2, lambda rank: nothing.of_all(Share(rank, 2))):
        assert together.moments.count == 0
        assert together.merge(nothing).sums.shape == (0, 4)


def test_samples_that_share_nothing_have_the_usual_errors() -> None:
    values = GENERATOR.normal(5, 1, size=(20, 3))
    for keys in (np.empty((20, 0), dtype=np.int64), 2 * np.arange(40).reshape(20, 2)):
        spread = Spread.of(Observed.of(values, keys))
        np.testing.assert_allclose(spread.of_means()[0], values.var(axis=0, ddof=1) / 20)
        np.testing.assert_allclose(spread.of_differences()[0][2], (values[:, 1] - values[:, 2]).var(ddof=1) / 20)


def test_the_skewness_of_differences_is_that_of_scipy() -> None:
    values = GENERATOR.lognormal(size=(20, 3))
    differences = np.stack([values[:, one] - values[:, other] for one, other in ((0, 1), (0, 2), (1, 2))], axis=1)
    for keys in (np.empty((20, 0), dtype=np.int64), 2 * np.arange(40).reshape(20, 2)):
        found = Spread.of(Observed.of(values, keys)).skewness_of_differences()
        np.testing.assert_allclose(found, stats.skew(differences, bias=False))
    assert not Spread.of(Observed.of(values, drawn("target")[:20])).skewness_of_differences().any()
    equal = Spread.of(Observed.of(values[:, [0, 0]], keys)).skewness_of_differences()
    assert equal.tolist() == [0]


def effects(keys: np.ndarray, of_images: float, of_pairs: float, generator: np.random.Generator) -> np.ndarray:
    """Returns values of pairs, each the sum of an effect of its images and of one of its own: shape (pairs, 1)."""
    images = generator.normal(0, of_images, keys.max() + 1)
    _, pair = np.unique(np.sort(keys, axis=1), axis=0, return_inverse=True)
    own = generator.normal(0, of_pairs, pair.max() + 1)
    return (images[keys].sum(axis=1) + own[pair.reshape(-1)])[:, None]


@pytest.mark.parametrize(("of_images", "of_pairs"), [(1, 0), (1, 1), (0, 1)])
@pytest.mark.parametrize("name", DESIGNS)
def test_the_variance_is_that_of_the_mean(name: str, of_images: float, of_pairs: float) -> None:
    keys, generator = drawn(name), np.random.default_rng(2)
    found = [Observed.of(effects(keys, of_images, of_pairs, generator), keys) for _ in range(150)]
    ratio = np.mean([Spread.of(each).of_means()[0][0] for each in found]) / true_variance(keys, of_images, of_pairs)
    # With one sort of image, what is peculiar to a pair counts up to twice.
    assert 0.85 < ratio < (1.15 if of_pairs == 0 else 1.5 if of_images else 2.3)


def true_variance(keys: np.ndarray, of_images: float, of_pairs: float) -> float:
    """Returns the variance of the mean over pairs, from how often each image and each pair is drawn."""
    _, images = np.unique(keys, return_counts=True)
    _, pairs = np.unique(np.sort(keys, axis=1), axis=0, return_counts=True)
    return float((of_images**2 * (images**2).sum() + of_pairs**2 * (pairs**2).sum()) / len(keys) ** 2)


def test_images_beyond_the_number_of_sums_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, generator = draw_pairs(400, target=120, source=None, seed=0), np.random.default_rng(3)
    variances = {}
    for groups in (1024, 40):
        monkeypatch.setattr(sharing, "GROUPS", groups)
        found = [Observed.of(effects(2 * rows, 1, 1, generator), 2 * rows) for _ in range(100)]
        assert len(found[0].sums) == min(groups, 120)
        variances[groups] = np.mean([Spread.of(each).of_means()[0][0] for each in found])
    assert variances[40] == pytest.approx(variances[1024], rel=0.15)


def test_one_pair_says_nothing_about_how_much_pairs_vary() -> None:
    keys = np.array([[0, 2], [2, 0]])
    spread = Spread.of(Observed.of(np.array([[1.0, 2.0], [1.0, 2.0]]), keys))
    assert spread.of_means()[1].tolist() == [0, 0]
    assert distances(np.array([1.0, 2.0]), spread).tolist() == [0]


def test_equal_quantities_are_not_apart_and_exact_ones_are() -> None:
    values = GENERATOR.lognormal(size=(30, 1)) * np.ones((1, 3))
    values[:, 2] += 1
    keys = 2 * draw_pairs(30, target=12, source=None, seed=0)
    observed = Observed.of(values * np.array([1, 1 + 2.3e-16, 1]), keys)
    assert distances(observed.moments.mean, Spread.of(observed)).tolist() == [0, FARTHEST, FARTHEST]


def test_pairs_that_are_left_out_are_counted_for_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a criterion does not report which pairs it left out."""
    images = random_images(6)[[0, 0, 0, 1, 2, 3, 4, 5]]  # some pairs are of equal images
    options = {"inputs": "embedding", "settle": None, "batch_size": 7}
    report = measure_plasticity(tiny_model(), images, **options)
    assert report.skipped > 0
    monkeypatch.setattr(rate_of_change, "ratios", lambda *args: ratios(*args)._replace(kept=None))
    silent = measure_plasticity(tiny_model(), images, **options)
    assert silent.skipped == report.skipped
    for row, other in zip(silent.kinds, report.kinds, strict=True):
        assert (row.mean, row.error) == pytest.approx((other.mean, other.error), rel=1e-6)
