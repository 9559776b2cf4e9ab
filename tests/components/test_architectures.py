"""Names and structure: what is found, and what is refused because they disagree."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DeiTForImageClassificationWithTeacher,
    Dinov2Model,
    PreTrainedModel,
    ViTForImageClassification,
)

from plasticity_peft import PlasticityConfig, find_components
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ModelError
from tests.support.models import ARCHITECTURES, backbone, tiny_model


def test_components_are_all_linear_layers_and_norms_of_the_blocks(model: PreTrainedModel) -> None:
    architecture = find_architecture(model)
    components = architecture.components
    assert [part.id for part in components] == [f"{block}.{kind}" for block in range(2) for kind in KINDS]
    paths = [path for part in components for path in part.modules]
    inside = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm))
        and name.startswith(tuple(f"{b}." for b in architecture.blocks))
    }
    assert sorted(paths) == sorted(inside)
    for part in components:
        modules = [model.get_submodule(path) for path in part.modules]
        assert part.parameters == sum(p.numel() for module in modules for p in module.parameters())
        assert part.features == tuple((m.in_features, m.out_features) for m in modules if isinstance(m, nn.Linear))
        assert len(part.modules) == (4 if part.kind == "MHA" else 1)
    assert architecture.parameters == model.num_parameters()
    assert architecture.hidden_size == 16


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (tiny_model, ("classifier",)),
        (lambda: tiny_model(num_labels=0), ()),
        (backbone, ()),
        (
            lambda: DeiTForImageClassificationWithTeacher(tiny_model("deit").config),
            ("cls_classifier", "distillation_classifier"),
        ),
        (lambda: Dinov2Model(tiny_model("dinov2").config), ()),
    ],
)
def test_the_head_is_found(build: Callable[[], PreTrainedModel], heads: tuple[str, ...]) -> None:
    assert find_architecture(build()).heads == heads


@pytest.mark.parametrize("full", [False, True])
def test_adapters_do_not_hide_components(model: PreTrainedModel, full: bool) -> None:
    expected = find_architecture(model)
    paths = [path for part in expected.components for path in part.modules if part.features]
    config = (
        LoraConfig(target_modules=paths[:1], modules_to_save=paths[1:]) if full else LoraConfig(target_modules=paths)
    )
    adapted = get_peft_model(copy.deepcopy(model), config)
    assert find_architecture(adapted.get_base_model()) == expected
    assert find_components(adapted) == expected.components


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_at_the_size_of_real_models(name: str) -> None:
    config_class, model_class = ARCHITECTURES[name]
    with torch.device("meta"):
        model = model_class(config_class())
    components = find_components(model)
    assert len(components) == 60
    assert {part.kind: part.parameters for part in components[:5]} == {
        "LN1": 1536, "MHA": 4 * (768 * 768 + 768), "LN2": 1536, "FC1": 768 * 3072 + 3072, "FC2": 768 * 3072 + 768,
    }  # fmt: skip


def changed(change: Callable[[nn.Module], None]) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        model = tiny_model()
        change(model.get_submodule(find_architecture(model).blocks[1]))
        return model

    return build


def widen(block: nn.Module) -> None:
    block.layernorm_after = nn.LayerNorm(24)


def rename(block: nn.Module) -> None:
    block.norm = block.layernorm_before
    del block.layernorm_before


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (changed(lambda block: block.add_module("gate", nn.Linear(16, 16))), r"account for .* would be ignored"),
        (changed(widen), "do not fit together .* takes 16 features and returns 16: {'LN2': 24}"),
        (changed(rename), r"the blocks vit\S+0 and vit\S+1 have different layers: .*; (norm|.*, norm)"),
        (lambda: nn.Linear(2, 2), r"Linear \(model_type None\) has no vision transformer .* that it has: none with"),
    ],
)
def test_a_disagreement_is_refused_with_what_was_found(build: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        find_components(build())


def test_two_stacks_of_blocks_are_refused() -> None:
    model = ViTForImageClassification(tiny_model().config)
    model.other = copy.deepcopy(model.vit)
    with pytest.raises(
        ModelError, match=r"contains 2 vision transformers. Choose one with backbone=, one of 'vit', 'other'"
    ):
        find_components(model)


class Wrapped(nn.Module):
    """A model of the user's around a whole one of transformers, with a layer of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_model()
        self.scale = nn.Linear(3, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.scale(self.net(pixel_values=pixel_values).logits)


class OwnHead(nn.Module):
    """A backbone with a head of the user's, whose images have a name of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixel_values=x).last_hidden_state[:, 0])


def test_the_head_of_a_wrapped_model_is_found_too() -> None:
    assert find_architecture(Wrapped()).heads == ("scale", "net.classifier")
    model = get_peft_model(Wrapped(), PlasticityConfig(training="lora", criterion="bound", r=2))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in trained if "lora" not in name} == {"scale", "net"}
    assert any("net.classifier" in name for name in trained)


def test_the_head_of_a_model_whose_images_have_another_name_is_found_too() -> None:
    model = get_peft_model(OwnHead(), PlasticityConfig(training="lora", criterion="bound", r=2))
    assert model.peft_config["default"].modules_to_save[-1] == "head"
    assert any("head" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
