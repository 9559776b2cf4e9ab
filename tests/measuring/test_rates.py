"""Learning rates by group: which parameter is in which group, and what the recommended rates depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from plasticity_peft import PlasticityConfig, create_plasticity_optimizer, find_components, fit_head
from plasticity_peft.errors import ConfigError, DataError, ModelError
from plasticity_peft.measuring.rates import (
    MOST_OVER_MATRICES,
    OF_GRADIENT,
    OF_LORA,
    TO_FIT,
    USUAL_SHARE,
    trained_groups,
)
from tests.support.families import items
from tests.support.models import tiny_model
from tests.support.round_trips import adapt
from tests.support.tasks import TASKS

LABELED = [
    {"pixel_values": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(n)) + n % 3, "labels": n % 3}
    for n in range(40)
]


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def adapted(training: str = "full", **options: Any) -> nn.Module:
    images = torch.stack([item["pixel_values"] for item in LABELED[:8]])
    config = PlasticityConfig(target_data=images, training=training, max_samples=8, **options)
    return get_peft_model(tiny_model(), config)


def test_every_parameter_that_trains_is_in_one_group() -> None:
    model = adapted("lora", candidates=("LN1", "MHA"), top_k=2)
    optimizer = create_plasticity_optimizer(model, torch.optim.AdamW, weight_decay=0.1)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped})
    assert {id(parameter) for parameter in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            expected = (
                "lora_A" if "lora_A" in name else "lora_B" if "lora_B" in name else
                "head" if "classifier" in name else "vector"
            )  # fmt: skip
            assert group["name"] == expected, name
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_a_model_without_an_adapter_has_groups_too() -> None:
    groups = {group.name: {name for name, _ in group.parameters} for group in trained_groups(tiny_model())}
    assert groups["head"] == {"classifier.weight", "classifier.bias"}
    assert "vit.embeddings.patch_embeddings.projection.weight" in groups["matrix"]
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= groups["vector"]
    assert all(name.endswith("weight") for name in groups["matrix"])


def test_the_rate_of_what_trains_in_full_follows_from_its_gradient_and_its_number_of_parameters() -> None:
    """It is inversely proportional to the root of their product; the gradient is computed here by hand."""
    for kind in ("MHA", "FC1", "FC2"):
        model = adapted(candidates=kind)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = rates(create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=LABELED, batch_size=40))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        total, count = by_hand(model), {group.name: group.count for group in trained_groups(model)}
        wanted = {name: OF_GRADIENT[name] / math.sqrt(count[name] * total[name]) for name in OF_GRADIENT}
        assert found["matrix"] == pytest.approx(wanted["matrix"], rel=1e-3)
        expected = min(wanted["vector"], MOST_OVER_MATRICES * wanted["matrix"])
        assert found["vector"] == pytest.approx(expected, rel=1e-3)


def by_hand(model: nn.Module) -> dict[str, float]:
    """Returns the sums of magnitudes of the gradient through a fitted head, as if each image had been left out."""
    assert len(LABELED) <= TO_FIT
    found = fit_head(model, LABELED)
    images = torch.stack([item["pixel_values"] for item in LABELED])
    loss = model.eval()(pixel_values=images, labels=torch.tensor([item["labels"] for item in LABELED])).loss
    loss.backward()
    share = float(loss.detach()) / found.loss / USUAL_SHARE
    assert 0 < share < 1
    sums = {"matrix": 0.0, "vector": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "classifier" not in name:
            sums["matrix" if parameter.ndim > 1 else "vector"] += float(parameter.grad.abs().sum()) / share
    return sums


def test_the_head_does_not_matter_for_the_rates_of_what_trains_in_full() -> None:
    """A fresh head lets through almost no gradient, which is no reason for large steps."""
    found = []
    for scale in (1.0, 1e-3):
        model = adapted(candidates="MHA")
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.mul_(scale)
        found.append(rates(create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=LABELED)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_lora_has_a_rate_that_follows_from_its_sizes() -> None:
    def of(**options: Any) -> float:
        layers = find_components(tiny_model())[1].modules[:2]
        model = get_peft_model(tiny_model(), LoraConfig(target_modules=list(layers), **options))
        return rates(create_plasticity_optimizer(model, torch.optim.AdamW))["lora_B"]

    one = of(r=4, lora_alpha=8)
    assert one == pytest.approx(OF_LORA / (8 * tiny_model().config.hidden_size))
    assert of(r=2, lora_alpha=8) == pytest.approx(one)  # the update has the same size
    assert of(r=4, lora_alpha=16) == pytest.approx(one / 2)
    assert of(r=4, lora_alpha=8, use_rslora=True) == pytest.approx(one / 2)


def test_without_labels_the_rates_follow_from_the_number_of_parameters() -> None:
    model = adapted(candidates="MHA")
    found = rates(create_plasticity_optimizer(model, torch.optim.AdamW))
    count = next(group.count for group in trained_groups(model) if group.name == "matrix")
    assert found["matrix"] == pytest.approx(0.3 / math.sqrt(count))


def test_a_head_that_was_fitted_gets_smaller_steps_than_a_fresh_one() -> None:
    found = []
    for fitted in (False, True):
        config = PlasticityConfig(
            training="lora", target_data=LABELED, fit_head=fitted, candidates="MHA", max_samples=8
        )
        model = get_peft_model(tiny_model(), config)
        found.append(rates(create_plasticity_optimizer(model, torch.optim.AdamW))["head"])
    assert found[0] == pytest.approx(10 * found[1])


class Counted(list):
    """Images that count how often one is read."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("training", ["full", "lora"])
def test_a_head_that_is_as_it_was_fitted_is_not_fitted_again(training: str) -> None:
    """The rates are the same, from fewer images that are read; a head that was changed is fitted again."""
    options = {} if training == "full" else {"r": 2, "bias": "all"}  # biases train in full beside LoRA
    images = Counted(LABELED)
    fresh = adapted(training, **options)
    wanted = rates(create_plasticity_optimizer(fresh, torch.optim.AdamW, train_dataset=images))
    with_fit, images.read = images.read, 0
    for changed in (False, True):
        model = adapted(training, **options)
        fit_head(model, LABELED)
        if changed:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad)[0].add_(1)
        images.read = 0
        found = rates(create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=images))
        assert {name: rate for name, rate in found.items() if name != "head"} == pytest.approx(
            {name: rate for name, rate in wanted.items() if name != "head"}, rel=1e-5
        )
        assert (images.read < with_fit) == (not changed)
    with pytest.raises(ConfigError, match=r"num_training_steps must be a whole number of at least 1. Got 0"):
        create_plasticity_optimizer(model, torch.optim.AdamW, num_training_steps=0)


@pytest.mark.parametrize(("steps", "share"), [(None, 1), (100, 1), (5000, 1), (99, 0.25), (50, 0.25), (10, 0.01)])
def test_short_runs_take_smaller_steps_in_full_but_not_by_lora(steps: int | None, share: float) -> None:
    for training, options in (("full", {}), ("lora", {"r": 2})):
        model = adapted(training, **options)
        usual = rates(create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=LABELED))
        found = rates(
            create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=LABELED, num_training_steps=steps)
        )
        ratios = {name: rate / usual[name] for name, rate in found.items()}
        assert ratios == pytest.approx({name: share if name in ("vector", "matrix") else 1 for name in usual})


def test_given_rates_are_used_and_nothing_is_recommended_then() -> None:
    model = adapted(candidates="MHA")
    optimizer = create_plasticity_optimizer(model, torch.optim.SGD, lr=0.5, matrix_lr=0.1, momentum=0.9)
    assert rates(optimizer) == {"head": 0.5, "matrix": 0.1, "vector": 0.5}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


@pytest.mark.parametrize("training", ["full", "lora"])
def test_a_factor_multiplies_what_is_recommended_but_for_the_head(training: str) -> None:
    options = {} if training == "full" else {"r": 2, "bias": "all"}
    usual, found = (
        rates(
            create_plasticity_optimizer(
                adapted(training, **options),
                torch.optim.AdamW,
                train_dataset=LABELED,
                rate_factor=factor,
                vector_lr=0.5,
            )
        )
        for factor in (1, 0.4)
    )
    other = {"head": 1.0, "vector": 1.0}
    assert {name: rate / usual[name] for name, rate in found.items()} == pytest.approx(
        {name: other.get(name, 0.4) for name in usual}
    )
    assert set(usual) - set(other)


def test_a_factor_of_nothing_is_named() -> None:
    model = adapted(candidates="MHA")
    with pytest.raises(ConfigError, match=r"rate_factor must be a number above 0\. Got 0"):
        create_plasticity_optimizer(model, torch.optim.AdamW, rate_factor=0)
    none = "there are none: what trains is head, vector, matrix, and rates are given for vector, matrix"
    with pytest.raises(ConfigError, match=none):
        create_plasticity_optimizer(model, torch.optim.AdamW, rate_factor=0.4, matrix_lr=1e-3, vector_lr=1e-3)
    with pytest.raises(ConfigError, match="rates are given for head, vector, matrix"):
        create_plasticity_optimizer(model, torch.optim.AdamW, rate_factor=0.4, lr=1e-3)


def test_what_cannot_be_is_named() -> None:
    model = adapted(candidates="MHA")
    with pytest.raises(ConfigError, match=r"Adam and its variants only\. Give lr, or head_lr, vector_lr, matrix_lr"):
        create_plasticity_optimizer(model, torch.optim.SGD)
    with pytest.raises(ConfigError, match="matrix_lr must be a number above 0"):
        create_plasticity_optimizer(model, torch.optim.AdamW, matrix_lr=-1)
    with pytest.raises(DataError, match="label"):
        create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=torch.rand(8, 3, 8, 8))
    with pytest.raises(ConfigError, match="No parameter of ViTForImageClassification trains"):
        create_plasticity_optimizer(tiny_model().requires_grad_(False), torch.optim.AdamW)


def segmenter() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """Returns a model with a decoder, which cannot be fitted, whose attention trains in full, and labeled images."""
    task = TASKS["segformer-semantic"]
    data = items({**task.images(), **task.labels()})
    config = PlasticityConfig(target_data=task.data(), training="full", candidates="MHA", settle=None, max_samples=2)
    return get_peft_model(task.build(), config), data


def test_a_decoder_trains_at_the_rate_of_its_size() -> None:
    model, _ = segmenter()
    found = rates(create_plasticity_optimizer(model, torch.optim.AdamW))
    counts = {group.name: group.count for group in trained_groups(model)}
    for name in ("head", "matrix"):
        assert found[name] == pytest.approx(0.3 / math.sqrt(counts[name]))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_a_gradient_through_a_decoder_as_it_is_only_lowers_a_rate(scale: float) -> None:
    model, data = segmenter()
    model.base_model.model.decode_head.modules_to_save["default"].classifier.weight.data.mul_(scale)
    by_size = rates(create_plasticity_optimizer(model, torch.optim.AdamW))
    found = rates(create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=data))
    assert found["head"] == by_size["head"]
    assert found["matrix"] == by_size["matrix"] if scale < 1e6 else found["matrix"] < 0.5 * by_size["matrix"]


@pytest.mark.parametrize("name", ["dpt-depth", "clip-towers", "llava"])
def test_a_model_without_a_loss_of_images_alone_gets_rates_by_size(name: str) -> None:
    """DPT has none in transformers; that of CLIP and of LLaVA needs text."""
    task = TASKS[name]
    model = adapt(task, task.build(), "full", granularity="kind", top_k=1, candidates="MHA")
    data = items({**task.images(), "labels": torch.zeros(2, 16, 16)})
    with pytest.raises((DataError, ModelError), match=r"leave train_dataset out"):
        create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=data)
    found = rates(create_plasticity_optimizer(model, torch.optim.AdamW))
    counts = {group.name: group.count for group in trained_groups(model)}
    assert found["matrix"] == pytest.approx(0.3 / math.sqrt(counts["matrix"]))
