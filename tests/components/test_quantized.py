"""Quantised models: measured like the float model, trained with LoRA, refused in full mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, ViTConfig, ViTForImageClassification

from plasticity_peft import (
    PlasticityConfig,
    create_plasticity_optimizer,
    find_components,
    fit_head,
    forecast_finetuning,
    measure_plasticity,
)
from plasticity_peft.components.quantized import holds_plain_weights, matrix_of
from plasticity_peft.errors import ModelError

pytest.importorskip("bitsandbytes", reason="bitsandbytes (the extra quantization) is not installed")
IMAGES = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DATA = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(IMAGES)]
WAYS: dict[str, dict[str, Any]] = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
# How far scores may be from those of the float model, relative. What is measured is the quantised model, which is
# another one: 4 bits leave an error of about 7 % in every weight, 8 bits of 0.5 %.
TOLERANCE = {"8-bit": 0.03, "4-bit": 0.12}
pytestmark = [
    # bitsandbytes multiplies in float16 with 8 bits, and says so.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a saved model whose weights fill the blocks of 64 in which bitsandbytes quantises."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("vit")
    model.save_pretrained(folder)
    return folder


def load(folder: Path, way: str | None, **options: Any) -> PreTrainedModel:
    if way is None:
        return ViTForImageClassification.from_pretrained(folder)
    config = BitsAndBytesConfig(**{"llm_int8_skip_modules": ["classifier"], **WAYS[way], **options})
    return ViTForImageClassification.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("way", WAYS)
def test_parts_are_counted_by_weight_not_by_byte(way: str, folder: Path) -> None:
    model = load(folder, way)
    assert not holds_plain_weights(model.get_submodule(find_components(model)[1].modules[0]))
    assert find_components(model) == find_components(load(folder, None))
    counts = [measure_plasticity(each, criterion="random").model_parameters for each in (model, load(folder, None))]
    assert counts[0] == counts[1] == sum(p.numel() for p in load(folder, None).parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("criterion", [
    "parameter_plasticity", "embedding", "activation", "token_sensitivity", "relative_rate_of_change", "feature_norm",
    "bound", "condition_number",
])  # fmt: skip
def test_scores_are_near_those_of_the_float_model(criterion: str, way: str, folder: Path) -> None:
    options = {"inputs": criterion} if criterion in ("embedding", "activation") else {"criterion": criterion}
    quantised, plain = (
        measure_plasticity(load(folder, each), DATA, max_samples=24, settle=None, **options) for each in (way, None)
    )
    # The smallest singular value of a weight, and with it its condition number, is most of all rounding.
    tolerance = 2.0 if criterion == "condition_number" else TOLERANCE[way]
    found = {row.kind: row.mean / other.mean - 1 for row, other in zip(quantised.kinds, plain.kinds, strict=True)}
    print(criterion, way, {kind: round(value, 4) for kind, value in found.items()})
    for row, other in zip(quantised.kinds, plain.kinds, strict=True):
        assert row.mean == pytest.approx(other.mean, rel=tolerance), row.kind


@pytest.mark.parametrize("way", WAYS)
def test_the_matrix_of_a_layer_is_what_it_multiplies_with(way: str, folder: Path) -> None:
    model, plain = load(folder, way), load(folder, None)
    for part in find_components(plain):
        for path in part.modules:
            matrix, due = (matrix_of(each.get_submodule(path)) for each in (model, plain))
            assert matrix.shape == due.shape
            assert (matrix - due).norm() <= TOLERANCE[way] * due.norm()


@pytest.mark.parametrize("way", WAYS)
def test_lora_on_a_quantised_model_trains_and_loads(way: str, folder: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in load(folder, way).state_dict().items()}
    model = load(folder, way)
    config = PlasticityConfig(
        training="lora", target_data=DATA, max_samples=8, candidates=("MHA", "FC1", "FC2"), top_k=2
    )
    model = get_peft_model(model, config)
    base = {name: value for name, value in model.get_base_model().state_dict().items() if "lora" not in name}
    for name, value in base.items():
        if "modules_to_save" not in name:
            plain = name.replace("base_layer.", "").replace("original_module.", "")
            assert torch.equal(value, before[plain]), name
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):  # LoRA's A gets a gradient once B is no longer zero
        optimizer.zero_grad()
        model(pixel_values=IMAGES[:8], labels=torch.arange(8) % 3).loss.backward()
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in trained.items())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder, way), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, found = (each.eval()(pixel_values=IMAGES[:4]).logits for each in (model, again))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_full_training_is_refused_and_changes_nothing(way: str, folder: Path) -> None:
    model = load(folder, way)
    names = list(dict(model.named_modules()))
    with pytest.raises(ModelError, match=r'0\.MHA is quantized .*training="full" would train its weights'):
        get_peft_model(model, PlasticityConfig(target_data=DATA, max_samples=8, training="full"))
    assert list(dict(model.named_modules())) == names
    assert not hasattr(model, "peft_config")
    config = PlasticityConfig(target_data=DATA, max_samples=8, training="full", candidates=("LN1", "LN2"))
    assert get_peft_model(model, config).peft_config["default"].selection.units[0] in ("LN1", "LN2")


@pytest.mark.parametrize("way", WAYS)
def test_a_quantised_head_is_refused(way: str, folder: Path) -> None:
    model = load(folder, way, llm_int8_skip_modules=["nothing"])
    with pytest.raises(ModelError, match=r"classifier, a part of the head, is quantized .*llm_int8_skip_modules"):
        get_peft_model(model, PlasticityConfig(training="lora", target_data=DATA, max_samples=8))


def test_gradients_by_quantised_weights_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"its weights are quantized .* have no gradient"):
        measure_plasticity(load(folder, "8-bit"), DATA, criterion="gradient_norm", max_samples=8)


def test_weights_that_an_evaluation_packed_are_refused(folder: Path) -> None:
    model = load(folder, "4-bit")
    layer = model.get_submodule(find_components(model)[1].modules[0])
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights anew on CPUs with AVX512-BF16 only")
    with torch.no_grad():
        model.eval()(pixel_values=IMAGES[:2])
    with pytest.raises(ModelError, match="an evaluation on this CPU has packed its 4-bit weights"):
        measure_plasticity(model, DATA, max_samples=8)
    report = measure_plasticity(load(folder, "4-bit"), DATA, max_samples=8)
    with pytest.raises(ModelError, match="an evaluation on this CPU has packed its 4-bit weights"):
        get_peft_model(model, PlasticityConfig(training="lora", report=report))


def test_nothing_that_runs_the_model_packs_its_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AVX512-BF16, each pass of an evaluation would. Other CPUs take the same path up to there."""
    from bitsandbytes.nn import modules

    class Packed(BaseException):
        """No `except Exception` hides it."""

    def pack(*_: object) -> None:
        raise Packed

    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", pack)
    model = load(folder, "4-bit")
    layers = [module for module in model.modules() if isinstance(module, modules.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    with torch.no_grad(), pytest.raises(Packed):
        model.eval()(pixel_values=IMAGES[:2])
    fit_head(model, DATA)
    forecast_finetuning(model, DATA, sets=["MHA"])
    config = PlasticityConfig(
        training="lora", target_data=DATA, max_samples=8, candidates=("MHA", "FC1", "FC2"), top_k=2
    )
    adapted = get_peft_model(model, config)
    create_plasticity_optimizer(adapted, torch.optim.AdamW, train_dataset=DATA)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
