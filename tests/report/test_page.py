"""The page of a report: every cut on it is what the library selects, and nothing in a report can break out of it.

tests/extras opens it in a browser.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from plasticity_peft import PlasticityConfig, measure_plasticity
from plasticity_peft.card import update_card
from plasticity_peft.cli.app import app
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ConfigError, MissingExtraError
from plasticity_peft.report.cuts import LIMITS, every_series
from plasticity_peft.report.forecast import Forecast, SetForecast
from plasticity_peft.report.head import HeadFit
from plasticity_peft.report.page import library
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import SelectionRule
from tests.report.test_report import REPORT
from tests.support.models import REPOSITORY, tiny_model
from tests.support.pictures import pages_have_no_library  # noqa: F401

OWN = (REPOSITORY / "plasticity_peft/report/page.js").read_text().strip()
"""The script of the page, which comes after the library that draws."""


@pytest.fixture(scope="module")
def report() -> PlasticityReport:
    """A report with costs, on which no two kinds cost the same share."""
    return measure_plasticity(tiny_model("vit"), torch.rand(8, 3, 8, 8), max_samples=8)


class Parsed(HTMLParser):
    """The elements of a page, their attributes, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


RULES = [
    SelectionRule(),
    SelectionRule(candidates=("LN1", "MHA", "FC1"), r=4, use_dora=True, lora_bias=True),
    SelectionRule(rank_pattern={"fc1": 2}),
    SelectionRule(granularity="component", candidates=("LN1", "0.MHA", "1.FC1")),
]


@pytest.mark.usefixtures("pages_have_no_library")
@pytest.mark.parametrize("rule", RULES, ids=["usual", "candidates", "ranks", "components"])
def test_every_cut_is_what_select_selects(report: PlasticityReport, rule: SelectionRule) -> None:
    page = Parsed(
        report.to_html(
            granularity=rule.granularity, candidates=rule.candidates, r=rule.r, rank_pattern=rule.rank_pattern,
            use_dora=rule.use_dora, lora_bias=rule.lora_bias,
        )
    )  # fmt: skip
    data, granularities = page.data, {"kind", "component"} if rule.granularity == "kind" else {"component"}
    assert set(data["series"]) == {f"{g} {t} {u}" for g in granularities for t in ("lora", "full") for u in LIMITS}
    assert {each["value"] for tag, each in page.elements if tag == "option"} >= granularities
    for name, cuts in data["series"].items():
        granularity, training, limited = name.split()
        units = len(report.ranking(granularity, rule.candidates))
        assert limited != "units" or [len(cut["units"]) for cut in cuts] == list(range(1, units + 1))
        for cut in cuts:
            found = eval(cut["shown"]["call"], {"report": report})
            assert list(found.units) == cut["units"]
            assert [data["components"][place] for place in cut["components"]] == list(found.components)
            assert cut["shown"]["parameters"].startswith(f"{found.parameters[training]:,} (")
            assert cut["shown"]["time"].startswith(f"{found.cost.time:.2f} of")
            assert cut["shown"]["memory"].startswith(f"{found.cost.memory:.2f} of")
            assert found.cost.file_size == cut["shown"]["file"]


@pytest.mark.parametrize("granularity", ["kind", "component"])
def test_the_cuts_of_parameters_are_those_at_which_another_unit_fits(
    report: PlasticityReport, granularity: str
) -> None:
    (series,) = (one for one in every_series(report, SelectionRule()) if one.name == f"{granularity} full parameters")
    limits = [cut.limit for cut in series.cuts]
    assert limits == sorted(set(limits))
    for percent in range(1, 101):
        fits = [cut for cut in series.cuts if cut.limit <= percent / 100]
        try:
            found = report.select(budget=percent / 100, granularity=granularity, training="full").units
        except ConfigError:
            assert not fits
            continue
        # Rounded up to two digits, a cut may come up to a tenth later than the unit fits.
        later = [cut for cut in series.cuts if cut.limit <= percent / 100 * 1.1]
        assert found in {cut.selection.units for cut in (*fits[-1:], *later)}


def test_without_costs_there_are_no_budgets_of_time_and_memory() -> None:
    assert REPORT.costs is None
    assert {one.limited for one in every_series(REPORT, SelectionRule())} == {"units", "parameters"}


@pytest.mark.usefixtures("pages_have_no_library")
def test_the_page_begins_with_what_was_trained(report: PlasticityReport) -> None:
    chosen = report.select(budget="0.6 memory", granularity="component", training="full")
    parsed = Parsed(report.to_html(selection=chosen, granularity="component", training="full"))
    start = parsed.data["start"]
    cut = parsed.data["series"][start["series"]][start["place"]]
    assert set(cut["units"]) == set(chosen.units)
    assert set(start["chosen"]) == {*chosen.units, *chosen.components}
    assert start["granularity"] == "component"


@pytest.mark.usefixtures("pages_have_no_library")
@pytest.mark.parametrize(
    "given",
    [
        {"candidates": ("FC1", "FC2"), "top_k": 2},
        {"candidates": ("LN2", "FC1", "MHA"), "granularity": "component", "top_k": 3},
        {"candidates": ("0.FC2", "1.LN1", "1.MHA"), "granularity": "component", "top_k": 3},
        {"granularity": "component", "top_k": 3},
    ],
)
def test_a_page_of_a_selection_of_some_candidates_can_make_it(report: PlasticityReport, given: dict[str, Any]) -> None:
    chosen = report.select(**given, training="full")
    data = Parsed(report.to_html(selection=chosen, training="full")).data
    cut = data["series"][data["start"]["series"]][data["start"]["place"]]
    assert set(cut["units"]) == set(chosen.units)
    call: str = cut["shown"]["call"]
    again = eval(call, {"report": report})
    assert (set(again.units), again.granularity) == (set(chosen.units), chosen.granularity)
    assert ("candidates" in call) == ("candidates" in given)
    longer = data["series"][data["start"]["series"]][-1]["units"]
    outside = set(report.select(top_k=len(chosen.units), granularity=chosen.granularity).units) - set(chosen.units)
    assert not outside & set(longer), "units that rank above it were no candidates"


HOSTILE = "</script><script>alert(1)</script><!-- <script> <img src=http://example.org/x>"


@pytest.mark.usefixtures("pages_have_no_library")
def test_no_text_in_a_report_becomes_a_part_of_the_page(report: PlasticityReport) -> None:
    hostile = replace(report, title=HOSTILE, model_type=HOSTILE, criterion=HOSTILE)
    head = HeadFit("single_label_classification", 0.6, 0.9, 1.0, 1.0, 8, 4, 2)
    one = SetForecast(
        name=HOSTILE, components=("0.MHA",), parameters=1, accuracy=0.7, error=0.1, gain=0.1, gain_error=0.1
    )
    forecast = Forecast(model_type=HOSTILE, seed=0, head=head, head_error=0.1, sets=(one,))
    parsed, usual = (
        Parsed(each.to_html(forecast=forecast if each is hostile else replace_names(forecast)))
        for each in (hostile, report)
    )
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in usual.elements]
    assert [script.strip() for script in parsed.scripts[1:]] == [OWN]
    assert HOSTILE in json.dumps(parsed.data)


def replace_names(forecast: Forecast) -> Forecast:
    return replace(forecast, model_type="vit", sets=tuple(replace(one, name="MHA") for one in forecast.sets))


@pytest.mark.usefixtures("pages_have_no_library")
def test_the_page_has_the_forecast_of_the_report_or_the_one_that_is_given(report: PlasticityReport) -> None:
    head = HeadFit("single_label_classification", 0.6, 0.9, 1.0, 1.0, 8, 4, 2)
    first, second = (
        Forecast(model_type="vit", seed=0, head=head, head_error=0.1, sets=(
            SetForecast(name=name, components=("0.MHA",), parameters=1, accuracy=0.7, error=0.1, gain=0.1,
                        gain_error=0.1),
        ))
        for name in ("own", "given")
    )  # fmt: skip
    own = replace(report, forecast=first)
    for made, names in ((report.to_html(), []), (own.to_html(), ["own"]), (own.to_html(forecast=second), ["given"])):
        chart = Parsed(made).data["charts"].get("forecast")
        assert [row["set"] for row in chart["data"]["values"]] == names if names else chart is None
        assert ('<div class="chart" id="forecast">' in made) == bool(names)


@pytest.mark.usefixtures("pages_have_no_library")
def test_the_page_names_no_other_file_and_forbids_to_load_one(report: PlasticityReport) -> None:
    parsed = Parsed(report.to_html())
    assert not [attributes for _, attributes in parsed.elements if {"src", "href", "action"} & set(attributes)]
    (policy,) = (a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "eval" not in policy


@pytest.mark.usefixtures("pages_have_no_library")
def test_every_control_has_a_label_and_every_table_a_heading(report: PlasticityReport) -> None:
    page = report.to_html()
    for name in ("granularity", "training", "limited"):
        assert f'<select id="{name}">' in page.split("<label>", 1)[1]
    assert '<label for="place">' in page
    assert page.count('<th scope="row">') == len(KINDS) + len(report.scores)


def test_without_the_extra_an_error_says_what_to_install(
    report: PlasticityReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    library.cache_clear()
    monkeypatch.setattr("plasticity_peft.report.page.rule_and_series", None)  # is not reached
    with pytest.raises(MissingExtraError, match=r"plasticity_peft\[html\]"):
        report.to_html()
    report.save(tmp_path / "report.json")
    found = CliRunner().invoke(app, ["show", str(tmp_path / "report.json"), "--html", str(tmp_path / "page.html")])
    assert found.exit_code == 1
    assert "plasticity_peft[html]" in found.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("pages_have_no_library")
def test_an_adapter_is_saved_with_its_page_which_the_card_links_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PlasticityConfig(training="lora", criterion="bound", top_k=3, granularity="component", r=2)
    model = get_peft_model(tiny_model("vit"), config)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    page = (folder / "plasticity.html").read_text()
    data = Parsed(page).data
    start = data["start"]
    assert set(data["series"][start["series"]][start["place"]]["units"]) == set(config.selection.units)
    assert "with LoRA (r=2)" in page
    assert "[plasticity.html](plasticity.html) shows what" in (folder / "README.md").read_text()
    shown = CliRunner().invoke(app, ["show", str(folder), "--html", str(tmp_path / "page.html")])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "page.html").read_text() == page
    update_card(folder)
    assert (folder / "plasticity.html").read_text() == page


def test_without_the_extra_the_card_has_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    library.cache_clear()
    logger = logging.getLogger("transformers.plasticity_peft.card")
    logger.addHandler(caplog.handler)
    with caplog.at_level("DEBUG", logger.name):
        get_peft_model(tiny_model("vit"), PlasticityConfig(training="lora", criterion="bound", r=3)).save_pretrained(
            tmp_path
        )
    logger.removeHandler(caplog.handler)
    assert not (tmp_path / "plasticity.html").exists()
    assert "plasticity.html" not in (tmp_path / "README.md").read_text()
    assert {record.levelname for record in caplog.records if "no page" in record.message} == {"DEBUG"}


@pytest.mark.usefixtures("pages_have_no_library")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--forecast", "forecast.json"], 2, "Give --html too"),
        (["--html", "page.txt"], 1, "must end with .html"),
        (["--html", "missing/page.html"], 1, "folder that exists"),
        (["--html", "page.html", "--forecast", "missing.json"], 1, "Cannot read the forecast"),
        (["--html", "page.html", "--forecast", "report.json"], 1, "Cannot read the forecast"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    REPORT.save("report.json")
    found = CliRunner().invoke(app, ["show", "report.json", *arguments])
    assert (found.exit_code, words in " ".join(found.output.split())) == (code, True), found.output
    assert not Path("page.html").exists()
