"""Pictures: what they show, that they show it in grey too, and that they leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib import colors, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ConfigError
from plasticity_peft.report.plotting import COLORS, MARKERS, STYLES, VIEWS, png
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.scores import KindScore, Score
from tests.report.test_report import REPORT

OF_ALL_REPORTS = [view for view in VIEWS if view != "forecast"]
LEVEL = {"LN1": 1.2, "MHA": 9.0, "LN2": 1.6, "FC1": 5.0, "FC2": 2.5}


def make_report(blocks: int, stages: tuple[int, ...] = (), spread: float = 1.0) -> PlasticityReport:
    """Returns a report of `blocks` blocks, or of those in `stages`, in which no two scores are alike."""
    places = [(stage, block) for stage, count in enumerate(stages) for block in range(count)]
    places = places or [(None, block) for block in range(blocks)]
    common = {"samples": 100}
    scores = tuple(
        Score(
            stage=stage, block=block, kind=kind, path=f"{index}.{kind}", modules=(f"{index}.{kind}",), parameters=10,
            mean=LEVEL[kind] * (1 + 0.4 * index / len(places)), std=spread * LEVEL[kind], **common,
        )
        for index, (stage, block) in enumerate(places)
        for kind in KINDS
    )  # fmt: skip
    means = {kind: np.mean([row.mean for row in scores if row.kind == kind]).item() for kind in KINDS}
    kinds = tuple(KindScore(kind=kind, mean=means[kind], std=spread * means[kind] / 2, **common) for kind in KINDS)
    return replace(REPORT, scores=scores, kinds=kinds, model_type="swin" if stages else "vit")


def bands(ax: Any) -> list[np.ndarray]:
    return [collection.get_paths()[0].vertices for collection in ax.collections]


@pytest.mark.parametrize("blocks", [2, 12, 40])
def test_the_depth_is_a_line_a_kind_with_its_band(blocks: int) -> None:
    report = make_report(blocks)
    ax = report.plot("depth")
    assert len(ax.lines) == len(bands(ax)) == len(KINDS)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(KINDS)
    for kind, line, band in zip(KINDS, ax.lines, bands(ax), strict=True):
        rows = report.rows_of(kind)
        assert list(line.get_ydata()) == [row.mean for row in rows]
        assert list(line.get_xdata()) == list(range(blocks))
        edges = {round(row.mean + sign * 1.96 * row.standard_error, 9) for row in rows for sign in (-1, 1)}
        assert edges == {round(y, 9) for y in band[:, 1]}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("block", "rate of change (no unit)")
    assert ax.get_title() == "Plasticity of vit, embedding inputs, 100 pairs\nover depth\n95 % confidence bands"
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels[0] == "0"
    assert len(labels) == min(blocks, 12) if blocks <= 12 else len(labels) <= 12


def test_the_depth_of_a_hierarchical_model_names_and_parts_its_stages() -> None:
    ax = make_report(0, stages=(2, 2, 6, 2)).plot("depth")
    assert ax.get_xlabel() == "stage.block"
    assert [label.get_text() for label in ax.get_xticklabels()][:5] == ["0.0", "0.1", "1.0", "1.1", "2.0"]
    assert [line.get_xdata()[0] for line in ax.lines[len(KINDS) :]] == [1.5, 3.5, 9.5]


@pytest.mark.parametrize(
    ("blocks", "granularity", "top_k", "shown", "title"),
    [
        (12, "kind", 2, 5, "ranking"),
        (2, "component", 3, 10, "ranking"),
        (12, "component", 3, 20, "ranking, the best 20 of 60"),
        (40, "component", 25, 26, "ranking, the best 26 of 200"),
        (40, "component", 200, 40, "ranking, the best 40 of 200"),
    ],
)
def test_the_ranking_is_best_first_with_errors_and_marks(
    blocks: int, granularity: str, top_k: int, shown: int, title: str
) -> None:
    report = make_report(blocks)
    selection = report.select(top_k=top_k, granularity=granularity)
    ax = report.plot("ranking", selection=selection)
    expected = report.ranking(granularity)[:shown]
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels] == [row.unit for row in expected]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    assert ax.get_title().splitlines()[1] == title
    for container, label, row in zip(ax.containers, labels, expected, strict=True):
        points, _, bars = container.lines
        assert points.get_xdata() == [row.score]
        ends = sorted(bars[0].get_segments()[0][:, 0])
        assert ends == pytest.approx([row.score - 1.96 * row.standard_error, row.score + 1.96 * row.standard_error])
        chosen = row.unit in selection.units
        assert (label.get_fontweight() == "bold") == chosen
        assert (points.get_markerfacecolor() != "white") == chosen


@pytest.mark.parametrize("blocks", [2, 12, 40])
def test_the_heat_map_has_every_block_and_kind_and_frames_what_was_chosen(blocks: int) -> None:
    report = make_report(blocks)
    selection = report.select(top_k=3, granularity="component")
    ax = report.plot("heatmap", selection=selection)
    expected = [[row.mean for row in report.rows_of(kind)] for kind in KINDS]
    assert ax.images[0].get_array().tolist() == expected
    assert [label.get_text() for label in ax.get_yticklabels()] == list(KINDS)
    frames = {(round(patch.get_x()), round(patch.get_y())) for patch in ax.patches if isinstance(patch, Rectangle)}
    assert {f"{x}.{KINDS[y]}" for x, y in frames} == set(selection.components)
    assert len(ax.texts) == (5 * blocks if blocks <= 12 else 0)
    assert ax.images[0].colorbar.ax.get_ylabel() == "rate of change (no unit)"


def test_the_overview_is_depth_beside_ranking() -> None:
    report = make_report(12)
    selection = report.select(top_k=2)
    axes = report.plot(selection=selection)
    assert axes.shape == (2,)
    assert axes[0].figure.get_suptitle() == "Plasticity of vit, embedding inputs, 100 pairs"
    legend = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert legend == ["LN1", "MHA (selected)", "LN2", "FC1 (selected)", "FC2"]
    assert len(axes[1].containers) == 5
    some = report.select(top_k=3, granularity="component")
    ringed = report.plot(selection=some)[0].lines[-1]
    assert ringed.get_label() == "selected"
    assert len(ringed.get_xdata()) == 3


def test_scores_that_read_only_weights_are_called_exact() -> None:
    rows = {"std": 0.0, "samples": 0}
    report = make_report(3)
    report = replace(
        report,
        scores=tuple(replace(row, **rows) for row in report.scores),
        kinds=tuple(replace(row, **rows) for row in report.kinds),
        observed="weights", inputs=None, samples=0, title="upper bound", criterion="bound",
    )  # fmt: skip
    for ax in report.plot():
        assert "exact" in ax.get_title()
        assert "confidence" not in ax.get_title()


@pytest.mark.parametrize("view", OF_ALL_REPORTS)
def test_zeros_and_equal_scores_can_be_drawn(view: str) -> None:
    report = make_report(3)
    for mean in (0.0, 1.0):
        scores = tuple(replace(row, mean=mean) for row in report.scores)
        same = replace(report, scores=scores, kinds=tuple(replace(row, mean=mean) for row in report.kinds))
        figure = np.ravel(same.plot(view))[0].figure
        figure.savefig(BytesIO())


@pytest.mark.parametrize("view", OF_ALL_REPORTS)
def test_given_axes_are_drawn_on_and_returned(view: str) -> None:
    figure = Figure()
    given = figure.subplots(1, 2) if view == "overview" else figure.subplots()
    returned = REPORT.plot(view, ax=given)
    assert all(one is other for one, other in zip(np.ravel(returned), np.ravel(given), strict=True))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"view": "pie"}, "view must be one of 'overview', 'depth', 'ranking', 'heatmap', 'forecast'. Got"),
        ({"ax": Figure().subplots()}, "needs two axes: .* Got 1"),
        ({"view": "depth", "ax": Figure().subplots(1, 2)}, "must be matplotlib axes. Got ndarray"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        REPORT.plot(**arguments)


def luminance(color: str) -> float:
    """Returns the relative luminance of WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(color)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_kinds_are_told_apart_in_grey_and_seen_on_white() -> None:
    looks = list(zip(COLORS, STYLES, MARKERS, strict=False))
    assert len(looks) == len(KINDS)
    for (_, style, marker), (_, other_style, other_marker) in combinations(looks, 2):
        assert style != other_style
        assert marker != other_marker
    for color, *_ in looks:
        assert 1.05 / (luminance(color) + 0.05) >= 3  # what WCAG 2.2 asks of graphics


PROTANOPIA = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                       [-0.003882, -0.048116, 1.051998]])  # fmt: skip
DEUTERANOPIA = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                         [-0.011820, 0.042940, 0.968881]])  # fmt: skip
"""What is seen, in linear RGB (Machado, Oliveira & Fernandes, 2009, severity 1)."""
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                   [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip


def cielab(color: str, seen: np.ndarray) -> np.ndarray:
    """Returns a color as somebody sees it, in CIELAB with the white of sRGB."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(color)])
    xyz = TO_XYZ @ np.clip(seen @ linear, 0, 1) / TO_XYZ.sum(axis=1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", [np.eye(3), PROTANOPIA, DEUTERANOPIA], ids=["all", "protanopia", "deuteranopia"])
def test_kinds_are_told_apart_by_the_color_blind(seen: np.ndarray) -> None:
    assert np.linalg.norm(cielab("#FF0000", np.eye(3)) - [53.24, 80.09, 67.20]) < 0.1  # as everybody computes it
    for one, other in combinations(COLORS, 2):
        assert np.linalg.norm(cielab(one, seen) - cielab(other, seen)) >= 15, (one, other)


@pytest.mark.parametrize("scale", [1e-6, 0.001, 0.03, 1.0, 1290.0, 98765.0])
def test_numbers_of_the_heat_map_do_not_run_into_each_other(scale: float) -> None:
    report = make_report(12)
    scores = [replace(row, mean=scale * (1 + place / 100)) for place, row in enumerate(report.scores)]
    ax = replace(report, scores=tuple(scores)).plot(view="heatmap")
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    ax.figure.draw(renderer)
    boxes = [text.get_window_extent(renderer) for text in ax.texts]
    assert len(boxes) == 60
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    inside = ax.get_window_extent(renderer)
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


def test_the_heat_map_rises_in_grey() -> None:
    from matplotlib import colormaps

    steps = [luminance(color) for color in colormaps["cividis"](np.linspace(0, 1, 20))]
    assert all(low < high for low, high in pairwise(steps))


def test_a_png_is_not_empty_and_two_are_the_same() -> None:
    report = make_report(12)
    selection = report.select(top_k=2)
    first, second = png(report, selection), png(report, selection)
    assert first == second
    image = np.asarray(Image.open(BytesIO(first)).convert("L"))
    assert 0.02 < (image < 200).mean() < 0.5


def test_pyplot_and_its_settings_are_left_alone() -> None:
    import matplotlib
    from matplotlib import pyplot as plt

    before, figures = dict(matplotlib.rcParams), plt.get_fignums()
    for view in OF_ALL_REPORTS:
        REPORT.plot(view)
    png(REPORT)
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == before


def test_the_users_own_style_is_followed() -> None:
    with rc_context({"axes.facecolor": "yellow"}):
        assert colors.same_color(REPORT.plot("depth").get_facecolor(), "yellow")


def test_a_notebook_gets_a_table_whose_text_is_escaped() -> None:
    html = replace(REPORT, title="<b>rate</b>")._repr_html_()
    assert html.count("<tr>") == 6
    assert "&lt;b&gt;rate&lt;/b&gt;" in html
    assert "<b>" not in html
    assert len(html) < 2500
    for word in ("4.5000", "0.0250", "100 pairs (2 skipped)", "1,088"):
        assert word in html
