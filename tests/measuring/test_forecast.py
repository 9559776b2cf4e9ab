"""The forecast: kernels are those of exact gradients, leave-one-out is n fits, and the result needs no luck."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.kernel_ridge import KernelRidge
from sklearn.preprocessing import KernelCenterer
from torch import nn

from plasticity_peft import (
    PlasticityConfig,
    PlasticityReport,
    create_plasticity_optimizer,
    find_components,
    fit_head,
    forecast_finetuning,
    measure_plasticity,
)
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.criteria.gradients import GradientsByImage
from plasticity_peft.errors import ConfigError, DataError, ModelError, NonFiniteError, ReportError, SelectionError
from plasticity_peft.measuring.greedy import Greedy
from plasticity_peft.measuring.kernel_ridge import left_out
from plasticity_peft.measuring.tangents import Sketcher, Tangents
from plasticity_peft.report.selection import Budget
from plasticity_peft.report.text import decision_rows
from tests.measuring.test_head import labeled
from tests.support.forking import run_script
from tests.support.models import tiny_model

COUNT = 6
IMAGES = torch.rand(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(3))
DIRECTIONS = torch.randn(2, 16, generator=torch.Generator().manual_seed(4))
ITEMS = labeled(30, [number % 3 for number in range(30)])


def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns what the classifier of a ViT receives."""
    return model.vit(pixel_values=images).last_hidden_state[:, 0]


def sketches(model: nn.Module, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the sketches of the gradients of `IMAGES` by the code under test."""
    architecture = find_architecture(model)
    layers = [path for part in architecture.components for path in part.modules]
    gradients = GradientsByImage(model, architecture, {"pixel_values": IMAGES[:1]})

    def projected() -> torch.Tensor:
        return (features(model, IMAGES) @ DIRECTIONS.T).sum(dim=0)

    found = gradients.reduced(COUNT, projected, Sketcher(layers, seed, width))
    return {path: torch.stack([each[path] for each in found], dim=1).numpy() for path in layers}


def exact(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns the gradients by layer, (images, directions, parameters), computed one by one by torch alone."""
    paths = [path for part in find_components(model) for path in part.modules]
    own = [list(model.get_submodule(path).parameters()) for path in paths]
    rows = []
    for value in (features(model, IMAGES) @ DIRECTIONS.T).flatten():
        flat = iter(torch.autograd.grad(value, [each for group in own for each in group], retain_graph=True))
        rows.append([torch.cat([next(flat).flatten() for _ in group]) for group in own])
    return {
        path: torch.stack([row[number] for row in rows]).reshape(COUNT, 2, -1).numpy()
        for number, path in enumerate(paths)
    }


def inner(values: np.ndarray) -> np.ndarray:
    """Returns the inner products of all pairs of images, mean over directions."""
    return np.einsum("idp,jdp->ij", values, values) / values.shape[1]


def test_a_sketch_that_is_wide_enough_keeps_every_inner_product() -> None:
    model = tiny_model()
    found, theirs = sketches(model, width=100), exact(model)
    for path, values in theirs.items():
        np.testing.assert_allclose(inner(found[path]), inner(values), rtol=1e-3, atol=1e-5, err_msg=path)


def test_narrow_sketches_have_the_right_inner_products_in_the_mean() -> None:
    model = tiny_model()
    path, norm = (find_components(model)[row].modules[0] for row in (3, 2))
    theirs = exact(model)
    many = [sketches(model, width=4, seed=seed) for seed in range(40)]
    assert many[0][path].shape == (COUNT, 2, 16)
    for layer in (path, norm):
        mean = np.mean([inner(each[layer]) for each in many], axis=0)
        size = np.diag(inner(theirs[layer])).mean()
        assert np.abs(mean - inner(theirs[layer])).max() < 0.25 * size
    assert not np.allclose(many[0][path], many[1][path])


def test_kernels_are_centered_and_weighted_as_adam_would() -> None:
    model = tiny_model()
    architecture = find_architecture(model)
    theirs = exact(model)
    expected = {}
    for part in architecture.components:
        total = 0.0
        for path in part.modules:
            kernel = inner(theirs[path])
            total = total + kernel / np.sqrt(np.trace(kernel) / COUNT / theirs[path].shape[2])
        expected[part.id] = KernelCenterer().fit_transform(total)
    whole = sum(np.trace(kernel) / COUNT for kernel in expected.values())
    found = Tangents(sketches(model, width=100)).kernels(architecture)
    assert list(found) == [part.id for part in architecture.components]
    for name, kernel in expected.items():
        np.testing.assert_allclose(found[name], kernel / whole, atol=2e-3 * np.abs(kernel / whole).max())


def test_leave_one_out_is_kernel_ridge_without_each_image_in_turn() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(14, 5)), rng.normal(size=(14, 3))
    kernel = x @ x.T
    for row, predicted in enumerate(left_out(kernel, y)):
        others = np.arange(14) != row
        centerer = KernelCenterer().fit(kernel[np.ix_(others, others)])
        means = y[others].mean(axis=0)
        fitted = KernelRidge(alpha=1.0, kernel="precomputed")
        fitted.fit(centerer.transform(kernel[np.ix_(others, others)]), y[others] - means)
        theirs = means + fitted.predict(centerer.transform(kernel[[row]][:, others]))[0]
        np.testing.assert_allclose(predicted, theirs, rtol=1e-8)


def test_the_fitted_head_of_a_forecast_is_that_of_fit_head_and_is_not_set() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    forecast = forecast_finetuning(model, ITEMS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    theirs = fit_head(model, ITEMS)
    assert forecast.head.score == pytest.approx(theirs.score)
    assert forecast.head.loss == pytest.approx(theirs.loss, rel=1e-3)
    assert [one.name for one in forecast.sets] == [
        *("LN1", "MHA", "LN2", "FC1", "FC2"),
        *("LN1 + LN2", "MHA + FC1", "MHA + FC2", "FC1 + FC2", "MHA + FC1 of the first half", "everything"),
    ]
    early = forecast.sets[-2].components
    assert [name for name in early if name.endswith("FC1")] == ["0.FC1"]
    assert [name for name in early if name.endswith("MHA")] == ["0.MHA", "1.MHA"]
    for one in forecast.sets:
        assert one.accuracy == pytest.approx(min(1, max(0, forecast.head.score + one.gain)))
        assert 0 < one.gain_error < one.error + 0.1
        assert one.cost is not None
    everything = forecast.sets[-1]
    assert everything.parameters == sum(part.parameters for part in find_components(model))


def test_a_set_is_the_same_by_any_name_and_after_adapters_were_added() -> None:
    model = tiny_model()
    sets = ["MHA", ("0.MHA", "1.MHA"), ("LN1", "MHA", "LN2", "FC1", "FC2")]
    first = forecast_finetuning(model, ITEMS, sets=sets)
    kind, ids, everything = first.sets
    assert (kind.gain, kind.components) == (ids.gain, ids.components)
    assert (ids.name, everything.name) == ("0.MHA + 1.MHA", "everything")
    query = find_components(model)[1].modules[0]
    adapted = get_peft_model(model, LoraConfig(target_modules=[query], modules_to_save=["classifier"]))
    second = forecast_finetuning(adapted, ITEMS, sets=sets)
    assert [one.gain for one in second.sets] == [one.gain for one in first.sets]


def test_what_cannot_reach_the_features_is_forecast_to_gain_nothing() -> None:
    """The second layers of the MLP are zero, so the first ones have no influence, and no gradient."""
    model = tiny_model()
    for part in find_components(model):
        if part.kind == "FC2":
            nn.init.zeros_(model.get_submodule(part.modules[0]).weight)
    forecast = forecast_finetuning(model, ITEMS, sets=["FC1", "LN2", "MHA"])
    first, norm, attention = forecast.sets
    assert first.gain == norm.gain == 0.0
    assert attention.gain != 0.0


def test_finetuning_does_not_pay_where_the_head_is_always_right() -> None:
    colors = torch.eye(3)[:, :, None, None]
    items = [{**item, "pixel_values": item["pixel_values"] / 10 + 3 * colors[item["labels"]]} for item in ITEMS]
    forecast = forecast_finetuning(tiny_model(), items)
    assert forecast.head.score == 1.0
    assert not forecast.pays
    assert forecast.recommended is None
    assert "not expected to pay" in str(forecast)


def test_the_recommended_set_is_the_cheapest_one_near_the_best() -> None:
    forecast = forecast_finetuning(tiny_model(), ITEMS, sets=["LN1", "MHA", "FC1"])
    norm, attention, first = (
        replace(one, gain=gain, gain_error=0.02) for one, gain in zip(forecast.sets, (0.01, 0.1, 0.09), strict=True)
    )
    cheap = replace(first, cost=replace(first.cost, time=attention.cost.time - 0.01))
    assert replace(forecast, sets=(norm, attention, cheap)).recommended is cheap
    dear = replace(first, cost=replace(first.cost, time=attention.cost.time + 0.01))
    assert replace(forecast, sets=(norm, attention, dear)).recommended is attention
    unknown = [replace(one, cost=None) for one in (norm, replace(attention, parameters=10**9), first)]
    assert replace(forecast, sets=tuple(unknown)).recommended == unknown[2]
    assert f"Recommended: {cheap.name}, the cheapest" in str(replace(forecast, sets=(norm, attention, cheap)))


def test_what_is_recommended_trains_in_the_first_block_unless_only_later_sets_pay() -> None:
    forecast = forecast_finetuning(tiny_model(), ITEMS, sets=["MHA", "1.MHA", ("0.FC1", "1.LN1"), "1.FC2"])
    assert [one.depth for one in forecast.sets] == [1.0, 0.5, 1.0, 0.5]
    attention, late, early, last = (
        replace(one, gain=gain, gain_error=0.02, squared_error=error, excess_error=0.1)
        for one, gain, error in zip(forecast.sets, (0.1, 0.13, 0.09, 0.12), (1.8, 1.5, 1.85, 1.6), strict=True)
    )
    found = replace(forecast, sets=(attention, late, early, last))
    assert found.best is late
    assert found.recommended is early
    assert found.safest is early
    of = "the best of those that train in the first block, MHA"
    assert f"Recommended: {early.name}, the cheapest within one standard error of {of}." in str(found)
    poor = [replace(one, gain=0.01) for one in (attention, early)]
    assert replace(found, sets=(*poor, late, last)).recommended in (late, last)
    unknown = tuple(replace(one, depth=None) for one in found.sets)
    assert replace(found, sets=unknown).recommended.name in (late.name, last.name), "as in older releases"


def test_the_safest_set_is_the_cheapest_one_of_a_squared_error_near_the_smallest() -> None:
    forecast = forecast_finetuning(tiny_model(), ITEMS, sets=["LN1", "MHA", "FC1", "FC2"])
    smallest = min(forecast.sets, key=lambda one: one.squared_error)
    assert smallest.excess_error == 0
    assert all(one.excess_error > 0 for one in forecast.sets if one is not smallest)
    norm, *others = (replace(one, gain=0.1, gain_error=0.05) for one in forecast.sets)
    cheap, near, far = (
        replace(one, squared_error=error, excess_error=0.2, cost=replace(one.cost, time=time))
        for one, error, time in zip(others, (1.9, 1.8, 2.0), (0.7, 0.8, 0.5), strict=True)
    )
    best = replace(norm, squared_error=1.75, excess_error=0.0, cost=replace(norm.cost, time=0.9))
    found = replace(forecast, sets=(best, cheap, near, far))
    assert found.safest is cheap
    assert found.recommended is far
    assert f"To lose less: {cheap.name}, the cheapest whose squared error" in str(found)
    assert replace(found, sets=(best, cheap)).safest is cheap
    assert "To lose less" not in str(replace(found, sets=(best, cheap)))
    assert replace(found, sets=(best, replace(cheap, squared_error=None))).safest is None
    assert replace(found, sets=(replace(best, gain=0.01), replace(cheap, gain=0.0))).safest is None
    late = [replace(one, raised=0.02) for one in (best, cheap)]
    early = [replace(one, raised=0.04) for one in (near, far)]
    assert replace(found, sets=(*late, *early)).safest is early[1], "errors are compared among those raised most"


@pytest.mark.parametrize("kinds", [("MHA",), ("LN1", "FC2"), ("LN1",)])
def test_the_rates_of_a_set_are_those_that_are_recommended_once_it_trains(kinds: tuple[str, ...]) -> None:
    model = tiny_model()
    (found,) = forecast_finetuning(model, ITEMS, sets=[kinds]).sets
    assert not any(parameter.grad is not None for parameter in model.parameters())
    fit_head(model, ITEMS)
    model.requires_grad_(False)
    for path in (
        "classifier",
        *(path for part in find_components(model) if part.kind in kinds for path in part.modules),
    ):
        model.get_submodule(path).requires_grad_(True)
    optimizer = create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=ITEMS)
    assert found.rates == pytest.approx({group["name"]: group["lr"] for group in optimizer.param_groups})


def test_a_report_that_is_measured_with_labels_has_the_forecast_and_says_what_to_decide(tmp_path: Path) -> None:
    model = tiny_model()
    report = measure_plasticity(model, ITEMS, max_samples=24, forecast=True)
    assert report.forecast == forecast_finetuning(model, ITEMS, max_samples=24)
    assert replace(report, forecast=None) == measure_plasticity(model, ITEMS, max_samples=24)
    report.save(tmp_path / "report.json")
    assert PlasticityReport.load(tmp_path / "report.json") == report
    columns, head, *rows = decision_rows(report, report.forecast)
    assert columns[:3] == ("trained", "parameter plasticity", "accuracy")
    assert head[:2] == ("head fitted", "")
    assert [row[0] for row in rows] == [one.name for one in report.forecast.sets]
    assert [float(row[1]) for row in rows[:5]] == pytest.approx([kind.mean for kind in report.kinds], rel=1e-3)
    assert report.forecast.advice() in str(report)
    ax = report.plot(view="forecast")
    assert [label.get_text().split(" (")[0] for label in ax.get_yticklabels()] == [row[0] for row in rows]
    with pytest.raises(ConfigError, match="needs a report with a forecast"):
        replace(report, forecast=None).plot(view="forecast")
    other = replace(report.forecast, sets=(replace(report.forecast.sets[0], components=("9.MHA",)),))
    with pytest.raises(ReportError, match=r"components of the report, got '9\.MHA'"):
        PlasticityReport.from_dict(replace(report, forecast=other).to_dict())


def test_a_report_for_a_budget_also_forecasts_the_set_within_it() -> None:
    model = tiny_model()
    options = {"max_samples": 24, "granularity": "component", "settle": None}
    report = measure_plasticity(model, ITEMS, forecast=True, budget="0.7 memory", **options)
    assert report.forecast == forecast_finetuning(model, ITEMS, max_samples=24, budget="0.7 memory")
    assert report.forecast.sets[-1].name == "within 0.7 of the memory"
    norms = measure_plasticity(model, ITEMS, forecast=True, budget="0.7 memory", candidates=("LN1", "LN2"), **options)
    assert {name.split(".")[1] for name in norms.forecast.sets[-1].components} <= {"LN1", "LN2"}
    lora = measure_plasticity(model, ITEMS, forecast=True, budget=0.1, r=2, **options)
    assert lora.forecast == forecast_finetuning(model, ITEMS, max_samples=24)


def random_kernels(count: int, images: int) -> dict[str, np.ndarray]:
    """Returns kernels of rank 3."""
    factors = np.random.default_rng(0).normal(size=(count, images, 3))
    return {f"{number}.MHA": factor @ factor.T for number, factor in enumerate(factors)}


@pytest.mark.parametrize("chosen", [("2.MHA", "5.MHA"), ("0.MHA", "1.MHA", "7.MHA")])
def test_a_set_grows_by_the_components_that_explain_the_targets(chosen: tuple[str, ...]) -> None:
    kernels = random_kernels(8, 60)
    noise = np.random.default_rng(1).normal(size=(60, 20))
    targets = sum(kernels[name] for name in chosen) @ noise / 5 + noise[::-1] / 5
    greedy = Greedy(kernels, targets, combined=lambda kernel: kernel)
    sizes = dict.fromkeys(kernels, 1)
    assert set(greedy.within(Budget(tuple(kernels), 1.0, sizes, len(chosen)))) == set(chosen)
    assert set(greedy.within(Budget(tuple(kernels), 1.0, sizes, 8))) >= set(chosen)
    few = greedy.within(Budget(tuple(kernels), 1.0, {**sizes, chosen[0]: 3}, 2))
    assert chosen[0] not in few


def test_a_set_begins_and_goes_on_with_the_components_that_it_may() -> None:
    kernels = random_kernels(6, 40)
    greedy = Greedy(kernels, np.random.default_rng(1).normal(size=(40, 3)), combined=lambda kernel: kernel)
    limited = Budget(("0.MHA", "1.MHA", "2.MHA", "3.MHA"), 1.0, dict.fromkeys(kernels, 1), 3)
    for first in kernels:
        found = greedy.within(limited, units=["1.MHA", "3.MHA", "5.MHA"], first=[first])
        assert (found[:1] == [first]) == (first in ("1.MHA", "3.MHA")), "5.MHA is not one of the budget's"
        assert set(found) <= {"1.MHA", "3.MHA"}


def test_a_set_is_as_good_as_by_the_exhaustive_greedy_rule_and_keeps_to_its_budget() -> None:
    """The rule without its shortcut, by scikit-learn. Half of the kernel of each component is shared by all."""
    kernels = {name: kernel / 40 + np.eye(30) / 2 for name, kernel in random_kernels(7, 30).items()}
    targets = np.random.default_rng(2).normal(size=(30, 4)) + sum(kernels.values())[:, :4]
    sizes = {name: 1 + number % 3 for number, name in enumerate(kernels)}

    def error(names: tuple[str, ...]) -> float:
        kernel = np.sum([np.zeros((30, 30)), *(kernels[name] for name in names)], axis=0)
        ones = np.full((30, 30), 1e6)  # a constant in the kernel is a free intercept
        rows = [np.arange(30) != row for row in range(30)]
        fits = [
            KernelRidge(alpha=1.0, kernel="precomputed").fit((kernel + ones)[np.ix_(others, others)], targets[others])
            for others in rows
        ]
        predicted = [
            fit.predict((kernel + ones)[[row]][:, others])[0]
            for row, (fit, others) in enumerate(zip(fits, rows, strict=True))
        ]
        return float(((np.array(predicted) - targets) ** 2).sum(axis=1).mean())

    def grown(limit: int, by_price: bool) -> tuple[str, ...]:
        chosen: tuple[str, ...] = ()
        while True:
            fits = [name for name in kernels if name not in chosen]
            fits = [name for name in fits if sum(sizes[each] for each in (*chosen, name)) <= limit]
            gains = {name: error(chosen) - error((*chosen, name)) for name in fits}
            best = max(fits, key=lambda name: gains[name] / (sizes[name] if by_price else 1), default=None)
            if best is None or (chosen and gains[best] <= 0):
                return chosen
            chosen = (*chosen, best)

    greedy = Greedy(kernels, targets, combined=lambda kernel: kernel)
    for limit in (1, 3, 5, 9):
        theirs = min((grown(limit, by_price) for by_price in (False, True)), key=error)
        found = tuple(greedy.within(Budget(tuple(kernels), 1.0, sizes, limit)))
        assert 0 < sum(sizes[name] for name in found) <= limit
        assert error(found) <= 1.02 * error(theirs)
        assert error(found) < error(()) - 0.5 * (error(()) - error(theirs))


def test_sets_within_budgets_are_forecast_and_can_be_trained() -> None:
    model = tiny_model()
    forecast = forecast_finetuning(model, ITEMS, sets=["MHA"], budget=["0.7 time", "0.5 memory", 0.05])
    names = [one.name for one in forecast.sets]
    assert names == ["MHA", "within 0.7 of the time", "within 0.5 of the memory", "within 0.05 of the parameters"]
    _, by_time, by_memory, by_parameters = forecast.sets
    assert by_time.cost.time <= 0.7
    assert by_memory.cost.memory <= 0.5
    assert by_parameters.parameters <= 0.05 * sum(parameter.numel() for parameter in model.parameters())
    for one in forecast.sets[1:]:
        again = forecast_finetuning(model, ITEMS, sets=[one.components]).sets[0]
        assert (again.gain, again.components) == (one.gain, one.components)
        report = measure_plasticity(model, criterion="random")
        adapted = get_peft_model(tiny_model(), PlasticityConfig(report=report, **one.arguments))
        assert adapted.peft_config["default"].selection.components == one.components
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        assert trained == one.parameters + sum(parameter.numel() for parameter in model.classifier.parameters())


@pytest.mark.parametrize("budget", ["0.7 time", "0.5 memory", 0.05])
def test_a_set_within_a_budget_consists_of_candidates(budget: float | str) -> None:
    model, candidates = tiny_model(), ("LN2", "1.MHA")
    found = forecast_finetuning(model, ITEMS, sets=["LN1"], budget=budget, candidates=candidates)
    given, within = found.sets
    assert given.components == ("0.LN1", "1.LN1"), "sets that are given do not depend on it"
    assert set(within.components) <= {"0.LN2", "1.LN2", "1.MHA"}
    free = forecast_finetuning(model, ITEMS, sets=["LN1"], budget=budget, candidates=KINDS)
    assert free == forecast_finetuning(model, ITEMS, sets=["LN1"], budget=budget)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_size_of_a_pass_changes_nothing(batch_size: int) -> None:
    one = forecast_finetuning(tiny_model(), ITEMS[:15], sets=["MHA"])
    other = forecast_finetuning(tiny_model(), ITEMS[:15], sets=["MHA"], batch_size=batch_size)
    assert [each.gain for each in other.sets] == [each.gain for each in one.sets]


@pytest.mark.parametrize("name", ["deit", "dinov2"])
def test_other_architectures(name: str) -> None:
    forecast = forecast_finetuning(tiny_model(name), ITEMS[:12], sets=[("MHA", "0.FC1")])
    assert forecast.sets[0].components == ("0.MHA", "0.FC1", "1.MHA")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sets": "MHA"}, ConfigError, "sets must be a list of sets"),
        ({"sets": []}, ConfigError, "at least one set"),
        ({"sets": [()]}, ConfigError, "must be made of kinds"),
        ({"sets": ["5.MHA"]}, ConfigError, r"canonical ids \(0.LN1, ..., 1.FC2\). Got \('5.MHA',\)"),
        ({"sets": [3]}, ConfigError, "must be made of kinds"),
        ({"candidates": ("9.MHA",)}, ConfigError, "candidates must name components of the model, .* Got '9.MHA'"),
        ({"candidates": ("MLP",)}, ConfigError, "candidates must be one or more of LN1, MHA"),
        ({"budget": "1 hour"}, ConfigError, "budget must be a share .* Got '1 hour'"),
        ({"budget": [0.1, 2]}, ConfigError, "budget must be a share .* Got 2"),
        ({"budget": 1e-6}, SelectionError, "less than the 32 of the smallest unit, 0.LN1"),
        ({"budget": "0.01 time"}, SelectionError, "no unit fits: the cheapest, 1.LN1, takes .* at least '.* time'"),
        ({"max_samples": 5000}, ConfigError, "max_samples must be a whole number from 2 to 4096"),
        ({"dataset": None}, ConfigError, "dataset must be labeled images"),
        ({"dataset": [{"pixel_values": item["pixel_values"]} for item in ITEMS]}, DataError, "label"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        forecast_finetuning(tiny_model(), **{"dataset": ITEMS, **options})


def test_what_cannot_be_forecast_is_refused_by_name() -> None:
    regression = tiny_model(num_labels=1)
    with pytest.raises(ModelError, match="one class per image"):
        forecast_finetuning(regression, labeled(8, [0.5 * number for number in range(8)]))
    broken = tiny_model()
    with torch.no_grad():
        broken.get_submodule(find_components(broken)[1].modules[0]).weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        forecast_finetuning(broken, ITEMS)


SCRIPT = """
import json
import sys
from pathlib import Path
from accelerate import PartialState
from plasticity_peft import forecast_finetuning
from tests.measuring.test_forecast import ITEMS, tiny_model
state = PartialState(cpu=True)
forecast = forecast_finetuning(tiny_model(), ITEMS[:25], batch_size=4, budget="0.7 time")
Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps(forecast.to_dict()))
state.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_forecast_what_one_does(processes: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    run = run_script(tmp_path / "script.py", tmp_path, cwd=tmp_path, processes=processes)
    assert run.returncode == 0, run.stderr
    rows = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(processes)]
    one = json.loads(
        json.dumps(forecast_finetuning(tiny_model(), ITEMS[:25], batch_size=4, budget="0.7 time").to_dict())
    )
    for row in rows:
        assert row == rows[0]
        for mine, theirs in zip(row["sets"], one["sets"], strict=True):
            assert [mine[name] for name in ("name", "components", "cost")] == [
                theirs[name] for name in ("name", "components", "cost")
            ]
            numbers = ("accuracy", "error", "gain", "gain_error")
            assert [mine[name] for name in numbers] == pytest.approx([theirs[name] for name in numbers], abs=1e-6)
