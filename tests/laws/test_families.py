"""Every architecture: the right modules, called with the right arguments, measured right, and trained alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from plasticity_peft import BlockLayout, PlasticityConfig, find_components, measure_plasticity, register_architecture
from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.calls import Call, attention_call
from plasticity_peft.components.component import KINDS
from plasticity_peft.components.layouts import LAYOUTS, TIMM_TYPES
from plasticity_peft.criteria.gradients import GradientsByImage, differentiable, squared_norms
from plasticity_peft.criteria.parameter_plasticity import features
from plasticity_peft.criteria.registry import CRITERIA
from plasticity_peft.errors import ModelError, PlasticityError
from plasticity_peft.measuring.left_as_found import LeftAsFound
from tests.support import oracles
from tests.support.crossing import crossed
from tests.support.families import (
    FAMILIES,
    FIVE,
    KINDS_OF_FAMILY,
    LABELS,
    PLAIN,
    REPRESENTATIVES,
    each_kind_of_family,
    every_family,
    family,
    items,
)
from tests.support.measures import MEASURES, PROTOCOLS, rates
from tests.support.models import disturbed
from tests.support.oracles import layers, tensor, watching

HEADS = {
    "deit-teacher": ("cls_classifier", "distillation_classifier"),
    "vit_mae-pretraining": ("decoder",),
    "mgp-str": ("char_a3_module", "bpe_a3_module", "wp_a3_module", "char_head", "bpe_head", "wp_head"),
    "videomae": ("fc_norm", "classifier"),
    "vjepa2": ("pooler", "classifier"),
    "yolos": ("class_labels_classifier", "bbox_predictor"),
    "cvt": ("layernorm", "classifier"),
}
"""Heads that are not one `classifier`."""

LEFT = {"vit_mae-pretraining": r"^decoder\.decoder_pos_embed: frozen before, but trainable now"}
"""What of a head trains though it was frozen: transformers freezes the positions in the decoder."""


def arguments(architecture: Architecture, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the arguments of a forward pass; a model that hides patches at random hides the same ones."""
    if architecture.model_type != "vit_mae":
        return images
    noise = torch.rand(4, generator=torch.Generator().manual_seed(0))
    return {**images, "noise": noise.expand(len(images["pixel_values"]), -1)}


def test_every_layout_has_a_family() -> None:
    known = {find_architecture(f.build()).model_type for f in FAMILIES.values() if f.available}
    newer = (
        set()
        if FIVE
        else {
            "pixio",
            "qianfan_ocr_vision",
            "radio",
            "tipsv2_vision_model",
            "sapiens2",
            "sam3_vit_model",
        }
    )
    # Kosmos-2 has no class for its vision part alone, and tests/timm has the models of timm.
    assert known | newer | {"kosmos_2_vision_model", *TIMM_TYPES} == set(LAYOUTS) | newer


def test_each_kind_of_block_has_a_representative() -> None:
    """A family outside of `REPRESENTATIVES` is tried in the slow tests alone."""
    kinds: dict[tuple[Any, ...], set[str]] = {}
    for name, found in FAMILIES.items():
        if found.available:
            layout = find_architecture(found.build()).layout
            kind = (
                len(layout.projections), len(layout.weights("FC1")), layout.post_norm, layout.random_masking,
                layout.blocks.count("*"),
            )  # fmt: skip
            kinds.setdefault(kind, set()).add(name)
    assert set(REPRESENTATIVES) <= set(FAMILIES)
    assert not [names for names in kinds.values() if not names & set(REPRESENTATIVES)]


@every_family
def test_the_head_is_found(name: str) -> None:
    found = family(name)
    expected = HEADS.get(name, ("classifier",) if "Classification" in found.model else ())
    assert find_architecture(found.build()).heads == expected


@each_kind_of_family
def test_a_component_called_again_gives_what_it_gave(name: str) -> None:
    """Also where position biases, masks or rotary embeddings arrive as arguments."""
    found = family(name)
    model = found.build()
    architecture = find_architecture(model)
    paths = [path for part in architecture.components for path in layers(part)]
    with torch.no_grad():
        with watching(model, (*paths, *architecture.blocks)) as seen:
            model(**arguments(architecture, found.images()))
        for path in paths:
            call = seen[path]
            torch.testing.assert_close(
                tensor(model.get_submodule(path)(*call.args, **call.kwargs)), tensor(call.output)
            )
        for index, block in enumerate(architecture.blocks if found.embedding else ()):
            call = attention_call(model, architecture, index, Call(seen[block].args, seen[block].kwargs))
            path = f"{block}.{architecture.layout.MHA}"
            output = model.get_submodule(path)(*call.args, **call.kwargs)
            torch.testing.assert_close(tensor(output), tensor(seen[path].output))


@crossed(name=KINDS_OF_FAMILY, inputs=PROTOCOLS)
def test_rates_of_change_are_those_of_the_definition(name: str, inputs: str) -> None:
    found = family(name)
    model = found.build().double()
    if inputs == "embedding" and not found.embedding:
        with pytest.raises(ModelError, match=r'inputs="embedding" feeds .* Use inputs="activation"'):
            measure_plasticity(model, items(found.images()), inputs=inputs, max_samples=2)
        return
    architecture = find_architecture(model)
    images = {key: v.double() if v.is_floating_point() else v for key, v in found.images(4).items()}
    x, y = ({key: values[half] for key, values in images.items()} for half in (slice(0, 2), slice(2, 4)))
    expected = oracles.rates(model, inputs, arguments(architecture, x), arguments(architecture, y))
    np.testing.assert_allclose(rates(model, inputs, x, y), expected, rtol=1e-7)


@crossed(name=KINDS_OF_FAMILY, training=["lora", "full"])
def test_training_changes_the_chosen_components_and_the_head_alone(name: str, training: str) -> None:
    kinds = {"lora": ("MHA", "FC1", "LN2"), "full": ("MHA", "FC2", "LN1")}[training]
    found = family(name)
    model = found.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    architecture = find_architecture(model)
    report = measure_plasticity(model, items(found.images(2)), criterion="random")
    config = PlasticityConfig(report=report, candidates=kinds, top_k=3, training=training, r=2, lora_dropout=0.0)
    with pytest.warns(UserWarning, match=LEFT[name]) if name in LEFT else nullcontext():
        adapted = get_peft_model(model, config).eval()
    disturbed(nn.ModuleList([m for n, m in adapted.named_modules() if n.endswith(("lora_A", "lora_B"))]), seed=1)
    images = found.images()
    sum(moving(adapted(**arguments(architecture, images)))).backward()
    trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    # A bias of the keys moves all attention scores of a token alike, and has no gradient.
    unmoved = {key for key, p in trained.items() if p.grad is None or not p.grad.any()}
    assert not {key for key in unmoved if not key.endswith("bias")}, name
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    after = adapted.merge_and_unload().state_dict()

    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    chosen = [path for part in architecture.components if part.kind in kinds for path in part.modules]
    owners = {key.rpartition(".")[0] for key in changed}
    assert {owner for owner in owners if not owner.startswith(architecture.heads or ("no head",))} == set(chosen)
    assert all(any(owner.startswith(head) for owner in owners) for head in architecture.heads)


def moving(output: Any) -> Iterator[torch.Tensor]:
    """Yields a number for each tensor of an output that depends on what trains."""
    for value in output.values() if hasattr(output, "values") else output:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                yield (value * torch.randn(value.shape, generator=torch.Generator().manual_seed(5))).sum()
        elif isinstance(value, (tuple, list)) or hasattr(value, "values"):
            yield from moving(value)


@each_kind_of_family
def test_eager_and_sdpa_attention_give_the_same_report(name: str) -> None:
    found = family(name)
    model = found.build()
    if not getattr(model, "_supports_sdpa", False):
        pytest.skip(f"{found.model} has one kind of attention")
    reports = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for options in (MEASURES["activation"], MEASURES["parameter_plasticity"]):
            reports.append(measure_plasticity(model, items(found.images()), max_samples=4, **options))
    for eager, sdpa in zip(reports[:2], reports[2:], strict=True):
        assert [row.mean for row in sdpa.scores] == pytest.approx([row.mean for row in eager.scores], rel=1e-4)


UNDEFINED = {
    "bound": r"uses the tokens that enter the first block .* Use another criterion",
    "token_sensitivity": "not tokens of 16 features",
    "gradient_norm": "has no head|returns no loss for|not for one whole number|Labels must be|The loss of .* refuses",
}


@each_kind_of_family
@pytest.mark.parametrize("criterion", UNDEFINED)
def test_a_criterion_scores_every_component_or_says_why_not(name: str, criterion: str) -> None:
    check_scored(name, criterion)


@crossed(name=KINDS_OF_FAMILY, criterion=["condition_number", "feature_norm", "parameter_plasticity"])
def test_a_criterion_that_is_always_defined_scores_every_component(name: str, criterion: str) -> None:
    check_scored(name, criterion)


def check_scored(name: str, criterion: str) -> None:
    """Fails unless all scores are above 0, or the error says why there are none."""
    found = family(name)
    model = found.build()
    images = [{**item, "labels": number % 3} for number, item in enumerate(items(found.images()))]
    inputs = "activation" if CRITERIA[criterion].protocols else None
    try:
        report = measure_plasticity(model, images, criterion=criterion, inputs=inputs, max_samples=4, batch_size=2)
    except PlasticityError as error:
        assert re.search(UNDEFINED.get(criterion, "nothing"), str(error)), error  # noqa: PT017 - most families raise nothing
        assert criterion != "bound" or not found.embedding
        assert criterion != "gradient_norm" or found.others != LABELS
        return
    assert all(row.mean > 0 for row in report.scores)


@each_kind_of_family
def test_gradients_by_image_are_those_of_each_image(name: str) -> None:
    found = family(name)
    model = found.build().double()
    architecture = find_architecture(model)
    images = {key: value.double() if value.is_floating_point() else value for key, value in found.images(3).items()}
    single = [{key: value[number : number + 1] for key, value in images.items()} for number in range(3)]
    expected = []
    with LeftAsFound(model, 0):
        size = features(model, architecture, single[0]).shape[1]
        directions = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for number, direction in enumerate(directions):
            with differentiable(model, architecture) as parameters:
                moved = (features(model, architecture, images)[number] * direction).sum()
                expected.append(squared_norms(moved, parameters))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        squares = GradientsByImage(model, architecture, single[0])(
            3, lambda: (features(model, architecture, images) * directions).sum()
        )
        assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(squares, torch.stack(expected), rtol=1e-6, atol=1e-12)
    one, three = (measure_plasticity(model, items(images), batch_size=size) for size in (1, 3))
    assert [row.mean for row in one.scores] == pytest.approx([row.mean for row in three.scores], rel=1e-6)


def test_attention_that_does_not_call_its_projections_takes_no_lora() -> None:
    if FIVE:
        pytest.skip("transformers 5 calls the projections of VideoMAE")
    found = FAMILIES["videomae"]
    report = measure_plasticity(found.build(), items(found.images()), max_samples=4)
    with pytest.raises(ModelError, match=r"0\.MHA was chosen, and LoRA on \S+query would have no effect"):
        get_peft_model(found.build(), PlasticityConfig(training="lora", report=report, candidates=("MHA",)))
    model = get_peft_model(found.build(), PlasticityConfig(report=report, candidates=("MHA",), training="full"))
    model(**found.images(), labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def llava() -> PreTrainedModel:
    """Returns a small vision-language model."""
    text = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(**PLAIN)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=31, vision_feature_layer=-1
    )
    return disturbed(transformers.LlavaForConditionalGeneration(config).eval(), seed=1)


def dual() -> PreTrainedModel:
    """Returns a small model with a tower for text beside the one for images; their layers have the same names."""
    text = {**PLAIN, "vocab_size": 32, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=PLAIN, projection_dim=8)
    torch.manual_seed(0)
    return disturbed(transformers.CLIPModel(config).eval(), seed=1)


@pytest.mark.parametrize(
    ("build", "tower"), [(llava, "model.vision_tower"), (dual, "vision_model")], ids=["llava", "clip"]
)
@pytest.mark.parametrize("named", [False, True])
def test_the_vision_tower_of_a_bigger_model(build: Callable[[], PreTrainedModel], tower: str, named: bool) -> None:
    model = build()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    backbone = tower if named else None
    architecture = find_architecture(model, backbone)
    assert architecture.blocks[0].startswith(f"{tower}.")
    assert (architecture.entry, architecture.heads) == (tower, ())
    report = measure_plasticity(model, images, inputs="activation", max_samples=4, backbone=backbone)
    alone = measure_plasticity(model.get_submodule(tower), images, inputs="activation", max_samples=4)
    assert [(row.id, row.mean) for row in report.scores] == [(row.id, row.mean) for row in alone.scores]
    config = PlasticityConfig(target_data=images, max_samples=4, backbone=backbone, training="full")
    adapted = get_peft_model(model, config)
    trained = {key for key, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(key.startswith(f"base_model.model.{tower}.") for key in trained)


def test_of_several_vision_towers_one_must_be_named() -> None:
    model = nn.ModuleDict({"left": FAMILIES["vit"].build(), "right": FAMILIES["clip-vision"].build()})
    with pytest.raises(ModelError, match=r"2 vision transformers. Choose one with backbone=, one of .left., .right."):
        find_components(model)
    assert find_components(model, "right")[0].path.startswith("right.")
    with pytest.raises(ModelError, match=r"has no module 'middle' .* found in it: left, right"):
        find_components(model, "middle")


def test_a_module_whose_path_ends_like_a_chosen_one_is_not_trained_along() -> None:
    model = FAMILIES["clip-vision"].build()
    name = find_components(model)[3].modules[0]
    model.extra = inner = nn.Module()
    for part in name.split(".")[:-1]:
        inner.add_module(part, nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module(name.split(".")[-1], nn.Linear(2, 2))
    report = measure_plasticity(model, criterion="bound")
    with pytest.raises(ModelError, match=rf"extra.{name} would train together with {name}"):
        get_peft_model(model, PlasticityConfig(training="lora", report=report, candidates=("FC1",)))


class Config:
    """The config of a model of one's own."""

    model_type = "home_made"
    num_attention_heads = 2
    image_size = 16


class Block(nn.Module):
    """A pre-norm block with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16)})
        self.attention.forward = self.attend  # type: ignore[method-assign]
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attention["qkv"](x).chunk(3, dim=-1)
        return self.attention["out"](nn.functional.scaled_dot_product_attention(q, k, v))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class MyViT(nn.Module):
    """A vision transformer that plasticity_peft does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.trunk = nn.ModuleList([Block(), Block()])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.embed(pixel_values).flatten(2).mT
        for block in self.trunk:
            x = block(x)
        return x


def test_an_unknown_model_is_refused_with_what_was_found_and_can_be_described() -> None:
    model = MyViT()
    with pytest.raises(ModelError) as refused:
        find_components(model)
    for text in (
        "MyViT (model_type 'home_made')",
        "trunk.*: first, second, attention.qkv",
        "register_architecture",
        "vit_mae",
    ):
        assert text in str(refused.value)
    layout = BlockLayout(
        blocks="trunk.*", LN1="first", MHA="attention", projections=("attention.qkv", "attention.out"), LN2="second",
        FC1="up", FC2="down",
    )  # fmt: skip
    register_architecture("home_made", layout)
    assert [part.id for part in find_components(model)[:5]] == [f"0.{kind}" for kind in KINDS]
    images = torch.rand(6, 3, 16, 16)
    for options in MEASURES.values():
        assert len(measure_plasticity(model, images, max_samples=4, **options).scores) == 10
    model.trunk[1].down = nn.Linear(24, 16)
    with pytest.raises(ModelError, match=r"trunk.1: its layers do not fit .*'outputs of FC1': .32.}; FC2 takes 24"):
        find_components(model)


@pytest.mark.parametrize(
    ("model_type", "changes", "text"),
    [
        ("", {}, "model_type must be a name"),
        ("new", {"blocks": "layers"}, "blocks must be the end of the path of a block, with . for its index"),
        ("new", {"projections": ("q", "k", "v")}, "projections must be .query, key, value, output., or"),
        ("new", {"LN2": "first"}, "one component only. Named more than once: first"),
    ],
)
def test_a_wrong_description_is_refused(model_type: str, changes: dict[str, Any], text: str) -> None:
    names: dict[str, Any] = {
        "blocks": "layers.*", "LN1": "first", "MHA": "a", "projections": ("a.qkv", "a.o"), "LN2": "n", "FC1": "u",
        "FC2": "d",
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        register_architecture(model_type, BlockLayout(**{**names, **changes}))
