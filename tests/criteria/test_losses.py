"""Criteria with gradients use the model's own loss, whatever the form of its labels."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    YolosConfig,
    YolosForObjectDetection,
)

from plasticity_peft import find_components, measure_plasticity
from plasticity_peft.errors import DataError, ModelError
from plasticity_peft.images.labels import collated
from tests.support.models import random_images, tiny_model

COUNT = 8
IMAGES = random_images(COUNT)
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)
VECTORS = torch.rand(COUNT, 3, generator=GENERATOR)
NUMBERS = torch.randn(COUNT, generator=GENERATOR)


def vit(**options: Any) -> PreTrainedModel:
    return disturbed(ViTForImageClassification(ViTConfig(**{**SMALL, "image_size": 8, **options})))


def disturbed(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def norms(model: nn.Module, loss: Callable[[slice], torch.Tensor], layer: nn.Module, count: int = COUNT) -> float:
    """Returns the mean over two batches of the norm of the gradient of a loss by a layer."""
    found = []
    for part in (slice(0, count // 2), slice(count // 2, count)):
        gradients = torch.autograd.grad(loss(part), list(layer.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    return float(torch.stack(found).mean())


def score(model: nn.Module, data: Any, **options: Any) -> float:
    """Returns the score of the first FC1, for batches of the images in their order."""
    loader = DataLoader(data, COUNT // 2, collate_fn=options.pop("collate", as_items))
    report = measure_plasticity(model, loader, criterion="gradient_norm", settle=None, **options)
    assert report.samples == 2
    return next(row.mean for row in report.scores if row.id == "0.FC1")


def as_items(items: list[Any]) -> list[Any]:
    return items


def rows(labels: Any, images: torch.Tensor = IMAGES) -> list[dict[str, Any]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


FORMS: dict[str, tuple[dict[str, Any], Any, Callable[[torch.Tensor, slice], torch.Tensor]]] = {
    "several labels": (
        {"num_labels": 3}, (VECTORS > 0.5).float(),
        lambda logits, part: F.binary_cross_entropy_with_logits(logits, (VECTORS[part] > 0.5).float()),
    ),
    "several labels as lists": (
        {"num_labels": 3}, (VECTORS > 0.5).float().tolist(),
        lambda logits, part: F.binary_cross_entropy_with_logits(logits, (VECTORS[part] > 0.5).float()),
    ),
    "several labels as whole numbers": (
        {"num_labels": 3, "problem_type": "multi_label_classification"}, (VECTORS > 0.5).long().tolist(),
        lambda logits, part: F.binary_cross_entropy_with_logits(logits, (VECTORS[part] > 0.5).float()),
    ),
    "soft labels": (
        {"num_labels": 3}, VECTORS,
        lambda logits, part: F.binary_cross_entropy_with_logits(logits, VECTORS[part]),
    ),
    "a number": ({"num_labels": 1}, NUMBERS, lambda logits, part: F.mse_loss(logits.squeeze(), NUMBERS[part])),
    "a number of Python": (
        {"num_labels": 1}, NUMBERS.tolist(), lambda logits, part: F.mse_loss(logits.squeeze(), NUMBERS[part])
    ),
    "a double number of numpy": (
        {"num_labels": 1}, NUMBERS.double().numpy(),
        lambda logits, part: F.mse_loss(logits.squeeze(), NUMBERS[part]),
    ),
    "a whole number to regress": (
        {"num_labels": 1}, list(range(COUNT)),
        lambda logits, part: F.mse_loss(logits.squeeze(), torch.arange(COUNT)[part].float()),
    ),
    "several numbers": (
        {"num_labels": 3, "problem_type": "regression"}, VECTORS,
        lambda logits, part: F.mse_loss(logits, VECTORS[part]),
    ),
    "a class": (
        {"num_labels": 3}, [number % 3 for number in range(COUNT)],
        lambda logits, part: F.cross_entropy(logits, torch.arange(COUNT)[part] % 3),
    ),
    "a class as a floating-point number": (
        {"num_labels": 3}, [float(number % 3) for number in range(COUNT)],
        lambda logits, part: F.cross_entropy(logits, torch.arange(COUNT)[part] % 3),
    ),
    "two classes as booleans": (
        {"num_labels": 2}, [number % 2 == 0 for number in range(COUNT)],
        lambda logits, part: F.cross_entropy(logits, 1 - torch.arange(COUNT)[part] % 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("holder", ["items", "tuples"])
def test_labels_of_every_form_reach_the_loss_of_a_classifier(form: str, holder: str) -> None:
    options, labels, loss = FORMS[form]
    model = vit(**options)
    before = model.config.problem_type
    data = rows(labels) if holder == "items" else [(row["pixel_values"], row["labels"]) for row in rows(labels)]
    layer = model.get_submodule(find_components(model)[3].path)
    expected = norms(model, lambda part: loss(model(pixel_values=IMAGES[part]).logits, part), layer)
    assert score(model, data, collate=lambda items: items) == pytest.approx(expected, rel=1e-5)
    assert model.config.problem_type == before


@pytest.mark.parametrize("form", ["tensor", "array", "uint8", "image"])
def test_segmentation_maps(form: str) -> None:
    from PIL import Image

    config = BeitConfig(
        **{**SMALL, "num_hidden_layers": 4}, num_labels=3, out_indices=[1, 2, 3, 4], use_auxiliary_head=False
    )
    model = disturbed(BeitForSemanticSegmentation(config))
    images = random_images(COUNT, size=16)
    maps = torch.randint(0, 3, (COUNT, 16, 16), generator=torch.Generator().manual_seed(2))
    forms = {
        "tensor": list(maps), "array": list(maps.numpy()), "uint8": list(maps.to(torch.uint8).numpy()),
        "image": [Image.fromarray(each.astype(np.uint8)) for each in maps.numpy()],
    }  # fmt: skip
    loss = lambda part: model(pixel_values=images[part], labels=maps[part]).loss  # noqa: E731
    layer = model.beit.layers[0].mlp.fc1 if hasattr(model.beit, "layers") else model.beit.encoder.layer[0].intermediate
    expected = norms(model, loss, layer)
    assert score(model, rows(forms[form], images)) == pytest.approx(expected, rel=1e-4)


def detections(items: list[Any]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": [item["labels"] for item in items],
    }


@pytest.mark.parametrize("collate", [as_items, detections])
def test_boxes_of_a_detector(collate: Callable[..., Any]) -> None:
    pytest.importorskip("scipy")
    config = YolosConfig(
        **{**SMALL, "image_size": [16, 16]}, num_labels=3, num_detection_tokens=5, use_mid_position_embeddings=False
    )
    model = disturbed(YolosForObjectDetection(config))
    images = random_images(COUNT, size=16)
    labels = [
        {"class_labels": torch.tensor([number % 3] * (1 + number % 2)),
         "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3 + 0.05 * number]] * (1 + number % 2))}
        for number in range(COUNT)
    ]  # fmt: skip
    layers = model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer
    fc1 = next(module for name, module in layers[0].named_modules() if isinstance(module, nn.Linear) and module.out_features == 32)  # fmt: skip  # noqa: E501
    expected = norms(model, lambda part: model(pixel_values=images[part], labels=labels[part]).loss, fc1)
    assert score(model, rows(labels, images), collate=collate) == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_needs_no_labels() -> None:
    config = ViTMAEConfig(
        **SMALL, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )  # fmt: skip
    model = disturbed(ViTMAEForPreTraining(config))
    assert score(model, list(random_images(COUNT, size=16))) > 0


class Own(nn.Module):
    """A model of the user around a vision transformer, with a loss of its own."""

    def __init__(self, form: str = "namespace", loss: Callable[..., torch.Tensor] = F.l1_loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit, self.head = tiny_model().vit, nn.Linear(16, 1)
        self.form, self.loss = form, loss

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(self.vit(pixel_values=pixel_values).last_hidden_state[:, 0])[:, 0]
        loss = None if labels is None else self.loss(logits, labels)
        if self.form == "namespace":
            return SimpleNamespace(loss=loss, logits=logits)
        if self.form == "dictionary":
            return {"loss": loss, "logits": logits}
        return logits if loss is None else (loss, logits)


@pytest.mark.parametrize("form", ["namespace", "dictionary", "tuple"])
def test_a_loss_of_the_user(form: str) -> None:
    model = Own(form).eval()
    data = rows(NUMBERS)
    expected = norms(
        model,
        lambda part: F.l1_loss(_logits(model, IMAGES[part]), NUMBERS[part]),
        model.get_submodule(find_components(model)[3].path),
    )
    assert score(model, data) == pytest.approx(expected, rel=1e-5)


def _logits(model: Own, images: torch.Tensor) -> torch.Tensor:
    return model.head(model.vit(pixel_values=images).last_hidden_state[:, 0])[:, 0]


def test_a_loss_for_each_image_is_meaned() -> None:
    model = Own(loss=lambda logits, labels: (logits - labels).square()).eval()
    mean = Own(loss=F.mse_loss).eval()
    assert score(model, rows(NUMBERS)) == pytest.approx(score(mean, rows(NUMBERS)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "too few columns": (
        lambda: vit(num_labels=3), VECTORS[:, :2],
        r"loss of ViTForImageClassification refuses labels, a tensor of shape \(4, 2\) \(torch\.float32\): Value",
    ),
    "a class too many": (lambda: vit(num_labels=3), [3] * COUNT, "Labels must be from 0 to 2, .* Got 3 to 3"),
    "words": (lambda: vit(num_labels=3), ["cat"] * COUNT, r"its label must be a whole number\. Got 'cat'"),
    "labels of several shapes": (
        lambda: vit(num_labels=3), [[0] * (1 + number % 2) for number in range(COUNT)],
        "refuses labels, a list of 4, each a tensor",
    ),
    "maps for a classifier": (lambda: vit(num_labels=3), [np.zeros((8, 8), int)] * COUNT, "refuses labels, a tensor"),
    "dictionaries for a classifier": (lambda: vit(num_labels=3), [{"boxes": [1.0]}] * COUNT, "dictionary with boxes"),
    "a type that only the gradient refuses": (
        lambda: Own(loss=lambda logits, labels: _refusing(logits)).eval(), NUMBERS, "refuses .*only backwards",
    ),
}  # fmt: skip


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        return values.sum()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("only backwards")


def _refusing(logits: torch.Tensor) -> torch.Tensor:
    return _Refusing.apply(logits)


@pytest.mark.parametrize("name", REFUSED)
def test_labels_that_the_loss_refuses_are_an_error_of_ours(name: str) -> None:
    make, labels, text = REFUSED[name]
    with pytest.raises(DataError, match=text):
        score(make(), rows(labels))


def test_a_model_without_a_loss_is_refused() -> None:
    model = Own(loss=lambda *_: None).eval()  # type: ignore[arg-type, return-value]
    with pytest.raises(ModelError, match=r"Own returns no loss for labels, a tensor of shape \(4,\)"):
        score(model, rows(NUMBERS))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, True, np.int32(3)], torch.tensor([1, 1, 3])),
        ([1, 0.5], torch.tensor([1.0, 0.5])),
        ([[1, 0], torch.tensor([0, 1])], torch.tensor([[1, 0], [0, 1]])),
        ([[torch.tensor(1.0), torch.tensor(0.0)]], torch.tensor([[1.0, 0.0]])),
        ([np.float64(0.5)], torch.tensor([0.5])),
        ([np.uint8([[1, 2]])], torch.tensor([[[1, 2]]])),
    ],
)
def test_labels_are_collated_as_numbers(labels: list[Any], expected: torch.Tensor) -> None:
    found = collated(labels, ["x"] * len(labels))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("label", ["cat", None, object(), 10**30, -(10**30), 1j, [None], np.array(["a"]), {"a": "b"}])
def test_labels_that_are_no_numbers_are_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"x.*its label must be a whole number"):
        collated([label], ["x"])
