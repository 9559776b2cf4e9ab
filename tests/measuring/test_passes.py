"""Whatever looks at images takes fewer of them in a pass if memory runs out, and images of several shapes in turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2ForImageClassification

from plasticity_peft import (
    create_plasticity_optimizer,
    find_components,
    fit_head,
    forecast_finetuning,
    measure_plasticity,
)
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.errors import ModelError
from plasticity_peft.measuring.head import labeled_images, received, targets_of
from plasticity_peft.measuring.passes import Passes
from plasticity_peft.measuring.pilot import CLASSES, Pilot
from plasticity_peft.measuring.short_runs import find_rate_factor
from tests.measuring.test_head import labeled
from tests.measuring.test_rounds import short_of_memory
from tests.support.models import tiny_model

ITEMS = labeled(90, [number % 3 for number in range(90)])


def numbers_of(found: Any) -> list[float]:
    """Returns all numbers in the dictionary of a forecast, in its order."""
    if isinstance(found, dict):
        return [number for value in found.values() for number in numbers_of(value)]
    if isinstance(found, list):
        return [number for value in found for number in numbers_of(value)]
    return [float(found)] if isinstance(found, (int, float)) else []


def head(model: torch.nn.Module) -> list[float]:
    fit = fit_head(model, ITEMS)
    return [fit.score, fit.loss, fit.penalty, *model.get_parameter("classifier.weight").flatten().tolist()]


def forecast(model: torch.nn.Module) -> list[float]:
    return numbers_of(forecast_finetuning(model, ITEMS, sets=["MHA", "LN2"], pilot=False).to_dict())


def short_run(model: torch.nn.Module) -> list[float]:
    architecture = find_architecture(model)
    sampler = labeled_images(model, architecture, ITEMS, 90, 32, 0)
    passes = Passes(sampler, "", "")
    seen = list(received("classifier", model, architecture, passes, range(90)))
    features = np.concatenate([found for _, found in seen])
    targets = np.concatenate([targets_of(sampler.labels(batch), 3, CLASSES) for batch, _ in seen])
    rates = {"head": 1e-3, "matrix": 1e-3, "vector": 1e-3}
    found = Pilot(model, architecture, sampler, "classifier", rates).run(features, targets)
    assert found is not None
    return [found.gain, found.gain_error]


def rate_factor(model: torch.nn.Module) -> list[float]:
    return [find_rate_factor(model, ITEMS)]


def rates(model: torch.nn.Module) -> list[float]:
    for component in find_components(model):
        for path in component.modules:
            model.get_submodule(path).requires_grad_(True)
    optimizer = create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=ITEMS)
    return [group["lr"] for group in optimizer.param_groups]


# A gradient is a mean over batches, whose sizes differ by one image. Adam goes by the sign of a gradient that is zero
# but for rounding, so that the class of one of the 45 images may be another one after a short run.
TOLERANCES: dict[Callable[[torch.nn.Module], list[float]], dict[str, float]] = {
    head: {"rel": 1e-3, "abs": 1e-6},
    forecast: {"rel": 1e-3, "abs": 1e-6},
    rates: {"rel": 1e-2},
    short_run: {"abs": 1.5 / 45},
}


@pytest.mark.parametrize("work", TOLERANCES)
def test_if_memory_runs_out_smaller_passes_give_the_same(work: Callable[[torch.nn.Module], list[float]]) -> None:
    expected = work(tiny_model().eval())
    model = tiny_model().eval()
    taken = short_of_memory(model, most=10)
    found = work(model)
    assert max(taken) == 8
    assert found == pytest.approx(expected, **TOLERANCES[work])


def test_the_factor_of_the_rates_is_found_in_smaller_passes() -> None:
    model = tiny_model().eval()
    taken = short_of_memory(model, most=10)
    assert rate_factor(model) in ([0.25], [1.0])
    assert max(taken) == 8


def test_the_gradient_of_a_pass_that_ran_out_of_memory_does_not_count() -> None:
    """Memory often runs out in the backward pass, when some gradients are there already."""

    def trained(most: int) -> dict[str, torch.Tensor]:
        model = tiny_model().eval()
        architecture = find_architecture(model)
        sampler = labeled_images(model, architecture, ITEMS, 90, 32, 0)
        sizes: list[int] = []

        def check(_: Any, args: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            sizes.append(len(tokens))
            tokens.register_hook(lambda gradient: refuse(len(gradient), most))

        model.get_submodule(architecture.blocks[0]).register_forward_hook(check)
        pilot = Pilot(model, architecture, sampler, "classifier", {"head": 1e-3, "matrix": 1e-3, "vector": 1e-3})
        with torch.enable_grad():
            pilot._train(model.requires_grad_(False), 32, Passes(sampler, "", ""))
        assert min(sizes) == (8 if most < 32 else 32)
        # The gradient of a bias of keys is zero but for rounding, and Adam goes by its sign.
        keys = ("k_proj.bias", "key.bias")
        return {name: value for name, value in model.state_dict().items() if not name.endswith(keys)}

    def refuse(count: int, most: int) -> None:
        if count > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    torch.testing.assert_close(trained(most=10), trained(most=32), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (head, "Out of memory for one image, to fit the head. Use smaller images"),
        (forecast, "Out of memory for one image, to forecast. Use smaller images"),
        (rates, "Out of memory for the gradient of 1 images by all that trains"),
    ],
)
def test_if_one_image_does_not_fit_it_says_so(work: Callable[[Any], list[float]], message: str) -> None:
    model = tiny_model().eval()
    checked: list[int] = []

    def check(_: Any, args: Any, kwargs: Any) -> None:
        count = len(kwargs["pixel_values"])
        checked.append(count)
        if count > 2 or len(checked) > 8:  # examples pass
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    with pytest.raises(ModelError, match=message):
        work(model)


@pytest.mark.parametrize("work", [forecast_finetuning, find_rate_factor])
def test_if_a_copy_of_the_model_cannot_train_it_says_how_to_do_without(
    work: Callable[[Any, Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(
        ModelError, match=r"train a copy of ViTForImageClassification in full.*pilot=False.*rate_factor"
    ):
        work(tiny_model().eval(), ITEMS)


def test_batches_of_a_data_loader_are_not_split() -> None:
    model = tiny_model().eval()
    fit_head(model, ITEMS)

    def together(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }

    short_of_memory(model, most=10)
    with pytest.raises(ModelError, match="Out of memory for the gradient of 16 images by all that trains"):
        create_plasticity_optimizer(
            model, torch.optim.AdamW, train_dataset=DataLoader(ITEMS, batch_size=16, collate_fn=together)
        )


# ---- images of several shapes


def model_of_any_size() -> Dinov2ForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Dinov2ForImageClassification(Dinov2Config(num_labels=2, **sizes)).eval()


def in_batches(size: int) -> DataLoader[Any]:
    """Returns images of two shapes: eight of one are followed by eight of the other."""
    items = [
        {
            "pixel_values": F.interpolate(item["pixel_values"][None], size=28 + 14 * (number // 8 % 2))[0],
            "labels": label,
        }
        for number, item in enumerate(labeled(48, [number % 2 for number in range(48)]))
        for label in [number % 2]
    ]

    def together(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in some]),
            "labels": torch.tensor([item["labels"] for item in some]),
        }

    return DataLoader(items, batch_size=size, collate_fn=together)  # type: ignore[arg-type]


def test_images_of_several_shapes_go_in_turns() -> None:
    def fitted(size: int) -> torch.Tensor:
        model = model_of_any_size()
        assert fit_head(model, in_batches(size)).images == 48
        return model.classifier.weight.detach()

    torch.testing.assert_close(fitted(8), fitted(1), rtol=1e-3, atol=1e-6)
    found, other = (forecast_finetuning(model_of_any_size(), in_batches(size), sets=["MHA"]) for size in (8, 1))
    assert found.sets[0].squared_error == pytest.approx(other.sets[0].squared_error, rel=1e-3)
    assert math.isfinite(found.sets[0].gain)
    assert find_rate_factor(model_of_any_size(), in_batches(8)) in (0.25, 1.0)
    create_plasticity_optimizer(model_of_any_size(), torch.optim.AdamW, train_dataset=in_batches(8))
    assert measure_plasticity(model_of_any_size(), in_batches(8)).scores
