"""Bad input gets an error that says what is wrong, and leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from plasticity_peft import PlasticityConfig, PlasticityError, measure_plasticity
from tests.support.models import random_images, tiny_model
from tests.support.snapshots import assert_same, snapshot

IMAGES = random_images()


@dataclass
class Case:
    """Options of a config, the text of the error that they must give, and the model, a small ViT by default."""

    text: str
    options: Callable[[Path], dict[str, object]]
    model: Callable[[], PreTrainedModel] = tiny_model


def given(**options: object) -> Callable[[Path], dict[str, object]]:
    return lambda folder: {"target_data": IMAGES, "max_samples": 4, **options}


def data(target: object, source: object = None) -> Callable[[Path], dict[str, object]]:
    return lambda folder: {"target_data": target, "source_data": source, "max_samples": 4}


def report_of(model: PreTrainedModel) -> Callable[[Path], dict[str, object]]:
    return lambda folder: {"report": measure_plasticity(model, IMAGES, max_samples=4)}


def file(text: str | None) -> Callable[[Path], dict[str, object]]:
    def options(folder: Path) -> dict[str, object]:
        path = folder / "plasticity.json"
        if text is not None:
            path.write_text(text)
        return {"report": path}

    return options


def truncated(folder: Path) -> dict[str, object]:
    path = folder / "plasticity.json"
    measure_plasticity(tiny_model(), IMAGES, max_samples=4).save(path)
    path.write_text(path.read_text()[:-40])
    return {"report": str(path)}


def with_nan() -> PreTrainedModel:
    model = tiny_model()
    with torch.no_grad():
        model.vit.get_submodule(first_fc2(model)).weight[0, 3] = float("nan")
    return model


def first_fc2(model: PreTrainedModel) -> str:
    return next(name for name, module in model.vit.named_modules() if isinstance(module, nn.Linear) and "attention" not in name and module.in_features == 32)  # fmt: skip  # noqa: E501


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    )


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20)
    )


class WithoutPixelValues(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"image": index, "label": 0}


class Broken(WithoutPixelValues):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        raise OSError(f"image {index} is damaged")


WHEN_WRITTEN = {
    "top_k and budget": Case("Give top_k or budget, not both", given(top_k=1, budget=0.1)),
    "top_k 0": Case("top_k must be a whole number of at least 1. Got 0", given(top_k=0)),
    "budget 0": Case("budget must be a share", given(budget=0)),
    "budget above 1": Case("budget must be a share .* Got 5", given(budget=5)),
    "unknown kind": Case("candidates must be one or more of LN1, MHA, LN2, FC1, FC2", given(candidates=("MLP",))),
    "no kind": Case("candidates must be one or more", given(candidates=())),
    "unknown protocol": Case("inputs must be one of 'embedding', 'activation'. Got 'attn'", given(inputs="attn")),
    "unknown criterion": Case(
        "criterion must be one of 'parameter_plasticity', .* Got 'best'", given(criterion="best")
    ),
    "a protocol for a criterion without": Case(
        "inputs selects what .* criterion='bound' feeds nothing to them", given(criterion="bound", inputs="embedding")
    ),
    "unknown granularity": Case("granularity must be one of", given(granularity="layer")),
    "unknown mode": Case("training must be one of 'lora', 'full'. Got 'dora'", given(training="dora")),
    "one pair": Case("max_samples must be a whole number from 2 to 16777216. Got 1", given(max_samples=1)),
    "batch of none": Case("batch_size must be a whole number of at least 1", given(batch_size=0)),
    "seed below 0": Case("seed must be a whole number from 0 to 18446744073709551615. Got -1", given(seed=-1)),
    "own target_modules": Case("target_modules is chosen by the ranking", given(target_modules=["q_proj"])),
    "report and data": Case(r"Give report .* or target_data .*, not both", given(report="plasticity.json")),
    "a report that is none": Case("report must be a PlasticityReport or the path", lambda folder: {"report": 5}),
    "source alone": Case("Give target_data too", lambda folder: {"source_data": IMAGES}),
}

WHEN_USED = {
    "needs images to measure on": Case("needs images to measure on.*target_data, or a report", lambda folder: {}),
    "top_k above the units": Case("top_k must be a whole number from 1 to 5, the number of units", given(top_k=6)),
    "top_k above the blocks": Case(
        "top_k must be a whole number from 1 to 10", given(top_k=11, granularity="component")
    ),
    "budget too small": Case("less than the .* of the smallest unit, .* A budget of 0.\\d+ fits", given(budget=1e-4)),
    "budget below the best": Case(
        "best unit, .* Give a budget of at least 0.*the attribute `report` of this error", given(budget=0.02)
    ),
    "time too short": Case("no unit fits: the cheapest, .*Give a budget of at least '0.", given(budget="0.01 time")),
    "no pixel_values": Case(r"has no 'pixel_values'; it has \['image', 'label'\]", data(WithoutPixelValues())),
    "a path": Case("target_data must be a datasets.Dataset .* Got str", data("images/")),
    "a number": Case("target_data must be .* Got int", data(7)),
    "an error of the dataset": Case("is damaged", data(Broken())),
    "wrong size": Case(r"refused pixel_values of shape \(3, 12, 12\)", data(random_images(size=12))),
    "wrong channels": Case(r"refused pixel_values of shape \(1, 8, 8\)", data(torch.rand(5, 1, 8, 8))),
    "bytes": Case("must be floating-point pixel_values.*uint8", data(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))),
    "one image": Case("target_data must contain at least 2 images. Got 1", data(random_images(1))),
    "no image": Case("target_data must contain at least 2 images. Got 0", data(random_images(0))),
    "one source image": Case("source_data must contain at least 2 images. Got 1", data(IMAGES, random_images(1))),
    "sizes that differ": Case(
        r"must have one shape. target_data\[\d+\] has .*, target_data\[\d+\] has",
        data([{"pixel_values": torch.rand(3, 8, side)} for side in (8, 9, 10)]),
    ),
    "NaN in an image": Case(r"target_data\[\d+\] contains NaN or infinity", data(torch.full((4, 3, 8, 8), torch.nan))),
    "equal images": Case(
        "Only 0 of .* pairs have a rate of change", given(target_data=torch.ones(4, 3, 8, 8), inputs="embedding")
    ),
    "no labels": Case(r"target_data\[\d+\] has no label, .* needs labels", given(criterion="gradient_norm")),
    "labels that the head has not": Case(
        "Labels must be from 0 to 2, .* Got 7 to 7",
        given(criterion="gradient_norm", target_data=[{"pixel_values": image, "label": 7} for image in IMAGES]),
    ),
    "labels in words": Case(
        r"target_data\[\d+\]: its label must be a whole number. Got 'cat'",
        given(criterion="relative_gradient_norm", target_data=[(image, "cat") for image in IMAGES]),
    ),
    "a report of another criterion": Case(
        "scores of criterion='parameter_plasticity' .* asks for criterion='rate_of_change' with inputs='embedding'",
        lambda folder: {**report_of(tiny_model())(folder), "inputs": "embedding"},
    ),
    "a ResNet": Case(
        "ResNetForImageClassification .*'resnet'.* has no vision transformer .* Known values .*: aimv2_",
        given(),
        resnet,
    ),
    "a text model": Case(
        "BertForSequenceClassification .*'bert'.* has no vision transformer whose components are known", given(), bert
    ),
    "NaN in the weights": Case("weights of the model contain NaN or infinity: vit.*weight", given(), with_nan),
    "a report of a deeper model": Case(
        "measured on another architecture: 'vit', 15 components", report_of(tiny_model(num_hidden_layers=3))
    ),
    "a report of another family": Case("measured on another architecture: 'deit'", report_of(tiny_model("deit"))),
    "no such report": Case("Cannot read the report .*plasticity.json: No such file", file(None)),
    "a truncated report": Case("Cannot read the report .*plasticity.json: it is not a whole JSON", truncated),
    "an empty report": Case("it is not a whole JSON", file("")),
    "a foreign JSON file": Case("it is not a plasticity report", file('{"peft_type": "LORA"}')),
    "a list": Case("it is not a plasticity report", file("[1, 2]")),
    "a later format": Case("format version 3", file('{"format": "plasticity_peft", "format_version": 3}')),
    "half a report": Case("scores is missing", file('{"format": "plasticity_peft", "format_version": 1}')),
}


@pytest.mark.parametrize("name", WHEN_WRITTEN)
def test_a_config_that_cannot_be_carried_out_is_refused_when_written(name: str, tmp_path: Path) -> None:
    case = WHEN_WRITTEN[name]
    with pytest.raises(PlasticityError, match=case.text) as raised:
        PlasticityConfig(**case.options(tmp_path))
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("name", WHEN_USED)
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_bad_input_leaves_the_model_as_it_was(name: str, how: str, tmp_path: Path) -> None:
    case = WHEN_USED[name]
    model = case.model().train()
    config = PlasticityConfig(**case.options(tmp_path))
    before = snapshot(model)
    expected = OSError if "dataset" in name else PlasticityError
    with pytest.raises(expected, match=re.compile(case.text, re.DOTALL)):
        get_peft_model(model, config) if how == "get_peft_model" else model.add_adapter(config)
    assert_same(before, snapshot(model))


def test_a_second_adapter_that_fails_leaves_the_first() -> None:
    model = get_peft_model(tiny_model(), PlasticityConfig(target_data=IMAGES, max_samples=4)).train()
    before = snapshot(model)
    with pytest.raises(PlasticityError, match="at least 2 images"):
        model.add_adapter("second", PlasticityConfig(target_data=IMAGES[:1], max_samples=4))
    assert_same(before, snapshot(model))
    assert list(model.peft_config) == ["default"]
