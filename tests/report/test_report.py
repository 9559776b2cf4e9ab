"""The report: ranking, selection, text, and files that are whole or refused."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from plasticity_peft.components.component import KINDS, MATRIX_KINDS
from plasticity_peft.errors import ConfigError, PlasticityError, ReportError, SelectionError
from plasticity_peft.report.provenance import Provenance
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.scores import Ending, KindScore, Score
from plasticity_peft.report.selection import SelectionRule
from tests.support.models import REPOSITORY, random_images, tiny_model
from tests.support.processes import python

PARAMETERS = {"LN1": 32, "MHA": 1088, "LN2": 32, "FC1": 544, "FC2": 528}
FEATURES = {"LN1": (), "MHA": ((16, 16),) * 4, "LN2": (), "FC1": ((16, 32),), "FC2": ((32, 16),)}
NAMES = {"MHA": ("q_proj", "k_proj", "v_proj", "o_proj"), "FC1": ("mlp.fc1",), "FC2": ("mlp.fc2",)}


def make_report(means: dict[str, list[float]] | None = None) -> PlasticityReport:
    """Returns a report of two blocks; `means` gives the score of each kind, block by block."""
    means = means or {"LN1": [4, 5], "MHA": [2, 1], "LN2": [6, 3], "FC1": [1.5, 3.5], "FC2": [1, 1]}
    scores = tuple(
        Score(
            block=block,
            kind=kind,
            path=f"vit.layers.{block}.{kind}",
            modules=tuple(f"vit.layers.{block}.{name}" for name in NAMES.get(kind, (kind,))),
            mean=float(means[kind][block]),
            std=0.5,
            samples=100,
            parameters=PARAMETERS[kind],
            features=FEATURES[kind],
        )
        for block in range(2)
        for kind in KINDS
    )
    return PlasticityReport(
        scores=scores,
        kinds=tuple(KindScore(kind=kind, mean=sum(means[kind]) / 2, std=0.25, samples=100) for kind in KINDS),
        model_type="vit",
        model_parameters=10_000,
        inputs="embedding",
        samples=100,
        skipped=2,
        seed=7,
        uses_source=True,
        versions={"torch": "2.13.0"},
    )


REPORT = make_report()


def test_ranking_of_kinds_is_best_first() -> None:
    ranking = REPORT.ranking()
    assert [tuple(row) for row in ranking] == [
        ("LN1", 4.5, 0.025), ("LN2", 4.5, 0.025), ("FC1", 2.5, 0.025), ("MHA", 1.5, 0.025), ("FC2", 1.0, 0.025),
    ]  # fmt: skip
    assert (ranking[0].unit, ranking[0].score, ranking[0].standard_error) == ("LN1", 4.5, 0.025)


def test_ranking_of_blocks_is_best_first() -> None:
    units = [row.unit for row in REPORT.ranking("component", ("MHA", "FC1", "FC2"))]
    assert units == ["1.FC1", "0.MHA", "0.FC1", "0.FC2", "1.MHA", "1.FC2"]


@pytest.mark.parametrize("granularity", ["kind", "component"])
def test_ties_keep_the_order_of_blocks_and_kinds(granularity: str) -> None:
    tied = make_report({kind: [1, 1] for kind in KINDS})
    expected = list(KINDS) if granularity == "kind" else [f"{block}.{kind}" for block in range(2) for kind in KINDS]
    assert [row.unit for row in tied.ranking(granularity)] == expected
    assert tied.select(top_k=1, candidates=("FC2", "MHA")).units == ("MHA",)


def test_a_selection_names_units_modules_and_parameters() -> None:
    selection = REPORT.select(top_k=2, r=4, candidates=MATRIX_KINDS)
    assert selection.units == ("FC1", "MHA")
    assert selection.components == ("0.MHA", "0.FC1", "1.MHA", "1.FC1")
    assert selection.modules[:5] == tuple(f"vit.layers.0.{name}" for name in (*NAMES["MHA"], "mlp.fc1"))
    assert selection.parameters == {"lora": 2 * (4 * 4 * 32 + 4 * 48), "full": 2 * (1088 + 544)}
    assert REPORT.select().units == ("LN1",)
    assert REPORT.select(top_k=3).units == ("LN1", "LN2", "FC1")
    assert REPORT.select(candidates="LN1").parameters == {"lora": 64, "full": 64}


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("granularity", ["kind", "component"])
@pytest.mark.parametrize("candidates", [("MHA", "FC1", "FC2"), KINDS])
def test_a_budget_is_kept_and_a_larger_one_drops_nothing(
    training: str, granularity: str, candidates: tuple[str, ...]
) -> None:
    before: tuple[str, ...] = ()
    ranked = [row.unit for row in REPORT.ranking(granularity, candidates)]
    for percent in range(1, 101):
        try:
            chosen = REPORT.select(
                budget=percent / 100, granularity=granularity, candidates=candidates, training=training
            )
        except ConfigError:
            assert before == ()
            continue
        assert chosen.parameters[training] <= percent / 100 * REPORT.model_parameters
        assert list(chosen.units) == ranked[: len(chosen.units)]
        assert chosen.units[: len(before)] == before
        before = chosen.units
    assert before == tuple(ranked)


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("granularity", ["kind", "component"])
@pytest.mark.parametrize("candidates", [("MHA", "FC2"), KINDS])
def test_the_budget_that_an_error_names_is_the_smallest_that_works(
    training: str, granularity: str, candidates: tuple[str, ...]
) -> None:
    options = {"training": training, "granularity": granularity, "candidates": candidates}
    with pytest.raises(SelectionError) as caught:
        REPORT.select(budget=1e-6, **options)
    assert caught.value.report is REPORT
    named = float(re.search(r"at least (\S+),", str(caught.value))[1])
    assert REPORT.select(budget=named, **options).units
    with pytest.raises(SelectionError):
        REPORT.select(budget=0.989 * named, **options)  # it has three digits
    rule = SelectionRule(budget=1e-6, **options)
    with pytest.raises(SelectionError, match="smallest unit") as known:
        rule.check_possible(REPORT.scores, REPORT.model_parameters)
    smallest, enough = map(float, re.findall(r" of (0\.\d+) fits ", str(known.value)))
    for budget in (smallest, enough):
        SelectionRule(budget=budget, **options).check_possible(REPORT.scores, REPORT.model_parameters)
    for order in (candidates, candidates[::-1]):
        means = {kind: [1, 1] if kind not in order else [2 + order.index(kind)] * 2 for kind in KINDS}
        assert make_report(means).select(budget=enough, **options).units


def test_a_budget_too_small_says_what_is_enough() -> None:
    with pytest.raises(
        ConfigError, match=r"is 10 of 10,000 .* less than the 1,088 .* FC1. Give a budget of at least 0.109,"
    ):
        REPORT.select(budget=0.001, training="full", candidates=MATRIX_KINDS)
    assert REPORT.select(budget=0.109, training="full", candidates=MATRIX_KINDS).units == ("FC1",)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"top_k": 0}, "top_k must be a whole number of at least 1. Got 0"),
        ({"top_k": -1}, "Got -1"),
        (
            {"top_k": 4, "candidates": MATRIX_KINDS},
            r"from 1 to 3, the number of units to choose from \(MHA, FC1, FC2\). Got 4",
        ),
        ({"top_k": 11, "granularity": "component"}, r"from 1 to 10, .*\(0.LN1, 0.MHA, 0.LN2, ..., 1.FC2\)"),
        ({"top_k": True}, "Got True"),
        ({"top_k": 1.0}, "Got 1.0"),
        ({"budget": -0.1}, "above 0 and at most 1"),
        ({"budget": "1 hour"}, "Got '1 hour'"),
        ({"budget": float("nan")}, "Got nan"),
        ({"top_k": 1, "budget": 0.5}, "not both"),
        ({"granularity": "head"}, "granularity must be one of 'kind', 'component'. Got 'head'"),
        ({"training": "ia3"}, "training must be one of 'lora', 'full'"),
        ({"candidates": ("MHA", "MHA")}, "each once"),
        ({"candidates": ["QKV"]}, "one or more of LN1, MHA, LN2, FC1, FC2"),
        ({"candidates": "0.MHA"}, r"\('0.MHA',\) names components, .* Give granularity='component'"),
        ({"candidates": ("MHA", "2.FC1"), "granularity": "component"}, "model, 0.LN1 to 1.FC2. Got '2.FC1'"),
        ({"candidates": ("0.MHA", "0.MHA"), "granularity": "component"}, "each once"),
        ({"candidates": "1.2.3.MHA", "granularity": "component"}, "ids of components such as 3.MHA"),
        (
            {"candidates": ("0.MHA", "0.FC1"), "granularity": "component", "top_k": 3},
            r"from 1 to 2, .*\(0.MHA, 0.FC1\)",
        ),
        ({"candidates": 3}, "Got 3"),
    ],
)
def test_an_impossible_choice_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        REPORT.select(**arguments)


@pytest.mark.parametrize("wanted", [("0.MHA",), ("1.FC2", "0.LN1"), ("FC1", "1.MHA"), ("MHA", "0.MHA")])
def test_candidates_may_be_components(wanted: tuple[str, ...]) -> None:
    expected = [row.id for row in REPORT.scores if row.kind in wanted or row.id in wanted]
    ranked = [row.unit for row in REPORT.ranking("component", wanted)]
    assert sorted(ranked) == sorted(expected)
    assert ranked == [row.unit for row in REPORT.ranking("component") if row.unit in expected]
    chosen = REPORT.select(len(expected), granularity="component", candidates=wanted)
    assert list(chosen.components) == expected
    assert REPORT.select(granularity="component", candidates=set(wanted)).units == tuple(ranked[:1])
    everything = REPORT.select(budget=1.0, granularity="component", candidates=wanted, training="full")
    assert everything.units == tuple(ranked)


@pytest.mark.parametrize(
    "options",
    [{"r": 5}, {"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"q_proj|query": 3, "fc2|output.dense": 7}}],
)
def test_lora_parameters_are_what_peft_makes(options: dict[str, Any]) -> None:
    from plasticity_peft import measure_plasticity

    model = tiny_model()
    report = measure_plasticity(model, random_images(), max_samples=2)
    selection = report.select(top_k=3, candidates=MATRIX_KINDS, **options)
    config = LoraConfig(target_modules=list(selection.modules), **options)
    trainable, _ = get_peft_model(model, config).get_nb_trainable_parameters()
    assert selection.parameters["lora"] == trainable


def test_a_saved_report_is_equal_and_keys_of_others_are_left_alone(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "plasticity.json")
    assert PlasticityReport.load(tmp_path / "plasticity.json") == REPORT
    assert [path.name for path in tmp_path.iterdir()] == ["plasticity.json"]
    values = {**REPORT.to_dict(), "adapter": {"units": ["MHA"]}, "note": None}
    assert PlasticityReport.from_dict(values) == REPORT


def test_a_report_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "whole.json")
    text = (tmp_path / "whole.json").read_text()
    path = tmp_path / "cut.json"
    for length in range(0, len(text.rstrip()) - 1, 61):
        path.write_text(text[:length])
        with pytest.raises(ReportError, match=r"Cannot read the report .*cut\.json: it is not a whole JSON file"):
            PlasticityReport.load(path)


def edited(*path: str | int, value: object = ...) -> dict[str, Any]:
    """Returns the report as a dictionary with the value at `path` replaced, or gone."""
    values = json.loads(json.dumps(REPORT.to_dict()))
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return values


ADDED_SINCE = ("stage", "features", "criterion", "title", "observed", "input_std", "ending")
ADDED_SINCE += ("target_provenance", "source_provenance", "batch_size", "separation", "error", "costs")
ADDED_SINCE += ("forecast",)
FIELDS = [*((name,) for name in REPORT.to_dict()), *(("scores", 3, name) for name in REPORT.to_dict()["scores"][3])]
WRONG_TYPES: list[object] = [None, "text", 1.5, [1], {"a": 1}, True, -3]


@pytest.mark.parametrize("path", [path for path in FIELDS if path[-1] not in ADDED_SINCE])
def test_a_missing_value_is_refused(path: tuple[str | int, ...]) -> None:
    with pytest.raises(ReportError, match=r"is missing|not a plasticity report|format version|scores|kinds"):
        PlasticityReport.from_dict(edited(*path))


@pytest.mark.parametrize(("path", "value"), list(itertools.product(FIELDS, WRONG_TYPES)))
def test_a_value_of_a_wrong_type_is_refused_or_means_the_same(path: tuple[str | int, ...], value: object) -> None:
    values = edited(*path, value=value)
    try:
        report = PlasticityReport.from_dict(copy.deepcopy(values))
    except ReportError:
        return
    assert json.loads(json.dumps(report.to_dict())) == values


@pytest.mark.parametrize(
    "values",
    [
        edited("scores", 2, "mean", value=float("nan")),
        edited("scores", 2, "std", value=float("inf")),
        edited("kinds", 0, "mean", value=-1.0),
        edited("scores", 0, "samples", value=99),
        edited("samples", value=1),
        edited("inputs", value="pixels"),
        edited("observed", value="tokens"),
        edited("scores", value=REPORT.to_dict()["scores"][1:]),
        edited("scores", value=REPORT.to_dict()["scores"][::-1]),
        edited("scores", value=REPORT.to_dict()["scores"][:5] * 2),
        edited("scores", value=[]),
        edited("kinds", value=REPORT.to_dict()["kinds"][1:]),
        edited("scores", 1, "features", value=[[16, 16]]),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ReportError):
        PlasticityReport.from_dict(values)


OLD_KEYS = {"samples": "pairs", "uses_source": "source"}
OLD_KEYS |= {"target_provenance": "target_data", "source_provenance": "source_data", "planned": "most"}


def in_version_1(values: Any) -> Any:
    """Returns a report as version 1 of the format has it."""
    if isinstance(values, list):
        return [in_version_1(value) for value in values]
    if not isinstance(values, dict):
        return "block" if values == "component" else values
    old = {OLD_KEYS.get(key, key): in_version_1(value) for key, value in values.items()}
    return {**old, "format_version": 1} if "format_version" in old else old


ENDED = replace(
    REPORT,
    ending=Ending(settled=True, units=("0.LN2", "1.LN1"), granularity="component", confidence=0.95, planned=100),
    target_provenance=Provenance(form="Dataset", images=12, repo_id="user/birds"),
    source_provenance=Provenance(form="generator"),
)


@pytest.mark.parametrize("report", [REPORT, ENDED], ids=["plain", "ended"])
def test_a_report_of_version_1_is_read_without_a_warning(report: PlasticityReport, tmp_path: Path) -> None:
    old = in_version_1(json.loads(json.dumps(report.to_dict())))
    assert not set(OLD_KEYS) & {
        key for row in (old, *old["scores"], *old["kinds"], old["ending"] or {}) for key in row
    }
    assert PlasticityReport.from_dict(old) == report
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert PlasticityReport.load(tmp_path / "old.json") == report
    assert report.to_dict()["format_version"] == 2


@pytest.mark.parametrize("changes", [{"scores": 3}, {"kinds": [5]}, {"ending": "x"}, {"ending": []}, {"scores": {}}])
def test_a_damaged_report_of_version_1_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match=f"^{next(iter(changes))}"):
        PlasticityReport.from_dict({**in_version_1(json.loads(json.dumps(REPORT.to_dict()))), **changes})


@pytest.mark.parametrize("version", [0, 3, "2", 2.0, True, None])
def test_another_version_is_refused(version: object) -> None:
    with pytest.raises(
        ReportError, match=f"has format version {version!r}, and this release .* reads versions 1 to 2"
    ):
        PlasticityReport.from_dict({**REPORT.to_dict(), "format_version": version})


@pytest.mark.parametrize(
    ("owner", "old", "new"),
    [
        (ENDED, "pairs", "samples"), (ENDED, "source", "uses_source"), (ENDED, "target_data", "target_provenance"),
        (ENDED, "source_data", "source_provenance"), (ENDED.scores[0], "pairs", "samples"),
        (ENDED.kinds[0], "pairs", "samples"), (ENDED.ending, "most", "planned"),
    ],
)  # fmt: skip
def test_old_names_of_attributes_are_read_with_a_warning(owner: Any, old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=rf"\.{old} is deprecated .* Use \w+\.{new} instead") as warned:
        assert getattr(owner, old) == getattr(owner, new)
    assert warned[0].filename == __file__


def test_the_old_name_of_a_granularity_is_accepted_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match='Use granularity="component" instead') as warned:
        assert REPORT.ranking("block") == REPORT.ranking("component")
    with pytest.warns(FutureWarning, match='Use granularity="component" instead'):
        assert REPORT.select(granularity="block").granularity == "component"
    assert warned[0].filename == __file__


def test_a_report_is_hashable_and_its_fields_are_described() -> None:
    assert len({REPORT, copy.deepcopy(REPORT), replace(REPORT, seed=8)}) == 2
    described = re.findall(r"^    (\w+): ", inspect.getdoc(PlasticityReport) or "", flags=re.MULTILINE)
    assert described == [field.name for field in fields(PlasticityReport)]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", "", "deep.json", "bytes.json"):
        with pytest.raises(PlasticityError, match=f"Cannot read the report .*{name}"):
            PlasticityReport.load(tmp_path / name)


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plasticity.json"
    REPORT.save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace(REPORT, seed=8).save(path)
    assert PlasticityReport.load(path) == REPORT
    assert [file.name for file in tmp_path.iterdir()] == ["plasticity.json"]


def test_the_table() -> None:
    assert str(REPORT) == (
        "Plasticity of vit, embedding inputs, 100 pairs (2 skipped) of a source and a target image, seed 7\n"
        "| rank | kind | rate of change | std. error |     lowest block |    highest block | parameters |\n"
        "|------|------|----------------|------------|------------------|------------------|------------|\n"
        "|    1 | LN1  |         4.5000 |     0.0250 | 4.0000 (block 0) | 5.0000 (block 1) |         64 |\n"
        "|    2 | LN2  |         4.5000 |     0.0250 | 3.0000 (block 1) | 6.0000 (block 0) |         64 |\n"
        "|    3 | FC1  |         2.5000 |     0.0250 | 1.5000 (block 0) | 3.5000 (block 1) |      1,088 |\n"
        "|    4 | MHA  |         1.5000 |     0.0250 | 1.0000 (block 1) | 2.0000 (block 0) |      2,176 |\n"
        "|    5 | FC2  |         1.0000 |     0.0250 | 1.0000 (block 0) | 1.0000 (block 0) |      1,056 |\n"
        "Confidence of top_k=1, 2, 3, 4: tie, unknown, unknown, unknown."
    )


def test_scores_that_read_only_weights_have_no_error() -> None:
    rows = {"std": 0.0, "samples": 0}
    report = replace(
        REPORT,
        scores=tuple(replace(row, **rows) for row in REPORT.scores),
        kinds=tuple(replace(row, **rows) for row in REPORT.kinds),
        criterion="bound", title="upper bound", observed="weights", inputs=None, samples=0, skipped=0,
        uses_source=False,
    )  # fmt: skip
    assert {row.standard_error for row in report.ranking()} == {0.0}
    assert str(report).startswith("Upper bound of vit, weights, seed 7\n| rank | kind | upper bound | std. error |")
    assert "|     0.0000 |" in str(report)
    assert PlasticityReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_norms_that_lead_for_the_scale_of_the_tokens_are_explained(recwarn: pytest.WarningsRecorder) -> None:
    small = replace(REPORT, input_std=0.18)
    explanation = (
        "LN1 ranks high because a layer norm divides by the standard deviation of its input, which is 0.18 in"
    )
    assert explanation in str(small)
    with pytest.warns(UserWarning, match=explanation):
        assert small.select().units == ("LN1",)
    with pytest.warns(UserWarning, match="0.LN2 ranks high"):
        small.select(granularity="component")
    silent = [
        (small, {"candidates": MATRIX_KINDS}),
        (replace(REPORT, input_std=1.5), {}),
        (replace(small, criterion="gradient_norm", inputs=None), {}),
        (REPORT, {}),
    ]
    for report, options in silent:
        report.select(**options)
    assert not recwarn.list


def test_reports_are_read_and_selected_from_without_torch(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "plasticity.json")
    script = (
        "import sys, types\n"
        "package = types.ModuleType('plasticity_peft')\n"
        f"package.__path__ = [{str(REPOSITORY / 'plasticity_peft')!r}]\n"
        "sys.modules['plasticity_peft'] = package\n"
        "from plasticity_peft.report.report import PlasticityReport\n"
        f"report = PlasticityReport.load({str(tmp_path / 'plasticity.json')!r})\n"
        "print(report.select(top_k=2).units, report)\n"
        "assert not {'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)\n"
    )
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("('LN1', 'LN2') Plasticity of vit")
