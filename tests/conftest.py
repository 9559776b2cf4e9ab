"""What the tests share: small models of every supported architecture, images for them, the authors' numbers."""

from __future__ import annotations

import os

# Before any library looks: no test may reach for the network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from tests.support.deprecations import IN_OTHER_PROCESSES, no_deprecation_is_logged  # noqa: F401

os.environ["PYTHONWARNINGS"] = IN_OTHER_PROCESSES

from pathlib import Path

import pytest
import torch
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

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "vit-tiny"
REPOSITORY = Path(__file__).parents[1]
ARCHITECTURES = {
    "vit": (ViTConfig, ViTForImageClassification),
    "deit": (DeiTConfig, DeiTForImageClassification),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification),
}


def tiny_model(architecture: str = "vit", *, num_labels: int = 3, num_hidden_layers: int = 2) -> PreTrainedModel:
    """Returns a small model with fixed random weights, in which no two components are alike."""
    config_class, model_class = ARCHITECTURES[architecture]
    sizes = {"mlp_ratio": 2} if architecture == "dinov2" else {"intermediate_size": 32}
    config = config_class(
        hidden_size=16,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=num_labels,
        **sizes,
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def backbone() -> ViTModel:
    """Returns a small model without a head."""
    torch.manual_seed(0)
    return ViTModel(tiny_model().config, add_pooling_layer=False).eval()


def random_images(count: int = 12, *, seed: int = 1, size: int = 8) -> torch.Tensor:
    """Returns images for the small models: float32 of shape (count, 3, size, size)."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images() -> torch.Tensor:
    return random_images()


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A small model of each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture
def vit() -> PreTrainedModel:
    return tiny_model("vit")
