"""What the recommended rates are multiplied by: short runs find it, and an optimizer takes it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model

from plasticity_peft import PlasticityConfig, create_plasticity_optimizer, forecast_finetuning
from plasticity_peft.errors import ConfigError, ModelError
from plasticity_peft.measuring import short_runs
from plasticity_peft.measuring.pilot import Pilot
from plasticity_peft.measuring.short_runs import find_rate_factor
from plasticity_peft.report.forecast import PilotRun
from tests.measuring.test_head import labeled
from tests.support.models import tiny_model

ITEMS = labeled(60, [number % 3 for number in range(60)])


class Runs:
    """In the place of `Pilot`: its results, and what it is asked for."""

    def __init__(self, *gains: float | None) -> None:
        self.gains = gains
        self.asked: list[tuple[int, dict[str, float]]] = []

    def __call__(self, *arguments: Any) -> Runs:
        *_, rates, steps = arguments
        self.asked.append((steps, rates))
        return self

    def run(self, features: Any, targets: Any) -> PilotRun | None:
        assert (features.shape, targets.shape) == ((60, 16), (60, 3))
        gain = self.gains[len(self.asked) - 1]
        return None if gain is None else PilotRun(steps=16, gain=gain, gain_error=0.02)


def adapted(**options: Any) -> torch.nn.Module:
    return get_peft_model(tiny_model(), PlasticityConfig(target_data=ITEMS, fit_head=True, **options))


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("gains", "factor"),
    [((0.0, 0.06), 0.25), ((0.0, 0.05), 1.0), ((0.1, 0.0), 1.0), ((None, 0.0), 0.25), ((0.0, None), 1.0)],
)
def test_the_factor_is_a_quarter_if_that_gains_clearly_more(
    gains: tuple[float | None, ...], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clearly: by two standard errors of the difference, 0.057 here; or because the run at the rates diverged."""
    runs = Runs(*gains)
    monkeypatch.setattr(short_runs, "Pilot", runs)
    assert find_rate_factor(tiny_model(), ITEMS) == factor
    (steps, first), (others, second) = runs.asked
    assert steps == others == 16
    assert second == pytest.approx({name: rate * (1 if name == "head" else 0.25) for name, rate in first.items()})


def test_it_is_that_of_a_forecast_and_the_runs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[PilotRun] = []

    class Kept(Pilot):
        def run(self, *arguments: Any) -> PilotRun | None:
            found.append(super().run(*arguments))
            return found[-1]

    monkeypatch.setattr(short_runs, "Pilot", Kept)
    model = tiny_model()
    forecast = forecast_finetuning(model, ITEMS)
    of_forecast = found[:2]
    found.clear()
    assert find_rate_factor(model, ITEMS) == forecast.rate_factor
    assert found == of_forecast


def test_if_all_runs_diverge_the_rates_stay_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(short_runs, "Pilot", Runs(None, None))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert find_rate_factor(tiny_model(), ITEMS) == 1.0
    assert "Short runs diverged" in caplog.text


@pytest.mark.parametrize("options", [{"training": "full"}, {"r": 2}])
def test_auto_multiplies_rates_by_what_short_runs_of_the_base_model_find(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    usual = rates(create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=ITEMS))
    runs, alone = Runs(0.0, 0.5), Runs(0.0, 0.5)
    monkeypatch.setattr(short_runs, "Pilot", runs)
    found = rates(create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=ITEMS, rate_factor="auto"))
    assert found == pytest.approx({name: rate * (1 if name == "head" else 0.25) for name, rate in usual.items()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    monkeypatch.setattr(short_runs, "Pilot", alone)
    find_rate_factor(tiny_model(), ITEMS)
    for (_, one), (_, other) in zip(runs.asked, alone.asked, strict=True):
        assert one == pytest.approx(other)


def test_auto_makes_no_runs_if_they_would_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = adapted(training="full"), Runs()
    monkeypatch.setattr(short_runs, "Pilot", runs)
    arguments = {"train_dataset": ITEMS, "rate_factor": "auto"}
    short = create_plasticity_optimizer(model, torch.optim.AdamW, num_training_steps=99, **arguments)
    usual = create_plasticity_optimizer(model, torch.optim.AdamW, num_training_steps=99, train_dataset=ITEMS)
    assert rates(short) == rates(usual)
    given = create_plasticity_optimizer(model, torch.optim.AdamW, matrix_lr=1e-3, vector_lr=1e-3, **arguments)
    assert rates(given)["matrix"] == 1e-3
    create_plasticity_optimizer(model, torch.optim.AdamW, lr=1e-3, **arguments)
    assert not runs.asked


@pytest.mark.parametrize(
    ("steps", "factor", "share"), [(60, 0.4, 0.25), (60, 0.1, 0.1), (60, 2, 0.5), (100, 0.4, 0.4)]
)
def test_of_a_small_factor_and_the_share_of_a_short_run_the_smaller_one_counts(
    steps: int, factor: float, share: float
) -> None:
    model = adapted(training="full")
    usual = rates(create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=ITEMS))
    options = {"train_dataset": ITEMS, "num_training_steps": steps, "rate_factor": factor}
    found = rates(create_plasticity_optimizer(model, torch.optim.AdamW, **options))
    assert found == pytest.approx({name: rate * (1 if name == "head" else share) for name, rate in usual.items()})


def test_what_cannot_be_is_named() -> None:
    model = adapted(training="full")
    with pytest.raises(ConfigError, match="needs train_dataset, labeled images for short runs"):
        create_plasticity_optimizer(model, torch.optim.AdamW, rate_factor="auto")
    with pytest.raises(ConfigError, match=r'a number above 0, or "auto"\. Got .?often'):
        create_plasticity_optimizer(model, torch.optim.AdamW, rate_factor="often")
    several = labeled(60, [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]] * 30)
    other = tiny_model(problem_type="multi_label_classification")
    with pytest.raises(ModelError, match=r"one class per image.*Give rate_factor as a number, or leave it out"):
        find_rate_factor(other, several)
