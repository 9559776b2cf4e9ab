"""Once components are chosen, a live model is a LoRA model: PEFT does with it what it does with one of LoraConfig."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoHaConfig, LoraConfig, LoraModel, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners.lora import ArrowConfig, LoraGAConfig
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from plasticity_peft import PlasticityConfig, load_adapter, measure_plasticity
from plasticity_peft.checkpoints import last_whole_checkpoint, why_not_whole
from plasticity_peft.errors import AdapterError, ConfigError
from tests.support.models import backbone, logits, moved, random_images, tiny_model

_ON_TESTED_VERSIONS = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="compared with stock PEFT on the tested versions only"
)


IMAGES = random_images()
REPORT = measure_plasticity(tiny_model(), criterion="bound")
HEADLESS = measure_plasticity(backbone(), criterion="bound")

pytestmark = [
    _ON_TESTED_VERSIONS,
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:Adapter .* was active which is now deleted"),
]


def config(training: str = "lora", **options: Any) -> PlasticityConfig:
    return PlasticityConfig(
        **{"report": REPORT, "candidates": "MHA", "training": training, "r": 2, "lora_alpha": 4, **options}
    )


def pair(training: str, **options: Any) -> tuple[PeftModel, PeftModel]:
    """Returns a model adapted by a PlasticityConfig, and its twin by a LoraConfig of the same modules and weights."""
    torch.manual_seed(0)
    ours = get_peft_model(tiny_model(), config(training, **options))
    torch.manual_seed(0)
    stock = get_peft_model(tiny_model(), ours.peft_config["default"].to_lora())
    return moved(ours).eval(), moved(stock).eval()


def plain(value: Any) -> Any:
    """Returns a value without what differs between two equal models: classes of configs, folders, order."""
    if isinstance(value, PeftConfig):
        values = value.to_dict()
        return {key: sorted(each) if isinstance(each, (set, list)) else each for key, each in values.items()}
    if isinstance(value, nn.Module):
        return plain(
            {name: (tensor, tensor.requires_grad) for name, tensor in value.state_dict(keep_vars=True).items()}
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.detach().float().tolist()
    return value


def outcome(verb: Callable[[PeftModel, Path], Any], model: PeftModel, folder: Path) -> Any:
    """Returns what a verb returned and what the model then is and computes, or the error that it raised."""
    folder.mkdir()
    torch.manual_seed(0)
    try:
        result = verb(model, folder)
    except Exception as error:
        return f"{type(error).__name__}: {re.sub(r'/[^ ]*', '<path>', str(error)).replace(str(folder), '<folder>')}"
    return plain([result, model, model.peft_config, model.active_adapters, model.peft_type])


def labelled() -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: model(pixel_values=IMAGES, labels=torch.arange(len(IMAGES)) % 3).loss


def loader() -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": IMAGES}, {"pixel_values": IMAGES.flip(0)}]


def saved(model: PeftModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def files(folder: Path) -> dict[str, Any]:
    """Returns the weights and the config that stock PEFT reads from a folder."""
    return {"weights": peft.load_peft_weights(str(folder), device="cpu"), "config": PeftConfig.from_pretrained(folder)}


def other(model: PeftModel) -> LoraConfig:
    """Returns a LoraConfig of other modules than those of the model's adapter."""
    return LoraConfig(r=2, target_modules=["mlp.fc1", "intermediate.dense"], init_lora_weights=False)


def own(model: PeftModel, **changes: Any) -> LoraConfig:
    """Returns a copy of the config of the model's adapter."""
    return dataclasses.replace(model.peft_config["default"], **changes)


def add_and_set(model: PeftModel, folder: Path) -> Any:
    model.add_adapter("two", own(model))
    model.set_adapter("two")
    moved(model, seed=1)
    return logits(model)


def weighted(model: PeftModel, folder: Path) -> Any:
    model.add_adapter("two", other(model))
    model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "mix", combination_type="linear")
    model.set_adapter("mix")
    return logits(model)


def deleted(model: PeftModel, folder: Path) -> Any:
    model.add_adapter("two", other(model))
    model.delete_adapter("two")
    return logits(model)


def deleted_active(model: PeftModel, folder: Path) -> Any:
    model.add_adapter("two", own(model))
    model.delete_adapter("default")
    return logits(model)


def switched_layers(model: PeftModel, folder: Path) -> Any:
    model.base_model.disable_adapter_layers()
    off = logits(model)
    model.base_model.enable_adapter_layers()
    return off, logits(model)


def disabled(model: PeftModel, folder: Path) -> Any:
    with model.disable_adapter():
        return logits(model)


def merged_in_place(model: PeftModel, folder: Path) -> Any:
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    return merged, logits(model)


def loaded_beside(model: PeftModel, folder: Path) -> Any:
    model.load_adapter(saved(model, folder), "two")
    model.set_adapter("two")
    return logits(model)


def loaded_other_beside(model: PeftModel, folder: Path) -> Any:
    saved(get_peft_model(tiny_model(), other(model)), folder)
    model.load_adapter(folder, "two", is_trainable=True)
    model.set_adapter("two")
    return logits(model)


def from_pretrained(model: PeftModel, folder: Path) -> Any:
    return logits(PeftModel.from_pretrained(tiny_model(), saved(model, folder)))


def mixed(model: PeftModel, folder: Path) -> Any:
    both = get_peft_model(tiny_model(), own(model), mixed=True)
    both.add_adapter("two", LoHaConfig(r=2, target_modules=["mlp.fc1"], init_weights=False))
    both.set_adapter(["default", "two"])
    return logits(both)


def injected(model: PeftModel, folder: Path) -> Any:
    return logits(moved(peft.inject_adapter_in_model(own(model), tiny_model())))


def transplanted(model: PeftModel, folder: Path) -> Any:
    twin = get_peft_model(tiny_model(), own(model))
    peft.set_peft_model_state_dict(twin, peft.get_peft_model_state_dict(model))
    return logits(twin)


def base_state(model: PeftModel, folder: Path) -> Any:
    state = peft.get_base_model_state_dict(model)
    peft.set_base_model_state_dict(model, state)
    return state


def lora_ga(model: PeftModel, folder: Path) -> Any:
    base, chosen = tiny_model(), own(model, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    peft.preprocess_loraga(base, chosen, lambda: labelled()(base).backward())
    return logits(get_peft_model(base, chosen))


def eva(model: PeftModel, folder: Path) -> Any:
    chosen = own(model, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    state = peft.get_eva_state_dict(tiny_model(), loader(), chosen, prepare_model_inputs_fn=None,
                                    prepare_layer_inputs_fn=flat, show_progress_bar=False)  # fmt: skip
    adapted = get_peft_model(tiny_model(), chosen)
    peft.initialize_lora_eva_weights(adapted, eva_state_dict=dict(state))
    return state, logits(adapted), adapted.peft_config["default"]


def flat(values: Any, model_input: Any, name: str) -> torch.Tensor:
    return (values[0] if isinstance(values, tuple) else values).flatten(0, -2)


def arrow(model: PeftModel, folder: Path) -> Any:
    paths = [str(saved(model, folder / name)) for name in ("a", "b")]
    return logits(peft.create_arrow_model(tiny_model(), paths, ArrowConfig(top_k=1)))


def hotswapped(model: PeftModel, folder: Path) -> Any:
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, str(saved(model, folder)), "default")
    return logits(model)


def intruders(model: PeftModel, folder: Path) -> Any:
    reduce_intruder_dimension(model, logging_sink=None)
    return logits(model)


def beginning(start: str) -> Callable[[PeftModel, Path], Any]:
    """Returns a verb: an adapter with another initialization is converted to plain LoRA when it is saved."""

    def convert(model: PeftModel, folder: Path) -> Any:
        model = get_peft_model(tiny_model(), own(model, init_lora_weights=start))
        model.peft_config["default"].init_lora_weights = True
        saved(model, folder / "start")
        model.peft_config["default"].init_lora_weights = start
        moved(model)
        saved(model, folder / "plain", path_initial_model_for_weight_conversion=str(folder / "start"))
        return files(folder / "plain")

    return convert


def rescaled(model: PeftModel, folder: Path) -> Any:
    with rescale_adapter_scale(model, multiplier=0.5):
        return logits(model)


def uncast(model: PeftModel, folder: Path) -> Any:
    with disable_input_dtype_casting(model):
        return logits(model)


def mixed_batch(model: PeftModel, folder: Path) -> Any:
    with torch.no_grad():
        return model(pixel_values=IMAGES, adapter_names=["default", "__base__"] * 6).logits


def subtracted(model: PeftModel, folder: Path) -> Any:
    saved(model, folder)
    model.load_adapter(folder, "start")
    state = peft.get_peft_model_state_dict(model)
    return model.subtract_mutated_init(state, "start", {})


VERBS: dict[str, Callable[[PeftModel, Path], Any]] = {
    # of PeftModel
    "active_adapters": lambda model, folder: model.active_adapters,
    "active_peft_config": lambda model, folder: model.active_peft_config,
    "add_adapter": add_and_set,
    "add_adapter(LoraConfig)": lambda model, folder: model.add_adapter("two", other(model)),
    "base_model_torch_dtype": lambda model, folder: model.base_model_torch_dtype,
    "delete_adapter": deleted,
    "delete_adapter(active)": deleted_active,
    "disable_adapter": disabled,
    "from_pretrained": from_pretrained,
    "get_base_model": lambda model, folder: model.get_base_model(),
    "get_layer_status": lambda model, folder: model.get_layer_status(),
    "get_model_status": lambda model, folder: model.get_model_status(),
    "get_nb_trainable_parameters": lambda model, folder: model.get_nb_trainable_parameters(),
    "has_active_enabled_adapter": lambda model, folder: model.has_active_enabled_adapter,
    "load_adapter": loaded_beside,
    "load_adapter(LoRA)": loaded_other_beside,
    "modules_to_save": lambda model, folder: model.modules_to_save,
    "peft_config": lambda model, folder: model.peft_config,
    "print_trainable_parameters": lambda model, folder: model.print_trainable_parameters(),
    "save_pretrained": lambda model, folder: files(saved(model, folder)),
    "save_pretrained(pissa)": beginning("pissa"),
    "save_pretrained(olora)": beginning("olora"),
    "save_pretrained(mica)": beginning("mica"),
    "set_adapter": lambda model, folder: model.set_adapter("default", inference_mode=True),
    "set_requires_grad": lambda model, folder: model.set_requires_grad("default", False),
    "supports_lora_conversion": lambda model, folder: model.supports_lora_conversion(),
    # of LoraModel
    "add_weighted_adapter": weighted,
    "disable_adapter_layers": switched_layers,
    "enable_adapter_layers": switched_layers,
    "get_model_config": lambda model, folder: model.get_model_config(model),
    "inject_adapter": injected,
    "merge_adapter": merged_in_place,
    "merge_and_unload": lambda model, folder: logits(model.merge_and_unload()),
    "prefix": lambda model, folder: model.prefix,
    "subtract_mutated_init": subtracted,
    "target_module_mapping": lambda model, folder: model.target_module_mapping,
    "tuner_layer_cls": lambda model, folder: model.tuner_layer_cls.__name__,
    "unload": lambda model, folder: logits(model.unload()),
    "unmerge_adapter": merged_in_place,
    "uses_shared_state": lambda model, folder: model.uses_shared_state,
    # functions of peft
    "cast_mixed_precision_params": lambda model, folder: peft.cast_mixed_precision_params(model, torch.bfloat16),
    "convert_to_lora": lambda model, folder: peft.convert_to_lora(model, rank=2),
    "save_as_lora": lambda model, folder: peft.save_as_lora(folder, model, rank=2),
    "create_arrow_model": arrow,
    "find_kappa_target_modules": lambda model, folder: peft.find_kappa_target_modules(model),
    "get_base_model_state_dict": base_state,
    "set_base_model_state_dict": base_state,
    "get_eva_state_dict": eva,
    "initialize_lora_eva_weights": eva,
    "get_peft_config": lambda model, folder: peft.get_peft_config({**model.peft_config["default"].to_dict()}),
    "get_peft_model": lambda model, folder: logits(get_peft_model(tiny_model(), own(model))),
    "get_peft_model(mixed)": mixed,
    "get_peft_model_state_dict": transplanted,
    "set_peft_model_state_dict": transplanted,
    "inject_adapter_in_model": injected,
    "load_peft_weights": lambda model, folder: peft.load_peft_weights(str(saved(model, folder)), device="cpu"),
    "preprocess_loraga": lora_ga,
    "prepare_model_for_kbit_training": lambda model, folder: peft.prepare_model_for_kbit_training(model),
    "replace_lora_weights_loftq": lambda model, folder: peft.replace_lora_weights_loftq(model),
    # functions of its modules
    "check_if_peft_model": lambda model, folder: check_if_peft_model(str(saved(model, folder))),
    "disable_input_dtype_casting": uncast,
    "hotswap_adapter": hotswapped,
    "reduce_intruder_dimension": intruders,
    "rescale_adapter_scale": rescaled,
    "adapter_names": mixed_batch,
}

NOT_OF_LORA = {
    "bloom_model_postprocess_past_key_value": "text",
    "compose_cartridge_adapters": "CARTRIDGE adapters",
    "generate": "text",
    "get_prompt": "prompt learning",
    "get_prompt_embedding_to_save": "prompt learning",
    "initialize_kv_prefix_from_past_key_values": "prompt learning",
    "initialize_kv_prefix_from_text": "prompt learning",
    "prompt_embeddings_from_past_key_values": "prompt learning",
    "shift_tokens_right": "text",
    "create_or_update_model_card": "our card contains more: tests/saved/test_card.py",
    "push_to_hub": "needs a Hub: tests/adapters/test_hub.py",
    "prepare_model_for_gradient_checkpointing": "called by get_peft_model",
}
"""Public names that are not run here, with the reason."""

BETTER = {
    ("delete_adapter(active)", "full"): "stock leaves no adapter active where no adapter has LoRA layers",
    ("unload", "full"): "stock returns the trained components",
    ("adapter_names", "full"): "stock does not find an adapter without LoRA layers",
}
"""What differs from stock PEFT on purpose, by verb and mode. Each has a test of its own below."""


RAISING = {("replace_lora_weights_loftq", "lora"), ("hotswap_adapter", "lora")} | {
    (verb, "full")
    for verb in (
        "add_weighted_adapter", "convert_to_lora", "save_as_lora", "create_arrow_model", "preprocess_loraga",
        "replace_lora_weights_loftq", "hotswap_adapter", "rescale_adapter_scale",
    )
}  # fmt: skip
"""What stock PEFT refuses too: weights that are not quantized, a head, adapters without LoRA layers."""


def public_names() -> set[str]:
    methods = {name for owner in (PeftModel, LoraModel) for name in dir(owner) if not name.startswith("_")}
    functions = {name for name in dir(peft) if inspect.isfunction(getattr(peft, name))}
    return (methods - set(dir(nn.Module))) | functions


def test_every_public_name_of_peft_is_run_or_has_a_reason() -> None:
    names = public_names()
    assert len(names) > 55
    assert names - set(VERBS) - set(NOT_OF_LORA) == set()
    assert not set(VERBS) & set(NOT_OF_LORA)


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_of_peft_does_what_it_does_with_a_lora_config(verb: str, training: str, tmp_path: Path) -> None:
    if (verb, training) in BETTER:
        pytest.skip(BETTER[verb, training])
    ours, stock = pair(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = outcome(VERBS[verb], ours, tmp_path / "ours")
        expected = outcome(VERBS[verb], stock, tmp_path / "stock")
    assert got == expected
    assert isinstance(expected, str) is ((verb, training) in RAISING)


def test_weights_of_a_model_without_a_head_are_swapped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = moved(get_peft_model(backbone(), headless("MHA", r=4)), seed=1)
    model.save_pretrained(tmp_path)
    expected = model.eval()(IMAGES)[0]
    moved(model, seed=2)
    hotswap_adapter(model, str(tmp_path), "default")
    torch.testing.assert_close(model(IMAGES)[0], expected)


def test_the_live_model_consists_of_nothing_but_lora() -> None:
    model = get_peft_model(tiny_model(), config())
    assert model.peft_type is PeftType.LORA
    assert type(model.base_model) is LoraModel
    assert model.get_model_status().peft_types == {"default": "LORA"}
    assert type(model.peft_config["default"].target_modules) is set


@pytest.mark.parametrize("mixed", [False, True])
def test_an_open_config_chooses_on_a_model_that_has_adapters(mixed: bool) -> None:
    model = get_peft_model(tiny_model(), other(None), mixed=mixed)
    chosen = config()
    model.add_adapter("two", chosen)
    assert chosen.selection.units == ("MHA",)
    direct = get_peft_model(tiny_model(), config(), mixed=mixed)
    assert {n for n in direct.state_dict() if "lora" in n} == {
        n.replace(".two.", ".default.") for n in model.state_dict() if "lora" in n and ".two." in n
    }


@pytest.mark.parametrize("make", [PeftModel, peft.PeftModelForFeatureExtraction], ids=lambda make: make.__name__)
def test_a_peft_model_of_any_class_is_lora(make: type[PeftModel]) -> None:
    model = make(backbone(), config(report=HEADLESS), "default")
    assert model.peft_type is PeftType.LORA
    model.add_adapter("two", LoraConfig(target_modules=["mlp.fc1", "intermediate.dense"]))


# Copies.

COPIES: dict[str, Callable[[PlasticityConfig], PlasticityConfig]] = {
    "replace": dataclasses.replace,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_resolved_config_is_copied(how: str, training: str) -> None:
    original = config(training).choose(tiny_model())
    twin = COPIES[how](original)
    assert (twin.selection, twin.report, twin.to_dict()) == (original.selection, REPORT, original.to_dict())
    adapted = get_peft_model(tiny_model(), twin)
    assert adapted.peft_config["default"].selection == original.selection


def test_options_of_lora_may_change_in_a_copy_and_those_of_the_selection_may_not() -> None:
    chosen = config().choose(tiny_model())
    assert dataclasses.replace(chosen, r=7).r == 7
    with pytest.raises(ConfigError, match="top_k was changed after the components were selected"):
        dataclasses.replace(chosen, top_k=1)
    chosen.training = "full"
    with pytest.raises(ConfigError, match="training was changed after"):
        get_peft_model(tiny_model(), chosen)


@pytest.mark.parametrize("value", [True, {}, "MHA"])
def test_chosen_is_no_option_of_users(value: Any) -> None:
    with pytest.raises(ConfigError, match="chosen is set by"):
        config(chosen=value)


# One config, two models.

OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "labels": lambda: tiny_model(num_labels=5),
    "depth": lambda: tiny_model(num_hidden_layers=3),
    "weights": lambda: moved(tiny_model(), seed=3),
}


@pytest.mark.parametrize("difference", OTHERS)
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_choice_is_not_applied_to_another_model(difference: str, training: str) -> None:
    chosen = config(training)
    get_peft_model(tiny_model(), chosen)
    model = OTHERS[difference]()
    with pytest.raises(ConfigError, match="selected components of another model"):
        get_peft_model(model, chosen)
    assert not any("lora" in name or "modules_to_save" in name for name in model.state_dict())


def test_a_choice_is_applied_to_the_same_model_again() -> None:
    chosen, names = config(init_lora_weights="pissa"), set()
    for _ in range(2):
        names |= set(get_peft_model(tiny_model(), chosen).state_dict())
    model = get_peft_model(tiny_model(), chosen)  # PiSSA changes the weights of the base model
    model.add_adapter("two", chosen)
    assert names == set(get_peft_model(tiny_model(), chosen).state_dict())


def test_choose_leaves_the_model_as_it_is() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    chosen = config().choose(model)
    assert isinstance(chosen.to_lora(), LoraConfig)
    assert not isinstance(chosen.to_lora(), PlasticityConfig)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert chosen.choose(model) is chosen
    with pytest.raises(ConfigError, match=r"Call config.choose\(model\) first"):
        config().to_lora()


def test_target_modules_that_peft_filled_in_before_the_choice_are_refused() -> None:
    chosen = config()
    chosen.target_modules = {"query", "value"}
    with pytest.raises(ConfigError, match=r"call config.choose\(model\) before"):
        get_peft_model(tiny_model(), chosen)


# Adapters made of adapters.


def headless(kind: str, **options: Any) -> PlasticityConfig:
    return config(report=HEADLESS, candidates=kind, **options)


def test_an_adapter_made_of_two_is_one_of_ours_only_if_it_trains_what_was_chosen(tmp_path: Path) -> None:
    model = get_peft_model(backbone(), headless("MHA"))
    model.add_adapter("same", headless("MHA"))
    model.add_adapter("other", headless("FC1"))
    model.add_weighted_adapter(["default", "same"], [0.5, 0.5], "of_same", combination_type="cat")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "of_other", combination_type="linear")
    assert type(model.peft_config["of_same"]) is PlasticityConfig
    assert type(model.peft_config["of_other"]) is LoraConfig
    moved(model).save_pretrained(tmp_path)
    assert (tmp_path / "of_same" / "plasticity.json").exists()
    assert not (tmp_path / "of_other" / "plasticity.json").exists()
    for name in ("of_same", "of_other"):
        model.set_adapter(name)
        loaded = load_adapter(backbone(), tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(IMAGES)[0], model.eval()(IMAGES)[0])


def test_a_live_model_takes_adapters_of_load_adapter_and_new_ones(tmp_path: Path) -> None:
    model = moved(get_peft_model(tiny_model(), config()))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    load_adapter(model, tmp_path, "two")
    loaded = load_adapter(tiny_model(), tmp_path)
    loaded.add_adapter("next", config(candidates="FC1"))
    for adapted, name in ((model, "two"), (loaded, "default")):
        adapted.set_adapter(name)
        torch.testing.assert_close(logits(adapted), expected)


# Adapters without LoRA layers.


def two_in_full(second: str = "MHA") -> PeftModel:
    model = moved(get_peft_model(tiny_model(), config("full"), "cats"), seed=0)
    model.add_adapter("dogs", config("full", candidates=second))
    model.set_adapter("dogs")
    moved(model, seed=1)
    model.set_adapter("cats")
    return model.eval()


@pytest.mark.parametrize("second", ["MHA", "FC1"])
def test_deleting_an_adapter_leaves_the_active_one_on(second: str) -> None:
    model = two_in_full(second)
    before, flags = logits(model), {n: p.requires_grad for n, p in model.named_parameters() if ".dogs." not in n}
    model.delete_adapter("dogs")
    assert (model.active_adapters, model.active_adapter) == (["cats"], "cats")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_deleting_a_frozen_neighbour_does_not_unfreeze() -> None:
    model = two_in_full()
    model.set_requires_grad("cats", False)
    model.delete_adapter("dogs")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_deleting_the_active_adapter_makes_another_one_active() -> None:
    model = two_in_full()
    model.set_adapter("dogs")
    expected = logits(model)
    model.set_adapter("cats")
    with pytest.warns(UserWarning, match="Setting active adapter to dogs"):
        model.delete_adapter("cats")
    assert model.active_adapters == ["dogs"]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert any(parameter.requires_grad for parameter in model.parameters())
    model.delete_adapter("dogs")
    assert model.active_adapters == []


@pytest.mark.parametrize("training", ["lora", "full"])
def test_unload_gives_back_the_components_of_the_base_model(training: str) -> None:
    base = tiny_model()
    before = copy.deepcopy(base.state_dict())
    model = moved(get_peft_model(base, config(training, candidates=("LN1", "MHA"), top_k=2)))
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}  # as stock LoRA leaves them


@pytest.mark.parametrize("second", ["MHA", "FC1"])
def test_a_batch_mixes_adapters_without_lora_layers(second: str) -> None:
    model = two_in_full(second)
    expected = {}
    for name in ("dogs", "cats"):
        model.set_adapter(name)
        expected[name] = logits(model)
    with model.disable_adapter():
        expected["__base__"] = logits(model)
    names = ["cats", "__base__", "dogs"] * 4
    with torch.no_grad():
        got = model(pixel_values=IMAGES, adapter_names=names).logits
    torch.testing.assert_close(got, torch.stack([expected[name][row] for row, name in enumerate(names)]))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"non-existing adapter.*birds"):
        model(pixel_values=IMAGES, adapter_names=["cats", "birds"] * 6)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(pixel_values=IMAGES, adapter_names=names)


def test_norms_in_a_mixed_batch_are_refused() -> None:
    model = get_peft_model(tiny_model(), config("full", candidates="LN2")).eval()
    with pytest.raises(TypeError, match="Mixed batching is only supported for"):
        model(pixel_values=IMAGES, adapter_names=["default", "__base__"] * 6)


# Saved adapters.


@pytest.mark.parametrize("options", [{"r": 512}, {"r": 512, "use_rslora": True}, {"rank_pattern": {"q_proj": 300}}])
def test_a_rank_far_above_the_width_loads(options: dict[str, Any], tmp_path: Path) -> None:
    model = moved(get_peft_model(tiny_model(), config(**options)), scale=0.01)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_adapter(tiny_model(), tmp_path)), logits(model))


def with_other_head(labels: int | None) -> nn.Module:
    """Returns the tiny model with a new head, or none."""
    model = tiny_model(num_labels=labels or 3)
    body = tiny_model().vit if labels else backbone()
    if labels:
        model.vit.load_state_dict(body.state_dict())
        return model
    body.load_state_dict({k.removeprefix("vit."): v for k, v in tiny_model().state_dict().items() if "vit." in k})
    return body


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("labels", [7, None])
def test_a_head_that_does_not_fit_is_left_out(labels: int | None, training: str, tmp_path: Path) -> None:
    model = moved(get_peft_model(tiny_model(), config(training)))
    model.save_pretrained(tmp_path)
    base = with_other_head(labels)
    head = {name: value.clone() for name, value in base.state_dict().items() if "classifier" in name}
    with pytest.raises(AdapterError):
        load_adapter(with_other_head(labels), tmp_path)
    with pytest.warns(UserWarning, match="classifier of .* does not fit this .* and was left out"):
        loaded = load_adapter(base, tmp_path, ignore_mismatched_sizes=True, is_trainable=True)
    with torch.no_grad():
        ours, theirs = (each.eval()(IMAGES, output_hidden_states=True).hidden_states[-1] for each in (loaded, model))
    torch.testing.assert_close(ours, theirs)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name for name in trained) is bool(labels)
    for name, value in head.items():
        torch.testing.assert_close(loaded.base_model.model.classifier.state_dict()[f"modules_to_save.default.{name[11:]}"],
                                   value)  # fmt: skip
    loaded.save_pretrained(tmp_path / "again")
    load_adapter(with_other_head(labels), tmp_path / "again")


def test_a_head_that_fits_is_kept(tmp_path: Path) -> None:
    model = moved(get_peft_model(tiny_model(), config()))
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path, ignore_mismatched_sizes=True)
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.fixture(scope="module")
def run_of_birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = get_peft_model(tiny_model(), config(), adapter_name="birds")
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=[{"pixel_values": image, "labels": 0} for image in IMAGES]).train()
    return folder


def test_a_checkpoint_of_an_adapter_of_any_name_is_whole(run_of_birds: Path) -> None:
    assert why_not_whole(run_of_birds / "checkpoint-2", also=["plasticity.json"]) == ""
    assert last_whole_checkpoint(run_of_birds) == run_of_birds / "checkpoint-2"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "plasticity.json"])
def test_a_named_adapter_that_is_damaged_is_not_whole(name: str, run_of_birds: Path, tmp_path: Path) -> None:
    shutil.copytree(run_of_birds / "checkpoint-2", tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / "birds" / name
    path.write_bytes(path.read_bytes()[:-9])
    assert name in why_not_whole(tmp_path / "checkpoint-2", also=["plasticity.json"])
    path.unlink()
    assert name in why_not_whole(tmp_path / "checkpoint-2", also=["plasticity.json"])
