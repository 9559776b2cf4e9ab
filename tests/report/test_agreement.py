"""How much two reports agree, against scipy's correlations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from plasticity_peft import PlasticityReport
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.report.agreement import agreement, check_comparable
from tests.support.models import REPOSITORY

REPORT = PlasticityReport.load(sorted(REPOSITORY.glob("tests/support/releases/*/vit/lora/plasticity.json"))[-1])
UNITS = len(REPORT.scores)


def with_scores(scores: list[float]) -> PlasticityReport:
    return replace(REPORT, scores=tuple(replace(row, mean=x) for row, x in zip(REPORT.scores, scores, strict=True)))


@settings(max_examples=200)
@given(
    *[
        st.lists(st.sampled_from([0.0, 1.0, 2.0, 1e-300, 1e300]) | st.floats(0, 1e9), min_size=UNITS, max_size=UNITS)
        for _ in range(2)
    ]
)
def test_correlations_are_those_of_scipy(first: list[float], second: list[float]) -> None:
    found = agreement(with_scores(first), with_scores(second), granularity="component")
    if min(len(set(first)), len(set(second))) == 1:
        assert (found["spearman"], found["kendall"]) == (None, None)
        return
    assert found["spearman"] == pytest.approx(stats.spearmanr(first, second).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(first, second).statistic)


@given(top_k=st.integers(1, UNITS), seed=st.randoms(use_true_random=False))
def test_what_is_shared_is_among_the_best_of_both(top_k: int, seed: object) -> None:
    shuffled = list(map(float, range(UNITS)))
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = REPORT, with_scores(shuffled)
    found = agreement(first, second, granularity="component", top_k=top_k)
    best = [[row.unit for row in report.ranking("component")[:top_k]] for report in (first, second)]
    assert (found["best_of_first"], found["best_of_second"]) == tuple(best)
    assert found["best_of_both"] == [unit for unit in best[0] if unit in best[1]]
    assert (found["shared"], found["overlap"]) == (len(found["best_of_both"]), len(found["best_of_both"]) / top_k)


def test_a_report_agrees_with_itself() -> None:
    for granularity, units in (("kind", len(KINDS)), ("component", UNITS)):
        found = agreement(REPORT, REPORT, granularity=granularity)
        assert (found["spearman"], found["kendall"], found["overlap"]) == (1, 1, 1)
        assert (found["units"], found["top_k"]) == (units, units // 5)


def test_more_units_than_there_are_and_other_components_are_refused() -> None:
    with pytest.raises(ConfigError, match=rf"top_k must be a whole number from 1 to {UNITS}, the number of units"):
        agreement(REPORT, REPORT, granularity="component", top_k=UNITS + 1)
    shorter = replace(REPORT, scores=REPORT.scores[:5])
    with pytest.raises(ReportError, match=rf"a scores the {UNITS} components .* and b scores the 5 components"):
        check_comparable(REPORT, shorter, names=("a", "b"))
