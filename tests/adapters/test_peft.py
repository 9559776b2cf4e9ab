"""A PEFT citizen: what works with LoraConfig works with PlasticityConfig, in both training modes."""

from __future__ import annotations

import copy
import json
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTForImageClassification

from plasticity_peft import PlasticityConfig, PlasticityReport, find_components, measure_plasticity
from plasticity_peft.errors import ConfigError
from tests.support.models import ARCHITECTURES, backbone, logits, moved, random_images, saved_base, tiny_model
from tests.support.snapshots import assert_same, snapshot
from tests.support.stock import run_stock

MODES = ("lora", "full")
IMAGES = random_images()


def config(**options: object) -> PlasticityConfig:
    """Returns a config that measures on few images, unless it is given a report."""
    data = {} if "report" in options else {"target_data": IMAGES, "max_samples": 8}
    return PlasticityConfig(**{"training": "lora", "r": 2, "lora_alpha": 4, **data, **options})


def trained_names(model: nn.Module) -> set[str]:
    """Returns the parameters of the base model that train, by themselves, through a copy, or through LoRA."""
    names = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace("base_model.model.", "").replace(".modules_to_save.default", "")
            names.add(name.split(".lora_")[0] + ".weight" if ".lora_" in name else name)
    return names


@pytest.fixture(params=MODES)
def training(request: pytest.FixtureRequest) -> str:
    return request.param


def test_exactly_the_selected_components_and_the_head_train(model: PreTrainedModel, training: str) -> None:
    paths = {part.id: part.modules for part in find_components(model)}
    chosen = config(training=training, granularity="component", top_k=3)
    expected = {"classifier.weight", "classifier.bias"}
    parameters = dict(model.named_parameters())

    adapted = get_peft_model(model, chosen)

    assert len(chosen.selection.components) == 3
    for path in (path for unit in chosen.selection.components for path in paths[unit]):
        names = ("weight", "bias") if training == "full" else ("weight",)
        expected |= {f"{path}.{name}" for name in names if f"{path}.{name}" in parameters}
    assert trained_names(adapted) == expected


def test_parameter_counts_are_those_that_were_promised(
    model: PreTrainedModel, training: str, capsys: pytest.CaptureFixture
) -> None:
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    chosen = config(training=training, top_k=2)
    adapted = get_peft_model(model, chosen)
    trainable, _ = adapted.get_nb_trainable_parameters()
    assert trainable == chosen.selection.parameters[training] + head
    adapted.print_trainable_parameters()
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"r": 3}])
def test_options_of_lora_pass_through_and_are_counted(vit: PreTrainedModel, options: dict[str, object]) -> None:
    chosen = config(**options)
    model = get_peft_model(vit, chosen)
    path = min(chosen.target_modules)
    layer = model.get_base_model().get_submodule(path)
    stock = get_peft_model(tiny_model(), LoraConfig(**{"r": 2, "lora_alpha": 4, **options}, target_modules=[path]))
    twin = stock.get_base_model().get_submodule(path)
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in twin.named_parameters()}
    assert layer.scaling == twin.scaling
    lora = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
    assert lora == chosen.selection.parameters["lora"]


def test_a_selected_norm_trains_in_full_beside_lora(vit: PreTrainedModel) -> None:
    chosen = config(candidates=("LN1", "MHA"), top_k=2)
    parts = [part for part in find_components(vit) if part.kind in ("LN1", "MHA")]
    weights = {f"{path}.weight" for part in parts for path in (*part.modules, "classifier")}
    biases = {
        f"{path}.bias" for part in parts for path in (*part.modules, "classifier") if "norm" in path or "cl" in path
    }
    assert trained_names(get_peft_model(vit, chosen)) == weights | biases


def test_norms_alone_need_no_lora_layer(vit: PreTrainedModel) -> None:
    norms = [path for unit in find_components(vit) if unit.kind == "LN2" for path in unit.modules]
    expected = {f"{path}.{name}" for path in [*norms, "classifier"] for name in ("weight", "bias")}
    assert trained_names(get_peft_model(vit, config(candidates="LN2"))) == expected


def test_a_bare_backbone_has_no_head_to_train(training: str) -> None:
    adapted = get_peft_model(backbone(), config(training=training))
    assert not any("pooler" in name or "classifier" in name for name in trained_names(adapted))


def test_disabled_the_adapter_leaves_the_base_model(model: PreTrainedModel, training: str) -> None:
    before = logits(model)
    adapted = moved(get_peft_model(model, config(training=training)))
    assert not torch.allclose(logits(adapted), before, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)


def test_merged_the_adapter_leaves_a_plain_model(model: PreTrainedModel, training: str) -> None:
    plain = type(model)
    adapted = moved(get_peft_model(model, config(training=training)))
    before = logits(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is plain
    assert set(merged.state_dict()) == set(tiny_model(merged.config.model_type).state_dict())
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)


def test_round_trip_into_a_fresh_base(model: PreTrainedModel, training: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", model)
    adapted = moved(get_peft_model(base, config(training=training)))
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = type(model).from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(adapted))
    assert type(loaded.peft_config["default"]) is LoraConfig


CASES = {f"{name}-{mode}": None for name in ARCHITECTURES for mode in MODES} | {
    f"headless-{mode}": 5 for mode in MODES
}


@pytest.fixture(scope="module")
def stock_and_ours(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of one adapter of each case: loaded by stock code, and as it was trained here."""
    folder = tmp_path_factory.mktemp("stock")
    ours = {}
    for case, num_labels in CASES.items():
        name, mode = case.split("-")
        (backbone() if name == "headless" else tiny_model(name)).save_pretrained(folder / case / "base")
        options = {} if num_labels is None else {"num_labels": num_labels}
        base = AutoModelForImageClassification.from_pretrained(folder / case / "base", **options)
        adapted = moved(get_peft_model(base, config(training=mode)))
        adapted.save_pretrained(folder / case / "adapter")
        ours[case] = logits(adapted)
    return run_stock(folder, CASES, IMAGES), ours


@pytest.mark.parametrize("how", ["peft", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_loads_where_this_package_is_not_installed(
    stock_and_ours: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]], case: str, how: str
) -> None:
    stock, ours = stock_and_ours
    torch.testing.assert_close(stock[f"{case}/{how}"], ours[case])


def test_once_saved_adapters_stand_beside_each_other_and_beside_lora(training: str, tmp_path: Path) -> None:
    saved_base(tmp_path / "base", tiny_model())
    outputs = {}
    for seed, kind in enumerate(("FC1", "MHA")):
        base = ViTForImageClassification.from_pretrained(tmp_path / "base")
        adapted = moved(get_peft_model(base, config(training=training, candidates=kind)), seed=seed)
        adapted.save_pretrained(tmp_path / kind)
        outputs[kind] = logits(adapted)
    fresh = ViTForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "FC1", adapter_name="FC1")
    loaded.load_adapter(tmp_path / "MHA", adapter_name="MHA")
    loaded.add_adapter("stock", LoraConfig(target_modules=[find_components(fresh)[4].modules[0]]))
    for kind, expected in outputs.items():
        loaded.set_adapter(kind)
        torch.testing.assert_close(logits(loaded), expected)


def test_two_adapters_live_side_by_side(model: PreTrainedModel, training: str) -> None:
    base = logits(model)
    first = config(training=training)
    adapted = moved(get_peft_model(model, first))
    with_first = logits(adapted)
    second = config(training=training, granularity="component", top_k=2, seed=1)
    trained = trained_names(adapted)

    adapted.add_adapter("second", second)

    assert trained_names(adapted) == trained
    torch.testing.assert_close(logits(adapted), with_first)
    # The base model is measured, not what the first adapter made of it.
    on_base = measure_plasticity(tiny_model(model.config.model_type), IMAGES, max_samples=8, seed=1)
    assert [row.mean for row in second.report.scores] == pytest.approx([row.mean for row in on_base.scores])
    adapted.set_adapter("second")
    moved(adapted, seed=4)
    with_second = logits(adapted)
    assert not torch.allclose(with_second, with_first, atol=1e-3)
    adapted.set_adapter("default")
    torch.testing.assert_close(logits(adapted), with_first)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), base)


@pytest.mark.parametrize(("first", "second"), [("lora", "full"), ("full", "lora")])
def test_two_modes_on_one_module_are_refused(vit: PreTrainedModel, first: str, second: str) -> None:
    adapted = get_peft_model(vit, config(training=first))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with pytest.raises(ValueError, match=f'trains vit.* with training="{first}"'):
        adapted.add_adapter("second", config(training=second))
    assert list(adapted.peft_config) == ["default"]
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_name_in_use_is_refused_before_anything_is_measured(vit: PreTrainedModel) -> None:
    adapted = get_peft_model(vit, config())
    unused = config()
    with pytest.raises(ValueError, match="already exists"):
        adapted.add_adapter("default", unused)
    assert unused.report is None


def test_transformers_add_adapter(model: PreTrainedModel, training: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", model)
    before = logits(base)
    chosen = config(training=training)
    base.add_adapter(chosen)
    moved(base)
    adapted = logits(base)
    assert chosen.selection is not None
    assert not torch.allclose(adapted, before, atol=1e-3)
    base.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), adapted)
    base.disable_adapters()
    torch.testing.assert_close(logits(base), before)
    base.enable_adapters()
    torch.testing.assert_close(logits(base), adapted)


def test_transformers_switches_between_two_adapters(vit: PreTrainedModel, training: str) -> None:
    outputs = {}
    for seed, name in enumerate(("first", "second")):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config`"
            )  # PEFT says so of any second one
            vit.add_adapter(config(training=training), adapter_name=name)
        for parameter_name, parameter in vit.named_parameters():
            # Stock LoRA leaves the modules_to_save of the first adapter trainable too.
            parameter.requires_grad_(f".{name}." in parameter_name)
        outputs[name] = logits(moved(vit, seed=seed))
    for name in ("first", "second"):
        vit.set_adapter(name)
        assert vit.active_adapters() in (name, [name])
        torch.testing.assert_close(logits(vit), outputs[name])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT says so of any second adapter
def test_adapters_that_transformers_could_not_switch_between_are_refused(vit: PreTrainedModel) -> None:
    vit.add_adapter(config(training="full", candidates="FC1"), adapter_name="first")
    before = snapshot(vit)
    with pytest.raises(ConfigError, match=r"Only one of this .* trains .*(fc1|fc2|dense) in full.*use a PeftModel"):
        vit.add_adapter(config(training="full", candidates="FC2"), adapter_name="second")
    assert_same(before, snapshot(vit))
    vit.set_adapter("first")


def test_a_failing_add_adapter_leaves_a_model_that_takes_one(vit: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="needs images to measure on"):
        vit.add_adapter(PlasticityConfig(training="lora"))
    vit.add_adapter(config())
    assert list(vit.peft_config) == ["default"]


def test_gradient_checkpointing_gives_the_same_gradients(model: PreTrainedModel, training: str) -> None:
    torch.manual_seed(0)
    plain = moved(get_peft_model(copy.deepcopy(model), config(training=training))).train()
    # transformers 5.23 renamed it and deprecates the old name.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    torch.manual_seed(0)
    checkpointed = moved(get_peft_model(model, config(training=training))).train()
    for adapted in (plain, checkpointed):
        adapted(pixel_values=IMAGES, labels=torch.arange(len(IMAGES)) % 3).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in checkpointed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_the_data_are_let_go_and_never_written(vit: PreTrainedModel) -> None:
    chosen = config(source_data=random_images(seed=2))
    assert "target_data" not in chosen.to_dict()
    assert "tensor" not in repr(chosen)
    get_peft_model(vit, chosen)
    assert chosen.target_data is None
    assert chosen.source_data is None
    assert set(chosen.to_dict()) == set(LoraConfig().to_dict())
    json.dumps(chosen.to_dict())


def test_an_open_config_round_trips_without_its_data(tmp_path: Path) -> None:
    report = measure_plasticity(tiny_model(), IMAGES, max_samples=4)
    report.save(tmp_path / "plasticity.json")
    for given in (report, report.to_dict(), str(tmp_path / "plasticity.json"), tmp_path / "plasticity.json"):
        first = config(report=given, top_k=2, candidates=("FC1", "LN2"), training="full")
        first.save_pretrained(tmp_path)
        second = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(second, PlasticityConfig)
        assert second.load_report() == report
        assert (second.top_k, tuple(second.candidates), second.training) == (2, ("FC1", "LN2"), "full")


def test_plasticity_json_tells_what_was_measured_and_chosen(vit: PreTrainedModel, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", vit)
    base.config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    chosen = config(training="full", top_k=2, seed=5, inputs="embedding", candidates=("MHA", "FC1", "FC2"))
    get_peft_model(base, chosen).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "plasticity.json").read_text())
    expected = {"criterion": "rate_of_change", "inputs": "embedding", "samples": 8, "seed": 5}
    assert {key: written[key] for key in expected} == expected
    assert written["versions"]["torch"] == version("torch")
    assert len(written["scores"]) == 10
    assert written["adapter"]["units"] == list(chosen.selection.units)
    assert written["adapter"]["components"] == list(chosen.selection.components)
    assert written["adapter"]["training"] == "full"
    assert written["adapter"]["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    assert PlasticityReport.load(tmp_path / "plasticity.json") == chosen.report
    assert PeftConfig.from_pretrained(tmp_path).peft_type == PeftType.LORA


def test_a_report_replaces_data_and_probing(
    model: PreTrainedModel, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = measure_plasticity(model, IMAGES, max_samples=8)
    monkeypatch.setattr("plasticity_peft.adapters.model.measure_by", lambda *args, **kwargs: pytest.fail("measured"))
    chosen = config(report=report, training=training, top_k=2)
    get_peft_model(model, chosen)
    assert chosen.selection == report.select(top_k=2, r=2, training=training)


def test_the_same_call_gives_the_same_adapter(vit: PreTrainedModel, training: str) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(get_peft_model(copy.deepcopy(vit), config(training=training)))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_choice_above_the_units_is_refused_before_anything_is_measured(
    vit: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "plasticity_peft.measuring.measure.check_calls", lambda *args, **kwargs: pytest.fail("measured")
    )
    with pytest.raises(ValueError, match="from 1 to 10"):
        get_peft_model(vit, config(top_k=11, granularity="component"))


def test_more_targets_than_peft_lists_one_by_one(training: str, tmp_path: Path) -> None:
    """From 20 on, PEFT shortens the names of its targets: the same modules must be meant, now and when loaded."""
    base = saved_base(tmp_path / "base", tiny_model(num_hidden_layers=12))
    parts = {part.id: part.modules for part in find_components(base)}
    adapted = get_peft_model(base, config(training=training, granularity="component", top_k=11))
    chosen = adapted.peft_config["default"].selection.components
    expected = {f"{path}.weight" for unit in chosen for path in parts[unit]} | {"classifier.weight"}
    assert {name for name in trained_names(adapted) if name.endswith("weight")} == expected
    moved(adapted).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(adapted))


def test_the_users_modules_to_save_are_kept(vit: PreTrainedModel) -> None:
    adapted = get_peft_model(vit, config(modules_to_save=["layernorm"]))
    assert {"vit.layernorm.weight", "classifier.weight"} < trained_names(adapted)


def test_no_warning_is_ours(model: PreTrainedModel, training: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(saved_base(tmp_path / "base", model), config(training=training))
        adapted.save_pretrained(tmp_path / "adapter")
    assert [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)] == []


def test_every_architecture_was_run() -> None:
    assert sorted(ARCHITECTURES) == ["deit", "dinov2", "vit"]  # as in conftest.py


def test_where_transformers_refuses_its_own_method_for_a_newer_peft_the_model_is_as_found() -> None:
    """transformers 5.24.0 asks for a peft that was not released with it; get_peft_model works there."""
    from transformers.integrations import peft as of_transformers

    wanted = getattr(of_transformers, "MIN_PEFT_VERSION", "0")
    if Version(version("peft")) >= Version(wanted):
        pytest.skip(f"transformers asks for peft {wanted} or newer, which is installed")
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"please use a version >= {wanted}"):
        model.add_adapter(config())
    assert_same(before, snapshot(model))
    get_peft_model(model, config())
