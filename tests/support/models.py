"""Small models of three architectures, images for them, and what tests do with any model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "vit-tiny"
"""A model, pairs of images, and the rates that the paper's authors compute for them."""
ARCHITECTURES = {
    "vit": (ViTConfig, ViTForImageClassification),
    "deit": (DeiTConfig, DeiTForImageClassification),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification),
}

Model = TypeVar("Model", bound=nn.Module)


def tiny_model(
    architecture: str = "vit", *, num_labels: int = 3, num_hidden_layers: int = 2, **options: float
) -> PreTrainedModel:
    """Returns a small model with fixed random weights, in which no two components are alike."""
    named = {"num_labels": num_labels, "num_hidden_layers": num_hidden_layers, **options}
    usual = torch.get_default_device().type, torch.get_default_dtype(), torch.is_inference_mode_enabled()
    if usual != ("cpu", torch.float32, False):
        return _new_model(architecture, **named)
    key = (architecture, repr(named))
    if key not in _BUILT:
        _BUILT[key] = _new_model(architecture, **named), torch.get_rng_state()
    model, random_state = _BUILT[key]
    torch.set_rng_state(random_state)  # as after making one
    return copy.deepcopy(model)


_BUILT: dict[tuple[str, str], tuple[PreTrainedModel, torch.Tensor]] = {}
"""One of each small model that was asked for, to be copied: a copy takes half the time of a new one."""


def _new_model(architecture: str, *, num_labels: int, num_hidden_layers: int, **options: float) -> PreTrainedModel:
    config_class, model_class = ARCHITECTURES[architecture]
    sizes = {"mlp_ratio": 2} if architecture == "dinov2" else {"intermediate_size": 32}
    config = config_class(
        hidden_size=16,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=num_labels,
        **{**sizes, **options},
    )
    torch.manual_seed(0)
    return disturbed(model_class(config).eval())


def backbone() -> ViTModel:
    """Returns a small model without a head."""
    torch.manual_seed(0)
    return ViTModel(tiny_model().config, add_pooling_layer=False).eval()


def saved_base(folder: Path, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """Returns a model, a small ViT by default, read back from `folder`: its adapters know where their base is."""
    model = tiny_model() if model is None else model
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def random_images(count: int = 12, *, seed: int = 1, size: int = 8) -> torch.Tensor:
    """Returns images for the small models: float32 of shape (count, 3, size, size)."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def disturbed(model: Model, *, seed: int | None = None) -> Model:
    """Moves all weights, so that nothing starts at zero or one: biases, gains, tables of position biases."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def moved(model: Model, *, seed: int = 0, scale: float = 0.2) -> Model:
    """Moves all that trains, as training would, so that an adapter that is on can be told from one that is off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))
    return model


def logits(model: nn.Module, images: torch.Tensor | Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Returns what a model answers in evaluation mode; for `random_images()` by default."""
    images = random_images() if images is None else images
    inputs = {"pixel_values": images} if isinstance(images, torch.Tensor) else images
    with torch.no_grad():
        return model.eval()(**inputs).logits
