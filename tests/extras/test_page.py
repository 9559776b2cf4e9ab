"""The page of a report in a browser: what it shows is what the library selects, on a desk and on a phone.

`nox -s "tests(extras-3.12)"` has the packages. The browser is Chromium, of the machine.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plasticity_peft import PlasticityReport, measure_plasticity
from plasticity_peft.report.forecast import Forecast, SetForecast
from plasticity_peft.report.head import HeadFit
from plasticity_peft.report.page import in_blocks
from tests.support.models import tiny_model

pytestmark = pytest.mark.slow
HAS_THEM = "is not installed; nox -s 'tests(extras-3.12)' has it"
pytest.importorskip("vl_convert", reason=f"vl-convert-python {HAS_THEM}")
playwright = pytest.importorskip("playwright.sync_api", reason=f"playwright {HAS_THEM}")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

DESK, PHONE = {"width": 1100, "height": 800}, {"width": 375, "height": 700}
CONTROLS = ("granularity", "training", "limited", "place")


@pytest.fixture(scope="module")
def report() -> PlasticityReport:
    return measure_plasticity(tiny_model("vit"), torch.rand(8, 3, 8, 8), max_samples=8)


@pytest.fixture(scope="module")
def forecast() -> Forecast:
    head = HeadFit("single_label_classification", 0.6, 0.9, 1.0, 1.0, 8, 4, 2)
    rest = {"parameters": 9, "accuracy": 0.7, "error": 0.05, "gain": 0.1, "gain_error": 0.02}
    sets = (
        SetForecast(name="MHA", components=("0.MHA",), **rest),
        SetForecast(name="FC1", components=("0.FC1",), **rest),
    )
    return Forecast(model_type="vit", seed=0, head=head, head_error=0.1, sets=sets)


@pytest.fixture(scope="module")
def file(report: PlasticityReport, forecast: Forecast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(report.to_html(forecast=forecast), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Any]:
    """The page, which must ask for nothing but itself, and log nothing."""
    page = browser.new_page(viewport=request.param)
    events: list[str] = []
    page.on("request", lambda request: events.append(request.url))
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_selector("body[data-ready]")
    yield page
    assert events == [file.as_uri()]
    page.close()


def focus(page: Any, control: str) -> None:
    """Presses Tab until a control has the focus."""
    for _ in range(20):
        if page.evaluate("document.activeElement.id") == control:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{control} cannot be reached by Tab")


def choose(page: Any, **values: str) -> None:
    """Chooses values of the lists by typing their first letters."""
    for control, value in values.items():
        page.locator(f"#{control}").focus()
        words = page.inner_text(f"#{control} option[value={value}]")
        page.keyboard.type(words, delay=0)
        assert page.input_value(f"#{control}") == value


def shown(page: Any) -> dict[str, str]:
    """Returns what the page says of the cut."""
    found = page.eval_on_selector_all("dl [data-show]", "all => all.map(e => [e.dataset.show, e.textContent])")
    return dict(found)


def marked(page: Any) -> dict[str, Any]:
    """Returns what the charts mark: units of the ranking, and numbers of filled points and of frames."""
    last = "[...document.querySelectorAll('#{} .mark-{}.role-mark')].at(-1).querySelectorAll('path').length"
    bold = "[...document.querySelectorAll('#ranking text[font-weight=bold]')].map(e => e.textContent)"
    counted = {"ranking": ("ranking", "symbol"), "depth": ("depth", "symbol")}
    return {"units": page.evaluate(bold)} | {name: page.evaluate(last.format(*at)) for name, at in counted.items()}


def test_the_controls_are_reached_by_tab_in_their_order(page: Any) -> None:
    found = []
    for _ in CONTROLS:
        page.keyboard.press("Tab")
        found.append(page.evaluate("document.activeElement.id"))
    assert tuple(found) == CONTROLS
    assert "Cut" in page.evaluate("document.getElementById('place').labels[0].textContent")


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("granularity", ["kind", "component"])
def test_the_cut_is_moved_by_keys_and_shows_what_is_selected(
    page: Any, report: PlasticityReport, granularity: str, training: str
) -> None:
    choose(page, granularity=granularity, training=training)
    units = len(report.ranking(granularity))
    focus(page, "place")
    page.keyboard.press("Home")
    for top_k in range(1, units + 1):
        found = report.select(top_k, granularity=granularity, training=training)
        assert shown(page)["selected"] == in_blocks(found)
        assert shown(page)["parameters"].startswith(f"{found.parameters[training]:,} ")
        assert shown(page)["time"] == f"{found.cost.time:.2f} of finetuning everything"
        assert shown(page)["memory"] == f"{found.cost.memory:.2f} of finetuning everything"
        assert page.get_attribute("#place", "aria-valuetext") == page.inner_text("#limit") == f"{top_k} of {units}"
        page.wait_for_timeout(100)  # the charts are drawn after the text
        assert marked(page) == {"units": list(found.units), "ranking": top_k, "depth": len(found.components)}
        page.keyboard.press("ArrowRight")
    assert page.input_value("#place") == str(units - 1)


@pytest.mark.parametrize("limited", ["parameters", "time", "memory"])
def test_a_budget_is_moved_by_keys_and_shows_what_fits(page: Any, report: PlasticityReport, limited: str) -> None:
    choose(page, granularity="component", training="full", limited=limited)
    focus(page, "place")
    page.keyboard.press("Home")
    last = int(page.get_attribute("#place", "max"))
    assert last > 3
    for _ in range(last + 1):
        share = float(re.search(r"at most ([\d.]+)", page.inner_text("#limit"))[1])
        budget = share / 100 if limited == "parameters" else f"{share:g} {limited}"
        found = report.select(budget=budget, granularity="component", training="full")
        assert shown(page)["selected"] == in_blocks(found)
        page.keyboard.press("ArrowRight")


def test_another_limit_keeps_the_cut(page: Any) -> None:
    choose(page, granularity="component", training="full")
    focus(page, "place")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    before = shown(page)["selected"]
    choose(page, limited="parameters")
    assert shown(page)["selected"] == before


def test_nothing_is_wider_than_the_screen(page: Any) -> None:
    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]

    check()
    choose(page, granularity="component")
    focus(page, "place")
    page.keyboard.press("End")
    check()
    for summary in page.query_selector_all("summary"):
        summary.press("Enter")
    assert page.is_visible("table")
    check()


def test_the_charts_can_be_read_by_a_screen_reader(page: Any, report: PlasticityReport) -> None:
    row = report.scores[1]
    for name, points, words in (
        ("ranking", 5, f"{report.ranking()[0].unit}: {report.ranking()[0].score:.4g}"),
        ("depth", len(report.scores), f"{row.id}: {row.mean:.4g} ± "),
        ("heatmap", len(report.scores), f"{row.id}: {row.mean:.4g} ± "),
        ("cost", 2, "memory: 0."),
        ("forecast", 2, "FC1: +10.0 points"),
    ):
        assert page.get_attribute(f"#{name}[role=graphics-document]", "aria-label")
        labels = page.eval_on_selector_all(f"#{name} svg path[aria-label]", "all => all.map(e => e.ariaLabel)")
        assert len(labels) >= points
        assert any(words in label for label in labels), labels[:3]


def test_the_table_says_what_is_selected(page: Any, report: PlasticityReport) -> None:
    focus(page, "place")
    page.keyboard.press("Home")
    named = page.eval_on_selector_all("[data-unit]", "all => all.filter(e => e.textContent).map(e => e.dataset.unit)")
    found = report.select(1)
    assert set(named) == {*found.units, *found.components}
