"""The models of timm itself, alone and in the classes of transformers that run them.

timm needs torchvision, which needs a torch build of its own: `nox -s "tests(timm-3.12)"` has both. Elsewhere these
tests are skipped, and `test_timm_like.py` holds the same laws on small models with timm's names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    pipeline,
)

from plasticity_peft import PlasticityConfig, PlasticityReport, load_adapter, load_pretrained, measure_plasticity
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.components.layouts import TIMM_TYPES
from plasticity_peft.errors import ModelError
from tests.support.models import REPOSITORY, disturbed
from tests.support.processes import python

timm = pytest.importorskip("timm", reason="timm is not installed; nox -s 'tests(timm-3.12)' has it")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "beitv2_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "eva02_base_patch14_224": VIT,
    "eva02_enormous_patch14_clip_224": VIT,
    "vit_small_patch14_dinov2": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "vit_giant_patch14_dinov2": {**VIT, "mlp_ratio": 4},
    "vit_small_patch16_dinov3": VIT,
    "vit_small_plus_patch16_dinov3": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_base_patch16_siglip_gap_224": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "vit_relpos_base_patch32_plus_rpn_256": VIT,
    "vit_base_patch16_rpn_224": VIT,
    "samvit_base_patch16": {**VIT, "global_attn_indexes": [1], "window_size": 2},
    "naflexvit_base_patch16_gap": {key: value for key, value in VIT.items() if key != "img_size"},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "swinv2_cr_tiny_224": SWIN,
    "hiera_tiny_224": {"img_size": [32, 32], "embed_dim": 8, "stages": [1, 1, 1], "q_pool": 2, "num_heads": 1,
                       "mask_unit_size": [4, 4]},
}  # fmt: skip
NEVER_CALLED = (
    "beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224", "eva02_enormous_patch14_clip_224",
    "swinv2_tiny_window8_256",
)  # fmt: skip
"""Models whose attention uses the weight of its fused layer without calling it."""
POST_NORM = (
    "eva02_enormous_patch14_clip_224", "vit_relpos_base_patch32_plus_rpn_256", "vit_base_patch16_rpn_224",
    "swinv2_tiny_window8_256", "swinv2_cr_tiny_224",
)  # fmt: skip
WRAPPED = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
)
IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))

every_model = pytest.mark.parametrize("name", MODELS)
both_modes = pytest.mark.parametrize("training", ["lora", "full"])


def bare(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(name, pretrained=False, **{"num_classes": 3, **MODELS[name], **options})
    return disturbed(made.eval(), seed=1)


def wrapped(name: str, kind: type = TimmWrapperForImageClassification) -> nn.Module:
    torch.manual_seed(0)
    if kind is TimmBackbone:
        model = TimmBackbone(TimmBackboneConfig(backbone=name, out_indices=[0, 1]), **MODELS[name])
    else:
        model = kind(TimmWrapperConfig(architecture=name, model_args=MODELS[name], num_labels=3))
    return disturbed(model.eval(), seed=1)


def report_of(model: nn.Module, **options: Any) -> PlasticityReport:
    return measure_plasticity(model, IMAGES, max_samples=4, batch_size=2, settle=None, **options)


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(IMAGES)
    return getattr(output, "logits", output)


@every_model
def test_components_and_the_classifier_are_found_and_measured(name: str) -> None:
    model = bare(name)
    architecture = find_architecture(model)
    classifier = model.get_classifier()
    expected = list(classifier) if isinstance(classifier, tuple) else [classifier]
    assert [model.get_submodule(head) for head in architecture.heads] == expected
    assert (architecture.model_type, architecture.layout.post_norm) == ("timm", name in POST_NORM)
    blocks = [path for path, module in model.named_modules() if hasattr(module, "attn") and hasattr(module, "norm2")]
    assert architecture.blocks == tuple(blocks)
    assert len(architecture.components) == 5 * len(blocks)
    assert all(row.mean > 0 for row in report_of(model).scores)
    assert all(row.mean > 0 for row in report_of(model, inputs="activation").scores)


def step(model: nn.Module) -> None:
    output = model.train()(IMAGES)
    output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    torch.nn.functional.cross_entropy(output, torch.arange(6) % 3).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            parameter.data -= parameter.grad + 0.01 * torch.sign(parameter.grad)


@both_modes
@pytest.mark.parametrize("make", [bare, wrapped], ids=["bare", "wrapped"])
@every_model
def test_what_was_trained_is_loaded_by_stock_peft_and_by_load_adapter(
    name: str, make: Callable[[str], nn.Module], training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if make is wrapped and name not in WRAPPED:
        pytest.skip("the wrapper is the same for all")
    monkeypatch.setattr("plasticity_peft.card._png", lambda *_: b"")  # it takes longer than all else
    refused = training == "lora" and name in NEVER_CALLED
    report = report_of(make(name), criterion="random")
    if refused:
        with pytest.raises(ModelError, match=r"0\.MHA was chosen, and LoRA on \S+\.attn\.qkv would have no effect"):
            get_peft_model(make(name), PlasticityConfig(training="lora", report=report, candidates=("MHA",)))
    kinds = ("LN1", "FC1", "FC2") if refused else KINDS
    config = PlasticityConfig(report=report, training=training, candidates=kinds, top_k=len(kinds), r=2)
    model = get_peft_model(make(name), config)
    step(model)
    model.save_pretrained(tmp_path)
    expected = answers(model)
    assert not torch.allclose(expected, answers(make(name)), atol=1e-4)
    torch.testing.assert_close(answers(load_adapter(make(name), tmp_path)), expected)
    # Stock PEFT, in this process: tests/timm/test_timm_like.py shows the same in one without this package.
    torch.testing.assert_close(answers(PeftModel.from_pretrained(make(name), tmp_path)), expected)


@both_modes
@pytest.mark.parametrize("kind", [TimmWrapperForImageClassification, TimmWrapperModel, TimmBackbone])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_classes_of_transformers_are_adapted(name: str, kind: type, training: str) -> None:
    model = wrapped(name, kind)
    architecture = find_architecture(model)
    assert architecture.model_type in TIMM_TYPES[1:]
    heads = 1 if kind is TimmWrapperForImageClassification else 0
    assert len(architecture.heads) == heads
    assert len(architecture.components) == (20 if "swin" in name else 10)
    config = PlasticityConfig(
        target_data=IMAGES, max_samples=4, settle=None, training=training, candidates=("FC1", "FC2", "LN2")
    )
    adapted = get_peft_model(model, config)
    trains = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("head" in name for name in trains) == bool(heads)
    assert any(part in name for name in trains for part in ("mlp.fc", "norm2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as those of timm on the Hub, with names of weights and a config that are timm's."""
    place = tmp_path_factory.mktemp("base") / "vit"
    name = "vit_tiny_patch16_224"
    model = bare(name, num_classes=5)
    cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0}
    timm.models.save_for_hf(model, place, model_config={"pretrained_cfg": cfg}, safe_serialization=True)
    config = json.loads((place / "config.json").read_text())
    config["model_args"] = MODELS[name]
    (place / "config.json").write_text(json.dumps(config))
    assert "head.weight" in load_file(place / "model.safetensors")
    return place


@both_modes
def test_a_folder_of_timm_is_loaded_with_its_image_processor_and_labels(
    folder: Path, training: str, tmp_path: Path
) -> None:
    base = AutoModelForImageClassification.from_pretrained(
        folder,
        num_labels=2,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
        ignore_mismatched_sizes=True,
    )
    config = PlasticityConfig(target_data=IMAGES, max_samples=4, settle=None, training=training)
    get_peft_model(base, config).save_pretrained(tmp_path)
    assert (tmp_path / "plasticity.png").read_bytes().startswith(b"\x89PNG")
    assert "(`timm_wrapper`, 2 blocks)" in (tmp_path / "README.md").read_text()
    loaded = load_pretrained(tmp_path)
    assert loaded.id2label == {0: "cat", 1: "dog"}
    classify = pipeline("image-classification", model=loaded.model, image_processor=loaded.image_processor)
    assert {answer["label"] for answer in classify(Image.new("RGB", (40, 50)))} == {"cat", "dog"}


@both_modes
def test_the_example_trains_a_folder_of_timm(folder: Path, training: str, tmp_path: Path) -> None:
    options = {
        "model_name_or_path": folder, "output_dir": tmp_path, "training": training,
        "compare": "true", "compare_seeds": 1,
        "max_steps": 2, "max_samples": 8, "max_train_samples": 32, "use_cpu": "true",
    }  # fmt: skip
    command = ["train.py", *(word for name, value in options.items() for word in (f"--{name}", value))]
    result = python(*command, cwd=REPOSITORY / "examples")
    assert result.returncode == 0, result.stderr
    assert "| fitted head alone |" in result.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"README.md", "plasticity.json", "plasticity.png", "adapter_model.safetensors"} <= names
    assert any(".head." in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_the_command_line_measures_a_folder_of_timm_and_selects(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = ["-m", "plasticity_peft", "measure", folder, "--criterion", "condition_number", "--output", report]
    result = python(*command)
    assert result.returncode == 0, result.stderr
    result = python("-m", "plasticity_peft", "select", report, "--model", folder, "--candidates", "FC1")
    assert result.returncode == 0, result.stderr
    assert "timm_model.blocks.0.mlp.fc1" in result.stdout
    assert "timm_model.head" in result.stdout
