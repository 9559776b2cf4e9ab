"""A model with adapters has the scores and the forecasts of the same model with merged weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model

from plasticity_peft import (
    PlasticityConfig,
    PlasticityReport,
    find_components,
    forecast_finetuning,
    measure_plasticity,
)
from plasticity_peft.checks import PROTOCOLS
from plasticity_peft.criteria.registry import CRITERIA
from plasticity_peft.errors import ModelError
from tests.measuring.test_head import labeled
from tests.support.models import tiny_model

ITEMS = labeled(48, [number % 3 for number in range(48)])
ADAPTERS = {
    "attention in full": {"training": "full", "top_k": 1, "candidates": ["MHA"]},
    "everything in full": {"training": "full", "top_k": 5},
    "LoRA on everything": {"r": 4, "top_k": 5},
    "DoRA on everything": {"r": 4, "top_k": 5, "use_dora": True},
}
BY_GRADIENT_OF_WEIGHTS = ("gradient_norm", "relative_gradient_norm")


def trained(**options: Any) -> PeftModel:
    """Returns a model whose adapter has learned something."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), PlasticityConfig(target_data=ITEMS, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def merged(model: PeftModel) -> torch.nn.Module:
    return copy.deepcopy(model).merge_and_unload()


def means(report: PlasticityReport) -> list[float]:
    return [one.mean for one in report.scores]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random"}))
def test_scores_are_those_of_the_merged_model(criterion: str, adapter: str) -> None:
    model = trained(**ADAPTERS[adapter])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for inputs in PROTOCOLS if CRITERIA[criterion].protocols else (None,):
        arguments = {"criterion": criterion, "inputs": inputs, "settle": None, "max_samples": 32}
        expected = measure_plasticity(merged(model), ITEMS, **arguments)
        if "DoRA" in adapter and criterion in BY_GRADIENT_OF_WEIGHTS:
            with pytest.raises(ModelError, match=r"its adapter \(DoraLinearVariant\) changes the gradient"):
                measure_plasticity(model, ITEMS, **arguments)
            continue
        found = measure_plasticity(model, ITEMS, **arguments)
        assert [one.id for one in found.scores] == [one.id for one in expected.scores]
        # The smallest singular value of a matrix of low rank is not exact.
        tolerance = 0.01 if criterion == "condition_number" else 1e-4
        assert [one.mean for one in found.scores] == pytest.approx(
            [one.mean for one in expected.scores], rel=tolerance
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("adapter", ["attention in full", "LoRA on everything"])
def test_forecasts_are_those_of_the_merged_model(adapter: str) -> None:
    """The short runs train what computes, not the originals that PEFT keeps."""
    model = trained(**ADAPTERS[adapter])
    found, expected = forecast_finetuning(model, ITEMS), forecast_finetuning(merged(model), ITEMS)
    assert [one.gain for one in found.sets] == pytest.approx([one.gain for one in expected.sets], abs=1.5 / 48)
    assert found.pilot.gain == pytest.approx(expected.pilot.gain, abs=1.5 / 48)
    for one, other in zip(found.sets, expected.sets, strict=True):
        assert one.squared_error == pytest.approx(other.squared_error, rel=1e-4)
        assert one.rates == pytest.approx(other.rates, rel=1e-4)


def test_of_two_adapters_the_active_one_counts() -> None:
    model = trained(training="full", candidates=["MHA"])
    model.add_adapter("other", PlasticityConfig(target_data=ITEMS, training="full", candidates=["FC1"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.mul_(1.5)
    scores = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        scores[name] = means(measure_plasticity(model, ITEMS, criterion="bound"))
        assert scores[name] == pytest.approx(means(measure_plasticity(merged(model), ITEMS, criterion="bound")))
    assert scores["default"] != scores["other"]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("criterion", ["bound", "gradient_norm", "relative_gradient_norm", "parameter_plasticity"])
def test_norms_of_ln_tuning_count(criterion: str) -> None:
    model = get_peft_model(tiny_model(), LNTuningConfig(target_modules=["layernorm_before", "layernorm_after"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    expected = means(measure_plasticity(merged(model), ITEMS, criterion=criterion))
    assert means(measure_plasticity(model, ITEMS, criterion=criterion)) == pytest.approx(expected, rel=1e-4)
    base = means(measure_plasticity(tiny_model(), ITEMS, criterion=criterion))
    with model.disable_adapter():
        assert means(measure_plasticity(model, ITEMS, criterion=criterion)) == pytest.approx(base, rel=1e-4)
    assert base != pytest.approx(expected, rel=1e-2)


def test_a_disabled_adapter_takes_no_part() -> None:
    model = trained(training="full", candidates=["MHA"])
    arguments = {"criterion": "bound", "settle": None}
    expected = measure_plasticity(tiny_model(), ITEMS, **arguments)
    with model.disable_adapter():
        found = measure_plasticity(model, ITEMS, **arguments)
    assert means(found) == means(expected)


def test_a_norm_of_the_gradient_that_is_not_that_of_the_merged_weights_is_refused() -> None:
    """Adapters of stock PEFT too: IA3 multiplies."""
    query = next(part.modules[0] for part in find_components(tiny_model()) if part.kind == "MHA")
    model = get_peft_model(tiny_model(), IA3Config(target_modules=[query], feedforward_modules=[]))
    with pytest.raises(ModelError, match=rf"{query}: its adapter \(Linear\) changes the gradient"):
        measure_plasticity(model, ITEMS, criterion="gradient_norm")
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=[query]))
    measure_plasticity(model, ITEMS, criterion="gradient_norm", max_samples=32)
