"""When measuring stops: the level that is promised, and what must be told apart for a choice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from plasticity_peft.measuring.moments import Moments
from plasticity_peft.measuring.settling import Settling, looks
from plasticity_peft.report.selection import Budget, Choice, TopK

UNITS = ("LN1", "MHA", "LN2", "FC1", "FC2")
TOTAL = 1024
STOPS = looks(TOTAL, first=32)
NOISES: dict[str, Callable[..., np.ndarray]] = {
    "normal": lambda generator, size: generator.standard_normal(size),
    # Skewed, as ratios are.
    "lognormal": lambda generator, size: (generator.lognormal(0, 0.5, size) - np.exp(0.125)) / 0.6,
    # With far outliers.
    "t, 5 degrees": lambda generator, size: generator.standard_t(5, size) / (5 / 3) ** 0.5,
}


def run(means: list[float], generator: np.random.Generator, choice: TopK, **options: Any) -> tuple[int, tuple]:
    """Returns after how many pairs it settled (0: never), and what was chosen, of pairs with effects of their own."""
    noise = NOISES[options.get("noise", "normal")]
    # Units share their pairs: an effect of the pair on all, and noise of each that is unlike the others'.
    shared = noise(generator, (TOTAL, 1)) * options.get("shared", 2.0)
    values = 10 + np.array(means) + shared + noise(generator, (TOTAL, len(means))) * np.linspace(0.5, 1.5, len(means))
    settling = Settling(choice, confidence=0.95, looks=options.get("looks", len(STOPS)))
    for stop in STOPS:
        ranking = [choice.units[i] for i in np.argsort(-values[:stop].mean(axis=0), kind="stable")]
        if settling.settled(ranking, Moments.of(settling.differences(values[:stop]))):
            return stop, choice.chosen(ranking)
    return 0, choice.chosen(ranking)


def rates(means: list[float], choice: TopK, repetitions: int = 400, **options: Any) -> tuple[float, float]:
    """Returns how often it settled, and how often on units that are not the best."""
    best = {choice.units[i] for i in np.argsort(-np.array(means))[: choice.top_k]}
    generator = np.random.default_rng(5)
    runs = [run(means, generator, choice, **options) for _ in range(repetitions)]
    settled = [set(chosen) for stop, chosen in runs if stop]
    return len(settled) / repetitions, sum(chosen != best for chosen in settled) / repetitions


def at_most(level: float, repetitions: int = 400) -> float:
    """Returns what a rate of `level` is exceeded by in one of 10,000 simulations."""
    return float(stats.binom.ppf(1 - 1e-4, repetitions, level) / repetitions)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("gap", [0.0, 0.01, 0.03, 0.1])
def test_a_wrong_choice_is_settled_no_more_often_than_promised(noise: str, top_k: int, gap: float) -> None:
    means = [gap * number for number in range(5)]
    settled, wrong = rates(means, TopK(UNITS, top_k), noise=noise)
    if gap == 0:  # all are tied, and any choice is as good as another: it must not be called settled
        assert settled <= at_most(0.05)
    assert wrong <= at_most(0.05)


@pytest.mark.parametrize("noise", NOISES)
def test_two_that_are_tied_at_the_cut_are_unsettled(noise: str) -> None:
    settled, _ = rates([0, 1, 1, 0, 0], TopK(UNITS, 1), noise=noise)
    assert settled <= at_most(0.05)
    # The tie does not matter where both are chosen.
    settled, wrong = rates([0, 1, 1, 0, 0], TopK(UNITS, 2), noise=noise)
    assert (settled, wrong) == (1, 0)


def test_units_that_lie_apart_settle_at_the_first_look() -> None:
    generator = np.random.default_rng(0)
    stops = [run([0, 3, 1, 1, 1], generator, TopK(UNITS, 1))[0] for _ in range(100)]
    assert stops.count(STOPS[0]) > 95


def test_the_smaller_the_gap_the_later_it_settles() -> None:
    def mean_stop(gap: float) -> float:
        generator = np.random.default_rng(1)
        return float(np.mean([run([0, gap, 0, 0, 0], generator, TopK(UNITS, 1))[0] or TOTAL for _ in range(50)]))

    stops = [mean_stop(gap) for gap in (2.0, 0.8, 0.4, 0.2)]
    assert stops == sorted(stops)
    assert stops[0] < 40 < 500 < stops[-1]


def test_pairs_that_are_shared_make_it_settle_sooner() -> None:
    """What a paired test is for: the effect of a pair on all units drops out."""
    for shared in (0.0, 2.0, 20.0):
        assert run([0, 3, 1, 1, 1], np.random.default_rng(0), TopK(UNITS, 1), shared=shared)[0] == STOPS[0]


def test_without_the_corrections_the_promise_would_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation can fail: one level for all units and looks exceeds it."""
    monkeypatch.setattr(TopK, "possible_errors", 1)
    settled, _ = rates([0, 1, 1, 0, 0], TopK(UNITS, 1), looks=1)
    assert settled > at_most(0.05)


def brute_force_errors(units: int, top_k: int) -> int:
    """Returns how many pairs (not among the best, among the best) a wrong choice can hold the wrong way round."""
    return sum(1 for i, j in combinations(range(units), 2) if i < top_k <= j)


@pytest.mark.parametrize(("units", "top_k"), [(5, 1), (5, 3), (60, 6), (2, 1)])
def test_how_many_errors_are_corrected_for(units: int, top_k: int) -> None:
    assert TopK(tuple(map(str, range(units))), top_k).possible_errors == brute_force_errors(units, top_k)


def test_what_must_be_told_apart() -> None:
    assert TopK(("a", "b", "c"), 2).orders(["c", "a", "b"]) == [("c", "b"), ("a", "b")]
    assert TopK(("a", "b"), 2).orders(["b", "a"]) == []
    sizes = {"a": 10, "b": 20, "c": 5, "d": 50}
    budget = Budget(("a", "b", "c", "d"), 0.35, sizes, 100)
    # a and b fit; then d does not, and c, which would, comes later: were c before d, it would be chosen.
    assert budget.chosen(["a", "b", "d", "c"]) == ("a", "b")
    assert budget.orders(["a", "b", "d", "c"]) == [("a", "d"), ("a", "c"), ("b", "d"), ("b", "c"), ("d", "c")]
    # Where nothing else fits, it does not matter what comes next.
    tight = Budget(("a", "b", "c", "d"), 0.30, sizes, 100)
    assert tight.orders(["a", "b", "d", "c"]) == [("a", "d"), ("a", "c"), ("b", "d"), ("b", "c")]
    assert tight.chosen(["d", "a", "b", "c"]) == ()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_left_open_does_not_change_the_choice(seed: int) -> None:
    """Any ranking that keeps the orders that were told apart gives the same choice."""
    generator = np.random.default_rng(seed)
    units = tuple("abcdef")
    sizes = {unit: int(generator.integers(1, 30)) for unit in units}
    budget = float(generator.integers(20, 80)) / 100
    choices: tuple[Choice, ...] = (TopK(units, 3), Budget(units, budget, sizes, 100))
    for choice in choices:
        ranking = list(generator.permutation(units))
        orders, chosen = choice.orders(ranking), choice.chosen(ranking)
        for _ in range(300):
            other = list(generator.permutation(units))
            if all(other.index(better) < other.index(worse) for better, worse in orders):
                assert set(choice.chosen(other)) == set(chosen)


@pytest.mark.parametrize(
    ("total", "first", "expected"),
    [
        (1024, 32, [32, 64, 128, 256, 512, 1024]),
        (33, 32, [32, 33]),
        (7, 32, [7]),
        (20, 8, [8, 16, 20]),
    ],
)
def test_looks(total: int, first: int, expected: list[int]) -> None:
    assert looks(total, first) == expected
