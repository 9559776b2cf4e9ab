"""When measuring stops: the level that is promised, and what must be told apart for a choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from plasticity_peft.images.pairs import draw_pairs
from plasticity_peft.measuring.settling import Settling, distances, looks
from plasticity_peft.measuring.sharing import Observed, Spread
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
        ranking, reached = examined(settling, Observed.of(values[:stop], np.empty((stop, 0), dtype=np.int64)))
        if reached >= settling.confidence:
            return stop, choice.chosen(ranking)
    return 0, choice.chosen(ranking)


def examined(settling: Settling, observed: Observed) -> tuple[list[str], float]:
    """Returns the ranking after some observations of all units, and the confidence of what is chosen from it."""
    means, units = observed.moments.mean, settling.choice.units
    ranking = [units[number] for number in np.argsort(-means, kind="stable")]
    return ranking, settling.reached(ranking, units, distances(means, Spread.of(observed)).tolist())


def rates(means: list[float], choice: TopK, repetitions: int = 200, **options: Any) -> tuple[float, float]:
    """Returns how often it settled, and how often on units that are not the best."""
    best = {choice.units[i] for i in np.argsort(-np.array(means))[: choice.top_k]}
    generator = np.random.default_rng(5)
    runs = [run(means, generator, choice, **options) for _ in range(repetitions)]
    settled = [set(chosen) for stop, chosen in runs if stop]
    return len(settled) / repetitions, sum(chosen != best for chosen in settled) / repetitions


def at_most(level: float, repetitions: int = 200) -> float:
    """Returns what a rate of `level` is exceeded by in one of 10,000 simulations."""
    return float(stats.binom.ppf(1 - 1e-4, repetitions, level) / repetitions)


def slow(*values: Any) -> Any:
    """Returns a case that only the slow tests run."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("noise", ["lognormal", slow("normal"), slow("t, 5 degrees")])
@pytest.mark.parametrize("top_k", [1, slow(2), slow(4)])
@pytest.mark.parametrize("gap", [0.0, slow(0.01), 0.03, slow(0.1)])
def test_a_wrong_choice_is_settled_no_more_often_than_promised(noise: str, top_k: int, gap: float) -> None:
    means = [gap * number for number in range(5)]
    settled, wrong = rates(means, TopK(UNITS, top_k), noise=noise)
    if gap == 0:  # all are tied, and any choice is as good as another: it must not be called settled
        assert settled <= at_most(0.05)
    assert wrong <= at_most(0.05)


@pytest.mark.parametrize("noise", ["lognormal", slow("normal"), slow("t, 5 degrees")])
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


def test_without_the_corrections_the_promise_would_be_broken() -> None:
    """The simulation can fail: one level for all looks exceeds it."""
    settled, _ = rates([0, 1, 1, 0, 0], TopK(UNITS, 1), looks=1)
    assert settled > at_most(0.05)


def test_skewed_images_keep_the_promise() -> None:
    """Two units are tied, and one of them owes its mean to rare images, as norms of gradients do."""
    generator, wrong, ignored = np.random.default_rng(5), 0, 0
    for _ in range(1000):
        values = np.stack([generator.normal(np.exp(0.5), 0.1, 32), generator.lognormal(size=32)], axis=1)
        spread = Spread.of(Observed.of(values, np.empty((32, 0), dtype=np.int64)))
        (apart,) = distances(values.mean(axis=0), spread)
        (without,) = distances(values.mean(axis=0), replace(spread, moments=None))
        wrong, ignored = wrong + (apart > 1.96), ignored + (without > 1.96)
    assert wrong / 1000 <= at_most(0.05, 1000)
    assert ignored / 1000 > at_most(0.05, 1000), "the simulation must fail if skewness is ignored"


# ---- pairs that share images


IMAGES = 40


def pairs_of_images(generator: np.random.Generator, means: np.ndarray, source: int | None) -> Observed:
    """Returns observations of pairs with an effect of each image, and of each pair, on each unit."""
    drawn = draw_pairs(TOTAL, target=IMAGES, source=source, seed=int(generator.integers(2**31)))
    effects = generator.standard_normal((2, IMAGES, len(means)))
    first = effects[0 if source is None else 1]
    values = means + first[drawn[:, 0]] + effects[0][drawn[:, 1]] + generator.standard_normal((len(drawn), len(means)))
    return Observed.of(values, 2 * drawn + np.array([source is not None, False]))


@pytest.mark.parametrize("source", [None, IMAGES])
@pytest.mark.parametrize("means", [[0, 1, 1, 0, 0], slow([0, 0, 0, 0, 0]), slow([0, 0.1, 0, 0, 0])])
def test_pairs_that_share_images_keep_the_promise(means: list[float], source: int | None) -> None:
    generator, settling = np.random.default_rng(3), Settling(TopK(UNITS, 1), confidence=0.95, looks=1)
    settled, ignored = 0, 0
    for _ in range(100):
        observed = pairs_of_images(generator, np.array(means), source)
        ranking, reached = examined(settling, observed)
        tied = means[UNITS.index(ranking[0])] < max(means) or sorted(means)[-2] == max(means)
        settled += tied and reached >= 0.95
        without = replace(observed, keys=np.empty((observed.moments.count, 0), dtype=np.int64))
        ignored += tied and examined(settling, without)[1] >= 0.95
    assert settled / 100 <= at_most(0.05, 100)
    assert ignored / 100 > at_most(0.05, 100), "the simulation must fail if images are taken for independent"


@pytest.mark.parametrize("source", [None, IMAGES])
def test_pairs_that_share_images_settle_if_units_differ(source: int | None) -> None:
    generator, settling = np.random.default_rng(4), Settling(TopK(UNITS, 1), confidence=0.95, looks=6)
    found = [examined(settling, pairs_of_images(generator, np.array([0, 3.0, 0, 0, 0]), source)) for _ in range(50)]
    assert all(ranking[0] == "MHA" and reached >= 0.95 for ranking, reached in found)


# ---- what must be told apart


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
        for _ in range(100):
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
