"""How sure a selection is: for any cut, in the report, the table and the log, and no more than it is right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import combinations
from math import erfc, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy import stats
from typer.testing import CliRunner

from plasticity_peft import PlasticityConfig, PlasticityReport, measure_plasticity
from plasticity_peft.cli.app import app
from plasticity_peft.components.component import KINDS
from plasticity_peft.constraints import read_as
from plasticity_peft.errors import ReportError
from plasticity_peft.report.agreement import check_comparable
from plasticity_peft.report.confidence import FARTHEST, Separation, confidence, in_words
from plasticity_peft.report.selection import Budget, TopK
from plasticity_peft.report.text import sure_in_words
from plasticity_peft.saved.record import AdapterDescription, AdapterRecord
from tests.report.test_report import make_report
from tests.support.logs import warned_of_selections
from tests.support.models import random_images, tiny_model

IMAGES = random_images(40)
CASES: dict[str, dict[str, Any]] = {
    "pairs": {"inputs": "embedding"},
    "source": {"inputs": "activation", "source_data": random_images(9, seed=2)},
    "images": {},
    "batches": {"criterion": "feature_norm", "batch_size": 4},
    "weights": {"criterion": "condition_number"},
}


@pytest.fixture(scope="module", params=CASES)
def report(request: pytest.FixtureRequest) -> PlasticityReport:
    return measure_plasticity(tiny_model(), IMAGES, **{"settle": None, "max_samples": 60, **CASES[request.param]})


def by_hand(report: PlasticityReport, granularity: str, top_k: int, candidates: tuple[str, ...]) -> float:
    units = list(KINDS) if granularity == "kind" else [row.id for row in report.scores]
    found = report.separation.of(granularity)
    apart = {frozenset(pair): distance for pair, distance in zip(combinations(units, 2), found, strict=True)}
    ranking = [row.unit for row in report.ranking(granularity, candidates)]
    pairs = [(one, other) for one in ranking[:top_k] for other in ranking[top_k:]]
    chances = sum(erfc(apart[frozenset(pair)] / sqrt(2)) for pair in pairs)
    return max(0.0, 1 - report.separation.looks * chances)


@pytest.mark.parametrize("granularity", ["kind", "component"])
@pytest.mark.parametrize("candidates", [KINDS, ("FC2", "MHA", "FC1")])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:.*ranks high because")
def test_any_cut_has_a_confidence(
    report: PlasticityReport, granularity: str, candidates: tuple[str, ...], top_k: int
) -> None:
    found = report.select(top_k, granularity=granularity, candidates=candidates)
    assert 0 <= found.confidence <= 1
    assert found.confidence == pytest.approx(by_hand(report, granularity, top_k, candidates))
    units = 5 if granularity == "kind" else len(report.scores)
    assert report.select(units, granularity=granularity).confidence == 1  # there is nothing to confuse


@pytest.mark.filterwarnings("ignore:.*ranks high because")
def test_a_report_with_its_separation_is_read_as_it_was_written(report: PlasticityReport) -> None:
    read = PlasticityReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert read == report
    assert read.select(2).confidence == report.select(2).confidence
    values = report.to_dict()
    del values["separation"], values["batch_size"]
    old = PlasticityReport.from_dict(values)
    assert (old.separation, old.batch_size, old.select(2).confidence) == (None, None, None)
    assert in_words(old.select().confidence) == "unknown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": [1.0]}, "separation.kinds must have 10 entries, one per pair of kinds, got 1"),
        ({"components": [1.0]}, "separation.components must have 45 entries"),
        ({"kinds": [-1.0] * 10}, "separation.kinds.0 must be greater than or equal to 0"),
        ({"kinds": [99.0] * 10}, "separation.kinds.0 must be less than or equal to 37"),
        ({"looks": 0}, "separation.looks must be"),
        ({"reached": 2.0}, "separation.reached must be less than or equal to 1"),
    ],
)
def test_a_separation_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    values = measure_plasticity(tiny_model(), IMAGES, criterion="bound").to_dict()
    with pytest.raises(ReportError, match=message):
        PlasticityReport.from_dict({**values, "separation": {**values["separation"], **changes}})


def test_a_settled_report_is_as_sure_as_promised() -> None:
    report = measure_plasticity(tiny_model(), IMAGES, max_samples=1000)
    assert report.ending.settled
    assert report.separation.looks == 2
    assert report.separation.reached == pytest.approx(report.select().confidence, abs=1e-5)
    assert report.select().confidence >= 0.95
    assert measure_plasticity(tiny_model(), IMAGES, settle=None).separation.reached is None


def test_a_cut_that_is_not_settled_is_warned_of() -> None:
    report = measure_plasticity(tiny_model(), IMAGES, max_samples=1000)
    unsure = replace(report, separation=replace(report.separation, kinds=(1.0,) * 10))
    with warned_of_selections() as messages:
        assert report.select().confidence >= 0.95
        assert messages == []
        assert unsure.select().confidence == 0
        assert unsure.select().tied == ()
    (warning,) = messages  # once
    unit = report.ranking()[0].unit
    assert warning.startswith(f"The selection of {unit} from {report.samples} images is not settled: ")
    assert "its confidence is below 1 %. More images (max_samples=...), or another top_k or budget" in warning


def test_what_measuring_promised_is_what_a_selection_is_held_to() -> None:
    report = measure_plasticity(tiny_model(), IMAGES, max_samples=1000)
    apart = replace(report, separation=replace(report.separation, kinds=(2.6,) * 10))  # p = 0.009
    assert report.ending is not None
    with warned_of_selections() as messages:
        assert 0.9 < apart.select().confidence < 0.95
        assert len(messages) == 1
        replace(apart, ending=replace(report.ending, confidence=0.8)).select()
        assert len(messages) == 1
        replace(apart, ending=None).select(2)
        assert len(messages) == 2


@pytest.mark.parametrize("granularity", ["kind", "component"])
def test_a_tie_is_said_to_be_one(granularity: str) -> None:
    """Whatever the report contains beside the scores: for exact ones, for those of older releases."""
    report = measure_plasticity(tiny_model(), criterion="bound")
    ranking = [row.unit for row in report.ranking(granularity)]
    rows = {row.unit: row.score for row in report.ranking(granularity)}
    first, second, third = ranking[:3]
    level = {second: rows[first], third: rows[first]}
    equal = replace(
        report,
        kinds=tuple(replace(row, mean=level.get(row.kind, row.mean)) for row in report.kinds),
        scores=tuple(replace(row, mean=level.get(row.id, row.mean)) for row in report.scores),
        separation=None,
    )
    with warned_of_selections() as messages:
        for top_k in (1, 2):
            selection = equal.select(top_k, granularity=granularity)
            assert set(selection.tied) == {first, second, third}
            assert in_words(selection.confidence, selection.tied).startswith("none, because the scores of ")
            assert "selection: a tie" in equal.plot("ranking", selection=selection).get_title()
        assert len(messages) == 2
        assert "are equal. Another top_k or budget may settle it." in messages[0]
        assert equal.select(3, granularity=granularity).tied == ()
        assert report.select(2, granularity=granularity).tied == ()
        assert len(messages) == 2
    if granularity == "kind":
        assert "Confidence of top_k=1, 2, 3, 4: tie, tie, unknown, unknown." in str(equal)
        assert "Confidence" not in str(report)  # exact, and known to be


@pytest.mark.parametrize("apart", [9.0, 0.1], ids=["sure", "unsure"])
@pytest.mark.parametrize("wide", [True, False], ids=["overlap", "apart"])
def test_a_sure_selection_is_called_paired_if_the_intervals_overlap(apart: float, wide: bool) -> None:
    means = {"LN1": [5, 5], "MHA": [4, 4], "LN2": [3, 3], "FC1": [2, 2], "FC2": [1, 1]}
    report = make_report(means)
    half = 0.6 if wide else 0.4  # of an interval, and the means are 1 apart
    report = replace(
        report,
        kinds=tuple(replace(row, error=half / 1.96) for row in report.kinds),
        separation=Separation(kinds=(apart,) * 10, components=None, looks=1),
    )
    selection, said = report.select(2), "paired comparison: 95 % intervals overlap"
    expected = wide and apart > 1
    for view in ("ranking", "depth", "heatmap"):
        assert (said in report.plot(view, selection=selection).get_title()) == expected
        assert said not in report.plot(view).get_title()
    assert (said in str(report)) == (said in sure_in_words(report, selection)) == expected


def test_a_picture_says_which_scores_are_equal() -> None:
    means = {"LN1": [5, 5], "MHA": [4, 4], "LN2": [5, 5], "FC1": [2, 2], "FC2": [1, 1]}
    report = make_report(means)
    for view in ("ranking", "depth"):
        assert "equal scores: LN1, LN2" in report.plot(view).get_title()
        assert (
            "equal"
            not in make_report(dict(zip(means, [[1, 5], [2, 6], [3, 7], [4, 8], [5, 9]], strict=True)))
            .plot(view)
            .get_title()
        )
    by_component = report.select(3, granularity="component")
    title = report.plot("ranking", selection=by_component).get_title()
    assert "equal scores: 10 of 10" in title
    assert "selection: a tie of 4 equal scores (0.LN1, 0.LN2, 1.LN1, 1.LN2)" in title


def test_scores_that_weights_give_exactly_are_tied_if_they_are_equal() -> None:
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm_" in name and name.endswith("weight"):
                parameter.fill_(7.0)
    found = measure_plasticity(model, criterion="condition_number")
    place = [row.unit for row in found.ranking()].index("LN2")
    selection = found.select(place)
    assert (selection.tied, selection.confidence) == (("LN1", "LN2"), 0)
    assert found.select(place + 1).confidence == 1
    assert AdapterDescription.of(selection, "lora", None).selection == selection


def test_an_adapter_keeps_the_confidence() -> None:
    report = measure_plasticity(tiny_model(), IMAGES)
    adapter = AdapterDescription.of(report.select(), "lora", None)
    values = json.loads(json.dumps(asdict(adapter)))
    assert read_as(AdapterDescription, values, ReportError).selection == adapter.selection
    del values["confidence"]
    assert read_as(AdapterDescription, values, ReportError).selection.confidence is None
    values["confidence"] = 1.5
    with pytest.raises(ReportError, match="confidence must be less than or equal to 1"):
        read_as(AdapterDescription, values, ReportError)


# ---- no more often wrong than it says


def chosen(
    generator: np.random.Generator, means: np.ndarray, effects: np.ndarray, choice: TopK | Budget, repetitions: int
) -> list[tuple[set[str], float]]:
    """Returns what is chosen from noisy means, again and again, and the confidence of each."""
    covariance = effects @ effects.T
    first, second = np.triu_indices(len(means), 1)
    errors = np.sqrt(np.diag(covariance)[first] + np.diag(covariance)[second] - 2 * covariance[first, second])
    seen = means + generator.standard_normal((repetitions, effects.shape[1])) @ effects.T
    found = []
    for row in seen:
        ranking = [choice.units[number] for number in np.argsort(-row)]
        apart = (np.abs(row[first] - row[second]) / errors).clip(0, FARTHEST).tolist()
        found.append((set(choice.chosen(ranking)), confidence(choice, ranking, choice.units, apart, looks=1)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_a_selection_is_wrong_no_more_often_than_its_confidence_says(seed: int) -> None:
    """Whatever the means, how closely the units vary together and how many are chosen, near ties among them."""
    generator = np.random.default_rng(seed)
    for _ in range(6):
        units = int(generator.integers(2, 8))
        names = tuple("abcdefgh"[:units])
        scale = np.exp(generator.normal(0, generator.choice([0, 1, 3]), (units, 1)))
        effects = generator.standard_normal((units, int(generator.integers(1, units + 1)))) * scale
        means = generator.standard_normal(units) * generator.choice([1e-6, 0.3, 2])
        sizes = dict(zip(names, generator.integers(1, 9, units).tolist(), strict=True))
        best = [names[number] for number in np.argsort(-means)]
        for choice in (TopK(names, int(generator.integers(1, units))), Budget(names, 0.2, sizes, 100)):
            found = chosen(generator, means, effects, choice, repetitions=400)
            right = set(choice.chosen(best))
            for level in (0.5, 0.8, 0.95, 0.99):
                wrong = np.mean([sure >= level and units != right for units, sure in found])
                assert wrong <= stats.binom.ppf(1 - 1e-5, 400, 1 - level) / 400, (choice, level)


def test_confidence_is_high_where_units_are_apart_and_low_where_they_are_not() -> None:
    generator, names = np.random.default_rng(0), tuple("abcde")
    effects = np.eye(5)
    apart = chosen(generator, np.array([8.0, 0, 0, 0, 0]), effects, TopK(names, 1), 200)
    assert np.mean([sure > 0.95 for _, sure in apart]) > 0.95
    tied = chosen(generator, np.zeros(5), effects, TopK(names, 1), 200)
    assert np.mean([sure > 0.95 for _, sure in tied]) < 0.05


# ---- batches


def test_the_batch_size_is_in_the_report_of_criteria_on_batches() -> None:
    items = [{"pixel_values": image, "labels": torch.tensor(number % 3)} for number, image in enumerate(IMAGES)]
    report = measure_plasticity(tiny_model(), items, criterion="gradient_norm", batch_size=8)
    assert report.batch_size == 8
    assert "batches of up to 8 images" in str(report)
    assert measure_plasticity(tiny_model(), IMAGES, batch_size=8).batch_size is None


def test_a_large_model_has_no_distances_of_components() -> None:
    separation = Separation(kinds=(1.0,) * 10, components=None, looks=1)
    report = measure_plasticity(tiny_model(), IMAGES, criterion="bound")
    report = replace(report, separation=separation)
    assert report.select(2, granularity="component").confidence is None


def test_reports_of_different_batch_sizes_are_compared_with_a_warning() -> None:
    report = measure_plasticity(tiny_model(), IMAGES, criterion="feature_norm", batch_size=8)
    other = replace(report, batch_size=16)
    with pytest.warns(UserWarning, match="first was measured on batches of 8 images and second on batches of 16"):
        check_comparable(report, other, names=("first", "second"))
    check_comparable(report, report, names=("first", "second"))
    check_comparable(report, replace(report, batch_size=None), names=("first", "second"))


# ---- where it is shown


def run(*arguments: object) -> str:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).output


def test_the_confidence_is_shown(tmp_path: Path) -> None:
    report = measure_plasticity(tiny_model(), IMAGES)
    reached = in_words(report.separation.reached)
    assert f"Confidence reached: {reached}." in str(report)
    assert f"Confidence reached: {reached}." in report._repr_html_()
    each = ", ".join(in_words(report.select(top_k).confidence) for top_k in (1, 2, 3, 4))
    assert f"Confidence of top_k=1, 2, 3, 4: {each}" in str(report)
    unknown = replace(report, separation=None)
    assert "Confidence reached: unknown." in str(unknown)
    assert "Confidence of each top_k: unknown, because the report is of an older release." in unknown._repr_html_()
    selection = report.select()
    for view in ("depth", "ranking", "heatmap"):
        assert f"selection: confidence {reached}" in report.plot(view, selection=selection).get_title()
        assert "selection:" not in report.plot(view).get_title()
    for name, each, shown in (("report", report, reached), ("old", unknown, "unknown")):
        each.save(tmp_path / f"{name}.json")
        assert (
            f"confidence {shown}" in run("select", tmp_path / f"{name}.json", "--head", "classifier").splitlines()[0]
        )
        record = AdapterRecord(each, AdapterDescription.of(each.select(), "lora", None))
        (tmp_path / name).mkdir()
        record.write(tmp_path / name)
        assert f"Confidence of the selection: {shown}" in run("show", tmp_path / name)


def test_a_model_card_shows_the_confidence(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), PlasticityConfig(target_data=IMAGES))
    model.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert f"| confidence of the selection | {in_words(model.peft_config['default'].selection.confidence)} |" in card
