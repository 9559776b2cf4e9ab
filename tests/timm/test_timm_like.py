"""Models with the names and forward passes of timm's: found, measured, trained, saved, loaded, and what is refused."""

from __future__ import annotations

import copy
import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.models.timm_wrapper import modeling_timm_wrapper

from plasticity_peft import (
    PlasticityConfig,
    PlasticityReport,
    find_components,
    load_adapter,
    measure_plasticity,
    register_architecture,
)
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.calls import check_calls, uncalled_projections
from plasticity_peft.components.component import KINDS
from plasticity_peft.components.layouts import LAYOUTS, TIMM_TYPES
from plasticity_peft.components.uncalled import calling
from plasticity_peft.errors import ModelError
from plasticity_peft.images.blank import blank_image
from plasticity_peft.measuring.head import fit_head
from tests.support.forking import STOCK, run_code
from tests.support.models import disturbed
from tests.support.snapshots import assert_same, snapshot
from tests.support.stock import WITHOUT_US
from tests.support.timm_like import STYLES, UNCALLED, Block, VisionTransformer, images, timm_like

IMAGES = images()
HEADS = {"deit": ("head", "head_dist"), "swin": ("head.fc",), "swinv2": ("head.fc",)}
WITHOUT_LABELS = ("parameter_plasticity", "rate_of_change", "token_sensitivity", "feature_norm", "condition_number")
ROUND_TRIPS = ("vit", "deit", "eva02", "eva02-split", "swin", "swinv2")

every_style = pytest.mark.parametrize("style", STYLES)


def report_of(model: nn.Module, **options: Any) -> PlasticityReport:
    return measure_plasticity(model, IMAGES, max_samples=6, batch_size=4, settle=None, **options)


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(IMAGES)
    return getattr(output, "logits", output)


@every_style
def test_components_are_all_layers_of_the_blocks_that_have_a_kind(style: str) -> None:
    model = timm_like(style)
    architecture = find_architecture(model)
    blocks = [path for path, module in model.named_modules() if isinstance(module, Block)]
    assert architecture.model_type == "timm"
    assert architecture.blocks == tuple(blocks)
    assert [part.kind for part in architecture.components] == list(KINDS) * len(blocks)
    assert architecture.hierarchical == STYLES[style].swin
    assert architecture.layout.post_norm == STYLES[style].post_norm
    left = {
        name.removeprefix(f"{path}.")
        for path in blocks
        for name, module in model.named_modules()
        if name.startswith(f"{path}.") and isinstance(module, (nn.Linear, nn.LayerNorm))
        and not any(name in part.modules for part in architecture.components)
    }  # fmt: skip
    assert left == (
        {"mlp.norm"} if STYLES[style].gated else {"attn.cpb_mlp.0", "attn.cpb_mlp.2"} if style == "swinv2" else set()
    )


@every_style
def test_the_head_is_the_classifier(style: str) -> None:
    model = timm_like(style)
    assert find_architecture(model).heads == HEADS.get(style, ("head",))
    if not STYLES[style].distilled:
        assert find_architecture(timm_like(style, num_classes=0)).heads == ()


@every_style
def test_a_pass_calls_all_layers_once_and_in_order_or_can_be_made_to(style: str) -> None:
    model = timm_like(style)
    architecture = find_architecture(model)
    fused = [part.modules[0] for part in architecture.components if part.kind == "MHA"]
    inputs = {"pixel_values": IMAGES}
    with torch.no_grad():
        assert check_calls(model, architecture, inputs) == (tuple(fused) if style in UNCALLED else ())


@pytest.mark.parametrize("criterion", WITHOUT_LABELS)
@pytest.mark.parametrize("style", UNCALLED)
def test_scores_are_those_of_an_attention_that_calls_its_layer(style: str, criterion: str) -> None:
    calls = timm_like(replace(STYLES[style], calls_layer=True)).double()
    does_not = timm_like(style).double()
    torch.testing.assert_close(answers(calls.float()), answers(does_not.float()), rtol=0, atol=1e-6)
    options: dict[str, Any] = {"inputs": "activation"} if criterion in ("rate_of_change", "token_sensitivity") else {}
    before = snapshot(does_not)
    expected = report_of(calls, criterion=criterion, **options)
    got = report_of(does_not, criterion=criterion, **options)
    assert [row.mean for row in got.scores] == pytest.approx([row.mean for row in expected.scores], rel=1e-5)
    assert_same(before, snapshot(does_not))


@pytest.mark.parametrize("style", UNCALLED)
def test_a_single_image_is_computed_again_with_the_same_scores(style: str) -> None:
    """The blocks are computed again during the pass backward; there, too, the attention calls its layer."""
    model = timm_like(style)
    one, four = (measure_plasticity(model, IMAGES, max_samples=6, batch_size=size, settle=None) for size in (1, 4))
    assert [row.mean for row in one.scores] == pytest.approx([row.mean for row in four.scores], rel=1e-4)


def own(model: nn.Module, path: str) -> list[nn.Parameter]:
    return list(model.get_submodule(path).parameters(recurse=False))


@pytest.mark.parametrize("style", UNCALLED)
def test_gradients_are_those_of_the_weights(style: str) -> None:
    """Parameter plasticity against autograd, which needs no layer to be called."""
    model = timm_like(style, num_classes=0).double()
    report = report_of(model, criterion="parameter_plasticity")
    weights = {row.id: [p for path in row.modules for p in own(model, path)] for row in report.scores}
    flat = [parameter for parameters in weights.values() for parameter in parameters]
    squares = [0.0] * len(flat)
    for feature in model(IMAGES.double()).flatten():
        for number, gradient in enumerate(torch.autograd.grad(feature, flat, retain_graph=True)):
            squares[number] += float(gradient.square().sum()) / len(IMAGES)
    remaining = iter(squares)
    expected = {name: sum(next(remaining) for _ in parameters) ** 0.5 for name, parameters in weights.items()}
    # The estimate draws one direction for an image: its standard error says how far off it may be.
    for row in report.scores:
        assert row.mean == pytest.approx(expected[row.id], abs=5 * row.std / 6**0.5 + 1e-9), row.id


STOCK_SCRIPT = (
    WITHOUT_US
    + """
import json, pathlib, sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from tests.support.timm_like import images, timm_like

folder, answers = pathlib.Path(sys.argv[1]), {}
for case in sys.argv[2:]:
    model = PeftModel.from_pretrained(timm_like(case.split("-as-")[0]), folder / case)
    with torch.no_grad():
        answers[case] = model.eval()(images())
save_file(answers, folder / "answers.safetensors")
"""
)


def trained(model: nn.Module) -> nn.Module:
    """Takes one step on all that trains; each part of it gets a gradient."""
    model.train()
    torch.nn.functional.cross_entropy(model(IMAGES), torch.arange(6) % 3).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            parameter.data -= parameter.grad + 0.01 * torch.sign(parameter.grad)
    return model


def test_what_was_trained_is_loaded_by_stock_peft_and_by_load_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plasticity_peft.card._png", lambda *_: b"")  # it takes longer than all else
    expected = {}
    for style in ROUND_TRIPS:
        report = report_of(timm_like(style), criterion="random")
        for training in ("lora", "full"):
            kinds = ("LN1", "FC1", "FC2") if training == "lora" and style in UNCALLED else KINDS
            config = PlasticityConfig(report=report, training=training, candidates=kinds, top_k=len(kinds), r=2)
            model = trained(get_peft_model(timm_like(style), config))
            case = f"{style}-as-{training}"
            model.save_pretrained(tmp_path / case)
            expected[case] = answers(model)
            assert not torch.allclose(expected[case], answers(timm_like(style)), atol=1e-3), case
            torch.testing.assert_close(answers(load_adapter(timm_like(style), tmp_path / case)), expected[case])
            with model.disable_adapter():
                torch.testing.assert_close(answers(model), answers(timm_like(style)))
    result = run_code(STOCK_SCRIPT, tmp_path, *expected, folder=tmp_path, parent=STOCK)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "answers.safetensors")
    assert len(found) == 2 * len(ROUND_TRIPS)
    for case, logits in expected.items():
        torch.testing.assert_close(found[case], logits)


def test_the_card_has_a_picture_and_says_what_trained(tmp_path: Path) -> None:
    config = PlasticityConfig(
        training="lora", report=report_of(timm_like("eva02"), criterion="random"), candidates=("FC1",)
    )
    get_peft_model(timm_like("eva02"), config).save_pretrained(tmp_path)
    assert (tmp_path / "plasticity.png").read_bytes().startswith(b"\x89PNG")
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "(`timm`, 2 blocks)" in card
    assert "**FC1**, in all blocks, with LoRA" in card


@pytest.mark.parametrize("training", ["lora", "full"])
@every_style
def test_what_trains_is_what_was_chosen_and_the_head(
    style: str, training: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = timm_like(style)
    report = report_of(model, criterion="random")
    model = get_peft_model(model, PlasticityConfig(report=report, training=training, candidates=("FC2",), r=2))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = HEADS.get(style, ("head",))
    assert all("mlp.fc2" in name or any(f".{head}." in name for head in heads) for name in names)
    assert all(any(f".{head}.modules_to_save" in name for name in names) for head in heads)
    assert not [str(warning.message) for warning in recwarn if "frozen" in str(warning.message)]


def refused_in(style: str) -> str:
    name, path = ("0.0.MHA", "layers.0.blocks.0") if STYLES[style].swin else ("0.MHA", "blocks.0")
    return re.escape(f"{name} was chosen, and LoRA on {path}.attn.qkv would have no effect") + '.*training="full"'


@pytest.mark.parametrize("style", UNCALLED)
def test_lora_on_a_layer_that_is_not_called_is_refused_by_name(style: str) -> None:
    model = timm_like(style)
    before = snapshot(model)
    report = report_of(model, criterion="random")
    stock = get_peft_model(timm_like(style), LoraConfig(target_modules=["qkv", "fc2"]))
    stock(IMAGES).sum().backward()
    assert {n.split(".lora_")[0].rpartition(".")[2] for n, p in stock.named_parameters() if p.grad is not None} == {
        "fc2"
    }
    given = ({"report": report}, {"target_data": IMAGES, "max_samples": 4, "settle": None})
    for source in given:
        with pytest.raises(ModelError, match=refused_in(style)):
            get_peft_model(model, PlasticityConfig(**{"training": "lora", **source}, candidates=("MHA",)))
    before["random"] = snapshot(model)["random"]
    assert_same(before, snapshot(model))
    for candidates, training in ((("FC1", "LN2"), "lora"), (("MHA",), "full")):
        config = PlasticityConfig(report=report, candidates=candidates, training=training)
        assert get_peft_model(copy.deepcopy(model), config).get_nb_trainable_parameters()[0] > 0


def test_it_is_refused_by_a_sign_where_no_pass_is_possible() -> None:
    report = report_of(timm_like("beit"), criterion="random")
    with torch.device("meta"):
        model = VisionTransformer(STYLES["beit"])
    with pytest.raises(ModelError, match=refused_in("beit")):
        get_peft_model(model, PlasticityConfig(training="lora", report=report, candidates=("MHA",)))
    unsized = timm_like("beit")
    unsized.patch_embed.img_size, unsized.pretrained_cfg = None, {}
    with pytest.raises(ModelError, match=refused_in("beit")):
        get_peft_model(unsized, PlasticityConfig(training="lora", report=report, candidates=("MHA",)))


def test_an_attention_that_calls_its_layer_in_spite_of_its_biases_takes_lora() -> None:
    """`qkv_bias_separate=True` of timm."""
    model = timm_like(replace(STYLES["beit"], calls_layer=True))
    report = report_of(model, criterion="random")
    adapted = get_peft_model(model, PlasticityConfig(training="lora", report=report, candidates=("MHA",)))
    assert any("attn.qkv.lora_A" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_a_block_that_does_not_work_in_the_order_of_its_layers_is_refused() -> None:
    model = timm_like("vit")
    for block in model.blocks:
        block.style = STYLES["vit-post-norm"]
    with pytest.raises(ModelError, match=r"out of the order LN1, MHA, LN2, FC1, FC2 of a pre-norm block"):
        report_of(model)


class TestCalling:
    def both(self) -> tuple[nn.Module, dict[str, list[str]]]:
        return timm_like("beit"), {"blocks.0.attn": ["blocks.0.attn.qkv"]}

    def test_hooks_see_the_layer_and_the_numbers_stay(self) -> None:
        model, attentions = self.both()
        seen: list[tuple[int, ...]] = []
        model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
        expected = answers(model)
        assert not seen
        with calling(model, attentions):
            torch.testing.assert_close(answers(model), expected)
        assert seen == [(6, 17, 48)]
        assert "forward" not in vars(model.blocks[0].attn)

    def test_a_bias_of_the_layer_that_the_attention_leaves_out_stays_out(self) -> None:
        model, attentions = self.both()
        expected = answers(model)
        model.blocks[0].attn.qkv.bias = nn.Parameter(torch.ones(48))
        with calling(model, attentions):
            torch.testing.assert_close(answers(model), expected)

    def test_a_failure_puts_the_forward_pass_back(self) -> None:
        model, attentions = self.both()
        own = vars(model.blocks[0].attn)["forward"] = model.blocks[0].attn.forward
        with pytest.raises(KeyError), calling(model, attentions):
            raise KeyError
        assert vars(model.blocks[0].attn)["forward"] is own

    def test_another_thread_is_left_alone(self) -> None:
        model, attentions = self.both()
        seen: list[int] = []
        model.blocks[0].attn.qkv.register_forward_hook(lambda *_: seen.append(threading.get_ident()))
        with calling(model, attentions):
            thread = threading.Thread(target=answers, args=(model,))
            thread.start()
            thread.join()
            assert not seen
            answers(model)
        assert seen == [threading.get_ident()]


def test_an_image_for_a_model_that_needs_none_has_the_size_that_it_was_made_for() -> None:
    model = timm_like("vit")
    assert measure_plasticity(model, criterion="condition_number").observed == "weights"
    architecture = find_architecture(model)
    assert blank_image(model, architecture, None)["pixel_values"].shape == (1, 3, 16, 16)
    model.patch_embed.img_size = None  # dynamic_img_size=True
    assert blank_image(model, architecture, None)["pixel_values"].shape == (1, 3, 32, 32)


def test_the_head_is_fitted_in_closed_form() -> None:
    model = timm_like("vit")
    labeled = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(images(12))]
    assert fit_head(model, labeled).outputs == 3


@pytest.fixture
def with_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of transformers that runs a model of timm, with a small model in the place of what timm makes."""

    def create_model(name: str, *, num_classes: int, pretrained: bool) -> nn.Module:
        return timm_like(name, num_classes=num_classes)

    monkeypatch.setattr(modeling_timm_wrapper, "timm", SimpleNamespace(create_model=create_model), raising=False)
    monkeypatch.setattr(modeling_timm_wrapper, "requires_backends", lambda *_: None)


def wrapped(style: str) -> TimmWrapperForImageClassification:
    config = TimmWrapperConfig(architecture=style, num_labels=3)
    return disturbed(TimmWrapperForImageClassification(config).eval(), seed=1)


@pytest.mark.usefixtures("with_timm")
@pytest.mark.parametrize("style", ["vit", "eva02", "swin"])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_wrapper_of_transformers_is_measured_by_its_loss_and_its_head_trains(style: str, training: str) -> None:
    model = wrapped(style)
    architecture = find_architecture(model)
    assert (architecture.model_type, architecture.entry) == ("timm_wrapper", "")
    assert architecture.heads == (f"timm_model.{HEADS.get(style, ('head',))[0]}",)
    labeled = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(IMAGES)]
    report = measure_plasticity(model, labeled, criterion="gradient_norm", max_samples=2, batch_size=3)
    adapted = get_peft_model(model, PlasticityConfig(report=report, training=training, candidates=("FC1", "FC2")))
    before = adapted(IMAGES, labels=torch.arange(6) % 3).loss
    before.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(architecture.heads[0] in name for name in gradients)


@pytest.mark.parametrize("kind", TIMM_TYPES)
def test_all_ways_to_a_model_of_timm_know_the_same_names(kind: str) -> None:
    assert LAYOUTS[kind] == LAYOUTS["timm"]


class OwnConfig(PretrainedConfig):
    model_type = "own_model"


class OwnModel(PreTrainedModel):
    """A model of the user's, in the style of transformers, around one of timm and with a head of its own."""

    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: OwnConfig, style: str = "vit") -> None:
        super().__init__(config)
        self.tower = timm_like(style, num_classes=0)
        self.classify = nn.Linear(16, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.classify(self.tower(pixel_values))


def test_a_model_of_timm_in_a_model_of_the_users_is_found() -> None:
    architecture = find_architecture(OwnModel(OwnConfig()))
    assert (architecture.model_type, architecture.backbone) == ("timm", "tower")
    assert (architecture.entry, architecture.heads) == ("", ("classify",))


def test_names_that_are_registered_under_the_users_own_type_apply_too() -> None:
    model = OwnModel(OwnConfig())
    for block in model.tower.blocks:
        block.first = block.norm1
        del block.norm1
    with pytest.raises(ModelError, match=r"register_architecture\(model_type"):
        find_components(model)
    register_architecture("own_model", replace(LAYOUTS["timm"][0], LN1="first"))
    architecture = find_architecture(model)
    assert (architecture.model_type, architecture.components[0].path) == ("own_model", "tower.blocks.0.first")


def test_the_message_about_unknown_blocks_names_the_type_to_register() -> None:
    model = timm_like("vit")
    for block in model.blocks:
        block.first = block.norm1
        del block.norm1
    with pytest.raises(ModelError, match=r"VisionTransformer \(model_type 'timm'\) has no vision transformer"):
        find_components(model)
    register_architecture("timm", replace(LAYOUTS["timm"][0], LN1="first"))
    assert len(find_components(model)) == 10


def test_uncalled_projections_of_another_model_are_none() -> None:
    model = timm_like("vit")
    assert uncalled_projections(model, find_architecture(model), {"pixel_values": IMAGES}) == ()
