"""Adapters and reports of other releases of transformers: the same logits, the same scores.

The files under tests/support/releases were written by real releases, in environments of their own (`make.py` there).
"""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, PreTrainedModel

from plasticity_peft import PlasticityConfig, find_components, load_adapter, measure_plasticity
from plasticity_peft.errors import AdapterError, PlasticityError, ReportError
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.saved.gated import join_gated, split_gated
from plasticity_peft.saved.layers import Layer
from tests.support.crossing import crossed
from tests.support.models import REPOSITORY, logits, moved, tiny_model
from tests.support.releases.make import IMAGES, LAYERS, WRITTEN

ADAPTERS = REPOSITORY / "tests" / "support" / "releases"
RELEASES = sorted(path.name for path in ADAPTERS.glob("transformers-*"))
CASES = ("lora", "full", "plain", "dora")


@cache
def loaded_once(name: str) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(ADAPTERS / name).eval()


def base(name: str) -> PreTrainedModel:
    return copy.deepcopy(loaded_once(name))


def expected(folder: Path) -> torch.Tensor:
    return load_file(folder / "logits.safetensors")["logits"]


def test_three_releases_wrote_adapters() -> None:
    assert RELEASES == ["transformers-4.57.6", "transformers-5.17.0", "transformers-5.23.0"]


@crossed(release=RELEASES, name=LAYERS, case=CASES)
def test_an_adapter_gives_the_logits_it_was_saved_with(release: str, name: str, case: str, tmp_path: Path) -> None:
    folder = ADAPTERS / release / name / case
    plain = logits(base(name))
    loaded = load_adapter(base(name), folder)
    torch.testing.assert_close(logits(loaded), expected(folder), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected(folder), atol=1e-2)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), plain)
    # Saved again it has the names of this release, and needs nothing of ours.
    loaded.peft_config["default"].base_model_name_or_path = str(ADAPTERS / name)
    loaded.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(name), tmp_path)), logits(loaded))
    torch.testing.assert_close(logits(load_adapter(base(name), tmp_path)), logits(loaded))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("release", RELEASES)
def test_what_was_measured_and_chosen_comes_back(release: str, name: str) -> None:
    folder = ADAPTERS / release / name / "full"
    config = load_adapter(base(name), folder, is_trainable=True).peft_config["default"]
    assert isinstance(config, PlasticityConfig)
    saved = json.loads((folder / "plasticity.json").read_text())
    assert list(config.selection.units) == saved["adapter"]["units"]
    assert config.training == "full"
    assert [row.mean for row in config.report.scores] == [row["mean"] for row in saved["scores"]]
    here = {part.id: part.modules for part in find_components(base(name))}
    assert {row.id: row.modules for row in config.report.scores} == here
    assert set(config.selection.modules) == {path for part in config.selection.components for path in here[part]}


@pytest.mark.parametrize("release", RELEASES)
def test_an_adapter_can_join_others_and_be_trained_on(release: str) -> None:
    folder = ADAPTERS / release / "vit"
    model = load_adapter(base("vit"), folder / "lora", "first", is_trainable=True)
    assert any(parameter.requires_grad for parameter in model.parameters())
    same = load_adapter(model, folder / "plain", "second")
    assert same is model
    torch.testing.assert_close(logits(model), expected(folder / "lora"), rtol=1e-4, atol=1e-5)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), expected(folder / "plain"), rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="already has an adapter 'second'"):
        load_adapter(model, folder / "plain", "second")


@pytest.mark.parametrize("case", ["lora", "full", "plain"])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_stock_peft_cannot_load_what_was_renamed(name: str, case: str) -> None:
    """If this fails, `load_adapter` is no longer needed."""
    here = {path for part in find_components(base(name)) for path in part.modules}
    for release in RELEASES:
        folder = ADAPTERS / release / name / case
        weights = load_file(folder / "adapter_model.safetensors")
        inside = [key.removeprefix("base_model.model.").split(".lora_")[0] for key in weights if "layer" in key]
        if all(path in here or path.rpartition(".")[0] in here for path in inside):
            torch.testing.assert_close(logits(PeftModel.from_pretrained(base(name), folder)), expected(folder))
            continue
        try:
            loaded = PeftModel.from_pretrained(base(name), folder)
        except (ValueError, KeyError, RuntimeError, AttributeError):
            continue
        assert not torch.allclose(logits(loaded), expected(folder), atol=1e-2)


@pytest.mark.parametrize("measure", WRITTEN)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_release_measures_the_same(attention: str, name: str, measure: str) -> None:
    model = AutoModelForImageClassification.from_pretrained(ADAPTERS / name, attn_implementation=attention)
    report = measure_plasticity(model, IMAGES, max_samples=8, **WRITTEN[measure])
    for release in RELEASES:
        other = PlasticityReport.load(ADAPTERS / release / name / "reports" / f"{measure}.json")
        assert [row.id for row in report.scores] == [row.id for row in other.scores]
        assert [row.mean for row in report.scores] == pytest.approx([row.mean for row in other.scores], rel=1e-4)
        assert [row.std for row in report.scores] == pytest.approx([row.std for row in other.scores], rel=1e-3)


PLAIN = ADAPTERS / "transformers-4.57.6" / "vit" / "plain"
OURS = ADAPTERS / "transformers-4.57.6" / "vit" / "lora"


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def with_config(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def with_weights(change: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(dict(change(key, value) for key, value in load_file(path).items()), path)

    return edit


@pytest.mark.parametrize(
    ("source", "change", "error", "text"),
    [
        (PLAIN, without("adapter_config.json"), AdapterError, "No adapter_config.json in .* It is not an adapter"),
        (PLAIN, pickled, AdapterError, "No adapter_model.safetensors in .* Weights in other formats"),
        (PLAIN, cut("adapter_config.json"), AdapterError, "Cannot read adapter_config.json of"),
        (PLAIN, cut("adapter_model.safetensors"), AdapterError, "Cannot read adapter_model.safetensors of"),
        (OURS, cut("plasticity.json"), ReportError, "Cannot read plasticity.json of"),
        (
            PLAIN,
            with_config(peft_type="IA3"),
            AdapterError,
            "only adapters with peft_type LORA .* Got 'IA3'",
        ),
        (
            PLAIN,
            with_weights(lambda key, value: (key.replace("layer.1.", "layer.7."), value)),
            AdapterError,
            r"trains \S+layer.7\S+, component 7.MHA, and the model has no such component: it has 2 blocks",
        ),
        (
            PLAIN,
            with_weights(lambda key, value: (key.replace("classifier", "pooler.other"), value)),
            AdapterError,
            "contains weights of pooler.other, which its config does not name",
        ),
        (
            PLAIN,
            with_weights(lambda key, value: (key.replace("query", "gate"), value)),
            AdapterError,
            r"LoRA weights of vit\S+gate, which its config does not name",
        ),
        (
            PLAIN,
            with_weights(lambda key, value: (key, value[:, :8].contiguous() if "lora_A" in key else value)),
            AdapterError,
            r"does not fit this ViTForImage\S+: LoRA of vit\S+ is for a layer of shape \(16, 8\), .* \(16, 16\)",
        ),
        (
            PLAIN,
            with_weights(lambda key, value: (key, value[:2].contiguous() if "classifier" in key else value)),
            AdapterError,
            r"classifier.weight has the shape \(2, 16\), in the model \(3, 16\).* give num_labels",
        ),
        (
            PLAIN,
            with_weights(lambda key, value: (key.replace("lora_A", "lora_C"), value)),
            AdapterError,
            r"contains \['lora_B.weight', 'lora_C.weight'\] for vit",
        ),
        (
            PLAIN,
            with_weights(lambda key, value: (key[5:], value)),
            AdapterError,
            "LoRA adapter start with 'base_model",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_and_the_model_left_alone(
    source: Path, change: Any, error: type[Exception], text: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(source, tmp_path / "adapter")
    change(folder)
    model = base("vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=text):
        load_adapter(model, folder)
    assert {name: id(value) for name, value in model.state_dict().items()}.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(PlasticityError, match="measured on another architecture: 'vit'"):
        load_adapter(base("dinov2"), OURS)
    with pytest.raises(PlasticityError, match=r"in a backbone with the name 'vit'; the model's has the name 'dinov2'"):
        load_adapter(base("dinov2"), PLAIN)


def test_what_is_no_folder_is_looked_for_on_the_hub() -> None:
    with pytest.raises(AdapterError, match=r"not a folder, and the Hub cannot be reached for adapter_config.json"):
        load_adapter(base("vit"), "somebody/adapter")
    with pytest.raises(AdapterError, match="neither a folder nor a repository on the Hub"):
        load_adapter(base("vit"), "not/a/repository")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_options_of_lora_survive(options: dict[str, bool], tmp_path: Path) -> None:
    model = tiny_model()
    paths = [path for part in find_components(model) if part.kind in ("MHA", "FC2") for path in part.modules]
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=paths, modules_to_save=["classifier"], rank_pattern={paths[0]: 4},
        alpha_pattern={paths[1]: 7}, **options,
    )  # fmt: skip
    adapted = moved(get_peft_model(model, config))
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_adapter(tiny_model(), tmp_path)), logits(adapted))


@pytest.mark.parametrize("seed", range(5))
def test_two_halves_are_the_whole(seed: int) -> None:
    """split and join keep scaling * B A, whatever the ranks and scalings."""
    generator = torch.Generator().manual_seed(seed)

    def lora(outputs: int, rank: int, scaling: float) -> Layer:
        a, b = torch.rand(rank, 5, generator=generator), torch.rand(outputs, rank, generator=generator)
        bias = torch.rand(outputs, generator=generator)
        return Layer({"lora_A.weight": a, "lora_B.weight": b, "lora_B.bias": bias}, scaling=scaling)

    def product(layer: Layer) -> torch.Tensor:
        return layer.scaling * layer.lora["lora_B.weight"] @ layer.lora["lora_A.weight"]

    def bias(layer: Layer) -> torch.Tensor:
        return layer.scaling * layer.lora["lora_B.bias"]

    whole = lora(6, 2 + seed, 0.5)
    for function in (product, bias):
        torch.testing.assert_close(torch.cat([function(half) for half in split_gated(whole)]), function(whole))
    gate, up = lora(3, 2, 0.5), lora(3, 1 + seed, 1.5)
    together = join_gated({0: gate, 1: up})
    for function in (product, bias):
        torch.testing.assert_close(function(together), torch.cat([function(gate), function(up)]))
    for number in (0, 1):
        alone = join_gated({number: gate})
        torch.testing.assert_close(product(alone).chunk(2)[number], product(gate))
        assert not product(alone).chunk(2)[1 - number].any()


def test_half_a_layer_cannot_train_in_full() -> None:
    half = Layer(full={"weight": torch.zeros(3, 5)})
    with pytest.raises(AdapterError, match="one of the two input layers of a gated MLP in full or by DoRA"):
        join_gated({1: half})
    whole = join_gated({0: half, 1: Layer(full={"weight": torch.ones(3, 5)})})
    assert whole.full["weight"].sum(dim=1).tolist() == [0, 0, 0, 5, 5, 5]
