"""Laws of the statistic: however the observations are cut up, the result is that of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from plasticity_peft.measuring.moments import Moments
from plasticity_peft.measuring.processes import Share
from tests.support.processes import in_threads

GENERATOR = np.random.default_rng(0)
DATA = {
    "plain": GENERATOR.normal(size=(37, 3)),
    "far from zero": GENERATOR.normal(loc=1e8, size=(50, 2)),
    "many scales": GENERATOR.lognormal(sigma=4, size=(41, 4)),
}


def assert_equal(moments: Moments, values: np.ndarray) -> None:
    assert moments.count == len(values)
    np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.std, values.std(axis=0, ddof=1), rtol=1e-7)
    apart = values - values.mean(axis=0)
    scale = np.outer(np.abs(apart**2).sum(axis=0), np.abs(apart).max(axis=0))
    np.testing.assert_allclose((moments.m3 - np.einsum("ni,ni,nj->ij", apart, apart, apart)) / scale, 0, atol=1e-7)
    np.testing.assert_allclose(moments.standard_error, values.std(axis=0, ddof=1) / np.sqrt(len(values)), rtol=1e-7)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("cuts", [(), (1,), (5, 5, 9), (0, 36), tuple(range(1, 37))])
def test_any_split_gives_the_moments_of_the_whole(name: str, cuts: tuple[int, ...]) -> None:
    values = DATA[name]
    merged = Moments.of(values[:0])
    for part in np.split(values, cuts):
        merged = merged.merge(Moments.of(part))
    assert_equal(merged, values)


@pytest.mark.parametrize("name", DATA)
def test_order_and_grouping_do_not_matter(name: str) -> None:
    values = DATA[name]
    a, b, c = (Moments.of(part) for part in np.split(values, [7, 30]))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert_equal(merged, values)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("cuts", [(1,), (5, 5, 9), (0, 36)])
def test_all_processes_have_the_moments_of_the_whole(name: str, cuts: tuple[int, ...]) -> None:
    """Also if some have observed nothing."""
    parts = np.split(DATA[name], cuts)
    for together in in_threads(len(parts), lambda rank: Moments.of(parts[rank]).of_all(Share(rank, len(parts)))):
        assert_equal(together, DATA[name])


def test_empty_is_neutral_on_both_sides() -> None:
    values = DATA["plain"]
    empty, whole = Moments.of(values[:0]), Moments.of(values)
    assert_equal(empty.merge(whole), values)
    assert_equal(whole.merge(empty), values)
    assert empty.merge(empty).count == 0


def test_merging_changes_no_operand() -> None:
    values = DATA["plain"]
    empty, first, second = Moments.of(values[:0]), Moments.of(values[:9]), Moments.of(values[9:])
    before = [(m.count, m.mean.copy(), m.m2.copy(), m.m3.copy()) for m in (empty, first, second)]
    merged = empty.merge(first).merge(second)
    merged.mean[:] = -1
    for moments, (count, mean, m2, m3) in zip((empty, first, second), before, strict=True):
        assert moments.count == count
        np.testing.assert_array_equal(moments.mean, mean)
        np.testing.assert_array_equal(moments.m2, m2)
        np.testing.assert_array_equal(moments.m3, m3)


@pytest.mark.parametrize("count", [0, 1])
def test_a_spread_needs_two_observations(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 observations. Got {count}"):
        _ = Moments.of(np.zeros((count, 2))).std
