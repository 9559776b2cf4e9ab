"""The short run of a forecast: it trains as torch does, gains what fitted heads gain, and only raises a forecast."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from plasticity_peft import find_components, fit_head, forecast_finetuning
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.measuring import short_runs
from plasticity_peft.measuring.head import labeled_images, targets_of
from plasticity_peft.measuring.pilot import CLASSES, STEPS, Pilot
from plasticity_peft.report.forecast import Forecast, PilotRun
from tests.measuring.test_head import labeled
from tests.support.models import tiny_model

ITEMS = labeled(90, [number % 3 for number in range(90)])
RATES = {"head": 1e-3, "matrix": 1e-2, "vector": 3e-2}


def test_it_trains_as_torch_does_and_gains_what_fitted_heads_gain() -> None:
    model = tiny_model().eval()
    architecture = find_architecture(model)
    sampler = labeled_images(model, architecture, ITEMS, 90, 32, 0)
    batch = sampler.load(range(90))
    images, labels = batch.images["pixel_values"], sampler.labels(batch)
    items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    with torch.no_grad():
        features = model.vit(images).last_hidden_state[:, 0].numpy()
    before = copy.deepcopy(model.state_dict())
    found = Pilot(model, architecture, sampler, "classifier", RATES).run(features, targets_of(labels, 3, CLASSES))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    theirs = copy.deepcopy(model)
    start = fit_head(theirs, items[45:]).score
    fit_head(theirs, items[:45])
    modules = [theirs.get_submodule(path) for part in find_components(theirs) for path in part.modules]
    matrices = [module.weight for module in modules if module.weight.ndim == 2]
    vectors = [p for module in modules for p in module.parameters() if p.ndim == 1]
    groups = {"head": list(theirs.classifier.parameters()), "matrix": matrices, "vector": vectors}
    optimizer = torch.optim.AdamW(
        [{"params": group, "name": name} for name, group in groups.items()], weight_decay=0.0
    )
    trained = [parameter for group in groups.values() for parameter in group]
    for step in range(STEPS):
        rows = slice(0, 32) if step % 2 == 0 else slice(32, 45)
        share = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        for group in optimizer.param_groups:
            group["lr"] = RATES[group["name"]] * share
        optimizer.zero_grad()
        F.cross_entropy(theirs(images[rows]).logits, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert found.steps == STEPS
    assert found.gain == pytest.approx(fit_head(theirs, items[45:]).score - start, abs=1.5 / 45)
    assert found.gain_error > 0


@pytest.mark.parametrize("longer", [0.1, -0.1])
@pytest.mark.parametrize(("more", "raised"), [(0.2, True), (0.05, False), (-0.3, False)])
def test_it_raises_gains_by_what_it_gains_more_than_kernels_promise_unless_that_may_be_chance(
    more: float, raised: bool, longer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    sets = ["LN1", ("1.MHA", "1.FC2"), ("MHA", "1.FC1"), KINDS]  # in a model of two blocks
    alone = forecast_finetuning(model, ITEMS, sets=sets, pilot=False)
    assert (alone.pilot, alone.raised) == (None, 0.0)
    assert "without a short run" in str(alone)
    short = PilotRun(steps=16, gain=alone.sets[-1].gain + more, gain_error=0.1)
    pretended = _Pretended(short, short, replace(short, steps=64, gain=short.gain + longer))
    monkeypatch.setattr(short_runs, "Pilot", pretended)
    found = forecast_finetuning(model, ITEMS, sets=sets)
    assert pretended.steps == ([16, 16, 64] if raised else [16, 16])
    expected = more + max(0, longer) if raised else 0.0
    assert found.pilot == pretended.results[2 if raised and longer > 0 else 0]
    assert found.raised == pytest.approx(expected)
    for one, before, depth in zip(found.sets, alone.sets, (1, 0.5, 1, 1), strict=True):
        assert one.raised == pytest.approx(depth * expected)
        assert one.gain == pytest.approx(before.gain + depth * expected)
        assert (one.gain_error > before.gain_error + depth * 0.01) == raised
    assert (f"Gains are raised by {100 * expected:.1f}, and by less" in str(found)) == raised


@pytest.mark.parametrize(("more", "smaller"), [(0.25, True), (0.15, False), (-0.5, False), (None, True)])
def test_if_a_run_at_smaller_rates_gains_clearly_more_it_counts_and_rates_are_smaller(
    more: float | None, smaller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clearly: by two standard errors of the difference, 0.1 here; or because the run at the rates diverged."""
    model = tiny_model()
    alone = forecast_finetuning(model, ITEMS, sets=["MHA", KINDS], pilot=False)
    promised = alone.sets[-1].gain
    whole = None if more is None else PilotRun(steps=16, gain=promised + 0.2, gain_error=0.08)
    gentle = PilotRun(steps=16, gain=promised + 0.2 + (more or 0), gain_error=0.06)
    pretended = _Pretended(whole, gentle, PilotRun(steps=64, gain=promised + 0.5, gain_error=0.1))
    monkeypatch.setattr(short_runs, "Pilot", pretended)
    found = forecast_finetuning(model, ITEMS, sets=["MHA", KINDS])
    factor = 0.25 if smaller else 1.0
    assert pretended.steps == [16, 16, 64]
    assert found.pilot == PilotRun(steps=64, gain=promised + 0.5, gain_error=0.1, rate_factor=factor)
    assert found.rate_factor == factor
    assert found.raised == pytest.approx(0.5)
    for one, usual in zip(found.sets, alone.sets, strict=True):
        assert one.rates == pytest.approx(
            {name: rate * (1 if name == "head" else factor) for name, rate in usual.rates.items()}
        )
    first, second, third = pretended.rates
    assert second == pytest.approx({name: rate * (1 if name == "head" else 0.25) for name, rate in first.items()})
    assert third == pytest.approx(second if smaller else first)
    assert ("rate_factor=0.25" in str(found)) == smaller
    assert Forecast.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(("budget", "begins"), [("0.7 time", "0"), ("0.6 time", "1"), ("0.5 memory", "1")])
def test_if_it_raises_gains_a_set_within_a_budget_is_the_one_that_gains_most(
    budget: str, begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model of two blocks: nothing of block 0 fits into half of the memory, a norm into 0.6 of the time."""
    model = tiny_model()
    alone = forecast_finetuning(model, ITEMS, sets=[KINDS], budget=budget, pilot=False)
    everything, by_kernels = alone.sets
    short = PilotRun(steps=16, gain=everything.gain + 0.5, gain_error=0.1)
    monkeypatch.setattr(short_runs, "Pilot", _Pretended(short, short, short))
    found = forecast_finetuning(model, ITEMS, sets=[by_kernels.components], budget=budget)
    before, after = found.sets
    assert min(part.split(".")[0] for part in after.components) == begins
    assert after.gain >= before.gain


class _Pretended:
    """In the place of `Pilot`: runs whose results are known."""

    def __init__(self, *results: PilotRun | None) -> None:
        self.results = results
        self.steps: list[int] = []
        self.rates: list[dict[str, float]] = []

    def __call__(self, *arguments: Any) -> _Pretended:
        *_, rates, steps = arguments
        self.rates.append(rates)
        self.steps.append(steps)
        return self

    def run(self, *_: Any) -> PilotRun | None:
        return self.results[len(self.steps) - 1]
