"""What this package relies on in the private parts of other libraries, one test a reliance.

Only stock objects are used here, no PlasticityConfig, so that a failure is a change in the library that it names, and
the message says what of ours that breaks. A release that fails here is not supported until the file named is changed.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import PartialState, cpu_offload
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import LoraConfig, LoraModel, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from tests.support.models import REPOSITORY, logits, moved, tiny_model

PACKAGE = REPOSITORY / "plasticity_peft"


@contextmanager
def reliance(on: str, by: str, because: str = "") -> Iterator[None]:
    """Turns whatever goes wrong inside into one message: what was relied `on`, `by` what of ours, and why.

    Args:
        on: what is true of a library.
        by: the file that needs it, and what in it: "adapters/model.py: register". It must be there.
        because: what it is needed for.
    """
    for place in by.split("; "):
        file, _, names = place.partition(": ")
        defined = set(re.findall(r"^ *(?:def|class) (\w+)", (PACKAGE / file).read_text(), re.MULTILINE))
        missing = set(re.findall(r"\w+", names)) - defined
        assert not missing, f"{file} has no {missing}: this reliance is no longer one"
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        pytest.fail(f"No longer true: {on}.\nNeeded by: {by}, {because}\nFound: {type(error).__name__}: {error}")


class Watched:
    """Extends `inject_adapter` of LoRA's tuners as adapters/model.py does, and takes the targets only there.

    It notes which adapters are asked for, by which tuner, and how many adapter layers the model had by then.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str, int]] = []
        for tuner in (LoraModel, MixedModel):
            patch.setattr(tuner, "inject_adapter", self._noting(tuner.inject_adapter))

    def _noting(self, inject: Callable[..., None]) -> Callable[..., None]:
        def inject_adapter(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            self.calls.append((type(tuner).__name__, adapter_name, len(layers(model))))
            tuner.peft_config[adapter_name].target_modules = [linear(model)]
            inject(tuner, model, adapter_name, *args, **kwargs)

        return inject_adapter


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def linear(model: nn.Module) -> str:
    """Returns the path of one linear layer of a block, in any release of transformers and before or after LoRA."""
    found = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, BaseTunerLayer))]
    return next(name for name in found if ".1." in name)


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]


# The tables.


def test_the_table_of_configs_is_a_dictionary_that_peft_itself_looks_into() -> None:
    with reliance(
        "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING is one dict, shared by PEFT's own modules",
        "adapters/model.py: register; registration.py: _add_stand_in",
        "which add a key to it",
    ):
        assert type(PEFT_TYPE_TO_CONFIG_MAPPING) is dict
        for module in ("peft", "peft.mapping", "peft.peft_model"):
            assert importlib.import_module(module).PEFT_TYPE_TO_CONFIG_MAPPING is PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_method_outside_the_enum_can_only_be_registered_in_the_tables() -> None:
    with (
        reliance('PeftType("PLASTICITY") is no member', "adapters/model.py: register", "which need not with a member"),
        pytest.raises(ValueError, match="is not a valid PeftType"),
    ):
        PeftType("PLASTICITY")


def test_the_tuner_of_a_lora_config_is_lora_model_or_mixed_model() -> None:
    with reliance(
        "get_peft_model makes a LoraModel of a LoraConfig, or a MixedModel if mixed=True",
        "adapters/model.py: register",
    ):
        config = LoraConfig(target_modules=[linear(tiny_model())])
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel
        assert type(get_peft_model(tiny_model(), config).base_model) is LoraModel
        assert type(get_peft_model(tiny_model(), config, mixed=True).base_model) is MixedModel
        assert not issubclass(MixedModel, LoraModel)


def test_the_config_class_of_a_saved_adapter_is_looked_up_by_its_peft_type(tmp_path: Path) -> None:
    with reliance(
        'an adapter_config.json with peft_type "LORA" is read as a LoraConfig',
        "adapters/config.py: to_dict",
        "which writes LORA, so that adapters load where this package is not installed",
    ):
        LoraConfig(target_modules=["query"]).save_pretrained(tmp_path)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
        assert PeftType.LORA == "LORA"
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_class_of_the_peft_model_is_looked_up_by_task_type(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.auto

    class Special(PeftModel):
        def __init__(
            self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **kw: Any
        ) -> None:
            super().__init__(model, peft_config, adapter_name, **kw)

    with reliance(
        "get_peft_model looks up MODEL_TYPE_TO_PEFT_MODEL_MAPPING by task_type, and takes PeftModel without one",
        "adapters/model.py: register",
        "which enters a PeftModel of its own there",
    ):
        model = tiny_model()
        assert type(get_peft_model(model, LoraConfig(target_modules=[linear(model)]))) is PeftModel
        monkeypatch.setitem(peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, "SPECIAL", Special)
        config = LoraConfig(target_modules=[linear(tiny_model())])
        config.task_type = "SPECIAL"
        assert type(get_peft_model(tiny_model(), config)) is Special


# Injection.


@pytest.mark.parametrize("tuner", ["LoraModel", "MixedModel"])
def test_inject_adapter_runs_for_every_adapter_before_its_layers_are_made(tuner: str, watched: Watched) -> None:
    with reliance(
        "inject_adapter(model, adapter_name, ...), looked up on the class of the tuner, is called for the first "
        "adapter and for further ones, before any module is replaced, and reads peft_config[adapter_name] only then",
        "adapters/model.py: choosing_first",
        "which measures and sets target_modules there",
    ):
        model = get_peft_model(tiny_model(), LoraConfig(), "first", mixed=tuner == "MixedModel")
        model.add_adapter("second", LoraConfig())
        assert watched.calls == [(tuner, "first", 0), (tuner, "second", 1)]
        assert len(layers(model)) == 1
        assert set(layers(model)[0].lora_A) == {"first", "second"}


def test_transformers_add_adapter_asks_the_same_tuner(watched: Watched) -> None:
    with reliance(
        "PreTrainedModel.add_adapter calls LoraModel.inject_adapter",
        "adapters/model.py: choosing_first",
        "for model.add_adapter(PlasticityConfig(...))",
    ):
        model = tiny_model()
        model.add_adapter(LoraConfig(), "first")
        with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
            model.add_adapter(LoraConfig(), "second")
        assert watched.calls == [("LoraModel", "first", 0), ("LoraModel", "second", 1)]


def test_an_error_while_injecting_leaves_no_adapter_behind(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    with reliance(
        "an adapter whose injection raises is forgotten by PeftModel.add_adapter",
        "adapters/model.py: choosing_first",
        "as bad input leaves the model as it was",
    ):
        model = get_peft_model(tiny_model(), LoraConfig(), "first")
        monkeypatch.setattr(LoraModel, "inject_adapter", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.add_adapter("second", LoraConfig())
        assert list(model.peft_config) == ["first"]


def test_transformers_marks_the_model_before_it_asks_the_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    with reliance(
        "add_adapter sets the instance attribute _hf_peft_config_loaded first, over a class attribute that is False",
        "adapters/model.py: _unmarked_on_failure, choosing_first, _add_switch",
        "which take the mark away if choosing fails, and know by it that transformers' own methods will be used",
    ):
        model = tiny_model()
        assert model._hf_peft_config_loaded is False
        assert "_hf_peft_config_loaded" not in vars(model)
        seen = []
        inject = LoraModel.inject_adapter
        monkeypatch.setattr(
            LoraModel,
            "inject_adapter",
            lambda self, model, *rest, **kw: (seen.append(vars(model).copy()), inject(self, model, *rest, **kw))[1],
        )
        model.add_adapter(LoraConfig(target_modules=[linear(model)]))
        assert seen[0]["_hf_peft_config_loaded"] is True
        assert "peft_config" not in seen[0]
        assert hasattr(model, "peft_config")


def test_dummy_target_modules_means_no_target(tmp_path: Path) -> None:
    with reliance(
        f"target_modules={DUMMY_TARGET_MODULES!r} adapts no module, and is saved as it is",
        "adapters/model.py: lora_arguments",
        "as full mode has only modules_to_save",
    ):
        assert DUMMY_TARGET_MODULES == "dummy-target-modules"  # it stands in adapters that were published
        model = tiny_model()
        chosen = norms(model)[0]
        adapted = get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=[chosen]))
        assert not layers(adapted)
        trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
        assert trained == {f"base_model.model.{chosen}.modules_to_save.default.{n}" for n in ("weight", "bias")}
        adapted.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == DUMMY_TARGET_MODULES
    with (
        reliance(
            "target_modules=[] is refused", "adapters/model.py: lora_arguments", "which therefore uses the constant"
        ),
        pytest.raises(ValueError, match="target_modules"),
    ):
        get_peft_model(tiny_model(), LoraConfig(target_modules=[]))


class Twins(nn.Module):
    """Modules whose paths end alike, by a dot and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.ab = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"b": nn.Linear(2, 2)})


def test_targets_match_at_a_dot_and_modules_to_save_match_any_end() -> None:
    needed = ("adapters/preconditions.py: check_only_chosen_match", "which refuses what PEFT would widen")
    with reliance("target_modules match a path that is the name, or ends in a dot and the name", *needed):
        adapted = get_peft_model(Twins(), LoraConfig(target_modules=["b"]))
        found = {name for name, m in adapted.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
        assert found == {"b", "inner.b"}
    with reliance("modules_to_save match every path that ends in the name", *needed):
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=["b"])
        adapted = get_peft_model(Twins(), config)
        wrapped = [
            name for name, m in adapted.base_model.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)
        ]
        assert wrapped == ["ab", "b", "inner.b"]


# Switching.


def both(model: PreTrainedModel) -> PeftModel:
    """Returns the model with LoRA on one layer, and a norm trained in full."""
    config = LoraConfig(target_modules=[linear(model)], modules_to_save=[norms(model)[0]], init_lora_weights=False)
    return moved(get_peft_model(model, config)).eval()


def test_one_flag_hides_an_adapter_and_touches_no_gradient() -> None:
    with reliance(
        "layer._disable_adapters = True makes LoRA layers and modules_to_save compute what the base model does, "
        "without touching requires_grad",
        "adapters/model.py: _adapters_hidden",
        "inside which a further adapter is measured",
    ):
        expected = logits(tiny_model())
        model = both(tiny_model())
        switches = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        assert len(switches) == 2
        assert [layer._disable_adapters for layer in switches] == [False, False]
        assert not torch.allclose(logits(model), expected)
        gradients = {name: p.requires_grad for name, p in model.named_parameters()}
        for layer in switches:
            layer._disable_adapters = True
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients


def test_a_merged_layer_says_so() -> None:
    with reliance(
        "BaseTunerLayer.merged tells whether an adapter is in the weights", "adapters/model.py: _adapters_hidden"
    ):
        model = both(tiny_model())
        assert [layer.merged for layer in layers(model)] == [False]
        model.merge_adapter()
        assert [layer.merged for layer in layers(model)] == [True]


def test_every_module_that_trains_in_full_is_an_auxiliary_wrapper() -> None:
    with reliance(
        "modules_to_save become AuxiliaryTrainingWrapper with enable_adapters(), and keep the original",
        "adapters/preconditions.py: check_not_in_other_mode; "
        "adapters/model.py: _adapters_hidden, _ModulesToSaveSwitch",
    ):
        model = both(tiny_model())
        (wrapper,) = (m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))
        assert list(wrapper.modules_to_save) == ["default"]
        assert isinstance(wrapper.original_module, nn.LayerNorm)
        wrapper.enable_adapters(False)
        assert wrapper._disable_adapters
        wrapper.enable_adapters(True)
        assert not wrapper._disable_adapters


def test_a_wrapper_has_the_seams_that_let_its_original_wait() -> None:
    with reliance(
        "ModulesToSaveWrapper computes with the original if adapters are disabled, or an active name is not in "
        "_adapters, by _forward_wrapped_passthrough; mixes by _mixed_batch_forward; and copies in update()",
        "adapters/originals.py: _original_computes, _forward_wrapped_passthrough, _mixed_batch_forward, update",
        "which brings the original to the device before it computes or is copied",
    ):
        (wrapper,) = (m for m in both(tiny_model()).modules() if type(m) is ModulesToSaveWrapper)
        called = []
        wrapper._forward_wrapped_passthrough = lambda *_: called.append("original")
        wrapper._mixed_batch_forward = lambda *_, adapter_names: called.append(adapter_names)
        states = torch.rand(2, 3, 16)
        wrapper(states)
        assert not called
        wrapper(states, adapter_names=["__base__", "default"])
        wrapper.enable_adapters(False)
        wrapper(states)
        wrapper.enable_adapters(True)
        wrapper._adapters.clear()
        wrapper(states)
        assert called == [["__base__", "default"], "original", "original"]
        wrapper.update("two")
        assert wrapper._get_available_adapters() == {"default", "two"}
    with reliance(
        "a module moves by _apply, and is saved and loaded by _save_to_state_dict and _load_from_state_dict, after "
        "which its children follow, and then its post hooks",
        "adapters/originals.py: _apply, _save_to_state_dict, _load_from_state_dict, _settle_after_loading",
        "which handle an original that is no child of its wrapper",
    ):
        order = []

        class Watched(nn.Module):
            def __init__(self, name: str, *children: nn.Module) -> None:
                super().__init__()
                self.name, self.inner = name, nn.ModuleList(children)
                self.register_load_state_dict_post_hook(lambda *_: order.append(f"loaded {name}"))

            def _apply(self, *args: Any) -> nn.Module:
                order.append(f"moved {self.name}")
                return super()._apply(*args)

            def _save_to_state_dict(self, *args: Any) -> None:
                order.append(f"saved {self.name}")
                super()._save_to_state_dict(*args)

            def _load_from_state_dict(self, *args: Any) -> None:
                order.append(f"loading {self.name}")
                super()._load_from_state_dict(*args)

        model = Watched("outer", Watched("inner"))
        model.load_state_dict(model.to("cpu").state_dict())
        assert order == [
            *("moved outer", "moved inner", "saved outer", "saved inner"),
            *("loading outer", "loading inner", "loaded inner", "loaded outer"),
        ]


def test_an_adapter_layer_needs_no_more_than_our_switch_has() -> None:
    class Switch(nn.Module, BaseTunerLayer):
        adapter_layer_names = ()

        def __init__(self) -> None:
            super().__init__()
            self._active_adapter = ["default"]
            self.merged_adapters = []

    with reliance(
        "a BaseTunerLayer is enabled, set, merged, listed and deleted by _active_adapter, merged_adapters and "
        "adapter_layer_names alone",
        "adapters/model.py: _ModulesToSaveSwitch",
    ):
        model = tiny_model()
        model.add_adapter(LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=[norms(model)[0]]))
        model.add_module("switch", Switch())
        model.set_adapter("default")
        model.disable_adapters()
        model.enable_adapters()
        assert model.active_adapters() == ["default"]
        assert model.switch.merged is False


def test_transformers_asks_the_first_adapter_layer_and_enables_adapter_layers_only() -> None:
    with reliance(
        "transformers' enable_adapters leaves modules_to_save off, and active_adapters needs an adapter layer",
        "adapters/model.py: _ModulesToSaveSwitch",
        "which is superfluous once transformers does both",
    ):
        model = tiny_model()
        model.add_adapter(LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=[norms(model)[0]]))
        (wrapper,) = (m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))
        model.disable_adapters()
        model.enable_adapters()
        assert wrapper._disable_adapters
        with pytest.raises(UnboundLocalError):
            model.active_adapters()


# Saving.


def test_a_config_is_saved_from_what_to_dict_returns(tmp_path: Path) -> None:
    class Wordy(LoraConfig):
        def to_dict(self) -> dict[str, Any]:
            return {"peft_type": "LORA", "r": 3}

    with reliance(
        "PeftConfig.save_pretrained writes what to_dict() returns to adapter_config.json, and PeftConfig.to_dict is "
        "dataclasses.asdict",
        "adapters/config.py: PlasticityConfig, to_dict",
        "which leaves out what stock PEFT does not know",
    ):
        Wordy(target_modules=["query"]).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text()) == {"peft_type": "LORA", "r": 3}
        assert set(LoraConfig().to_dict()) >= {"target_modules", "modules_to_save", "r", "peft_type", "task_type"}


def test_an_adapter_is_saved_card_first_config_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (order.append(name), function(*args, **kwargs))[1]

    with reliance(
        "PeftModel.save_pretrained calls create_or_update_model_card, then writes the weights, then calls "
        "peft_config.save_pretrained(folder, auto_mapping_dict=...)",
        "adapters/config.py: PlasticityConfig, save_pretrained",
        "which writes plasticity.json when all else is there",
    ):
        model = both(tiny_model())
        for owner, name in ((PeftModel, "create_or_update_model_card"), (LoraConfig, "save_pretrained")):
            monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
        module = __import__("peft.peft_model").peft_model
        monkeypatch.setattr(module, "safe_save_file", noted("weights", module.safe_save_file))
        model.save_pretrained(tmp_path)
        assert order == ["create_or_update_model_card", "weights", "save_pretrained"]
        assert {path.name for path in tmp_path.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }


def test_pushing_puts_another_card_in_the_folder_and_then_uploads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class UploadError(Exception):
        """In the place of the upload."""

    def upload(self: PeftModel, working_dir: str, *_: Any, **__: Any) -> None:
        seen.append(Path(working_dir, "README.md").read_text())
        assert Path(working_dir, "adapter_model.safetensors").exists()
        raise UploadError

    with reliance(
        "PeftModel.push_to_hub saves into a folder, puts the card of the repository there, and calls "
        "_upload_modified_files(folder, ...)",
        "adapters/peft_model.py: PlasticityPeftModel, _upload_modified_files",
        "which writes our card again",
    ):
        hub = transformers.utils.hub
        made = SimpleNamespace(repo_id="user/repo", __str__=lambda: "user/repo")
        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: made)
        monkeypatch.setattr(hub, "create_repo", lambda *_, **__: made, raising=False)
        monkeypatch.setattr(
            hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\ntags: []\n---\nthe card of the Hub")
        )
        monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
        with pytest.raises(UploadError):
            get_peft_model(tiny_model(), LoraConfig(target_modules=[linear(tiny_model())])).push_to_hub("user/repo")
        assert ["the card of the Hub" in text for text in seen] == [True]


def test_the_card_is_made_from_the_folder_alone() -> None:
    with reliance(
        "create_or_update_model_card takes the folder alone", "adapters/peft_model.py: create_or_update_model_card"
    ):
        assert list(inspect.signature(PeftModel.create_or_update_model_card).parameters) == ["self", "output_dir"]


def test_names_of_weights_in_a_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with reliance(
        "weights are saved as base_model.model.<path>.lora_A.weight, .lora_B.weight, and <path>.<weight> for "
        "modules_to_save",
        "saved/layers.py: read_layers, write_layers",
    ):
        model = tiny_model()
        path, norm = linear(model), norms(model)[0]
        both(model).save_pretrained(tmp_path)
        names = {f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{norm}.weight", f"{norm}.bias"}
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.{n}" for n in names}


# accelerate, huggingface_hub, transformers.


def test_partial_state_shows_whether_it_was_made() -> None:
    with reliance(
        "PartialState._shared_state is empty until a PartialState is made, and _reset_state empties it",
        "measuring/processes.py: this_process",
        "which sets up nothing of Accelerate where there is one process",
    ):
        PartialState._reset_state()
        assert not PartialState._shared_state
        PartialState(cpu=True)
        assert PartialState._shared_state
        PartialState._reset_state()
        assert not PartialState._shared_state


def test_hooks_of_offloaded_weights() -> None:
    with reliance(
        "cpu_offload puts a hook with execution_device and offload in module._hf_hook",
        "components/offloading.py: execution_device, offloaded",
    ):
        model = cpu_offload(nn.Sequential(nn.Linear(2, 2)), torch.device("cpu"))
        hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
        inner = [getattr(hook, "hooks", [hook])[-1] for hook in hooks]
        assert any(getattr(hook, "offload", False) for hook in [*hooks, *inner])
        assert any(getattr(hook, "execution_device", None) == torch.device("cpu") for hook in [*hooks, *inner])
        assert model[0].weight.device.type == "meta"


def test_only_a_lack_of_memory_halves_a_batch() -> None:
    with reliance(
        "accelerate.utils.memory.should_reduce_batch_size tells errors of memory from others",
        "components/calls.py: run; measuring/passes.py: tried",
        "which pass the first on, and halve the batch",
    ):
        assert should_reduce_batch_size(torch.OutOfMemoryError("CUDA out of memory."))
        assert should_reduce_batch_size(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        assert not should_reduce_batch_size(RuntimeError("shapes do not fit"))
        assert not should_reduce_batch_size(ValueError("out of memory"))


def test_progress_bars_are_switched_in_one_place() -> None:
    with reliance(
        "are_progress_bars_disabled follows disable_progress_bars",
        "measuring/rounds.py: Progress",
        "which shows a bar",
    ):
        before = are_progress_bars_disabled()
        try:
            disable_progress_bars()
            assert are_progress_bars_disabled()
            enable_progress_bars()
            assert not are_progress_bars_disabled()
        finally:
            (disable_progress_bars if before else enable_progress_bars)()


def test_a_logger_below_transformers_has_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    with reliance(
        'get_logger("transformers.x") follows transformers.logging.set_verbosity',
        "measuring/measure.py: _log",
        "whose logger it is",
    ):
        before = logging.get_verbosity()
        try:
            logging.set_verbosity_error()
            assert logging.get_logger("transformers.plasticity").getEffectiveLevel() == logging.ERROR
        finally:
            logging.set_verbosity(before)


def test_the_backbone_of_a_model_is_named_by_its_prefix() -> None:
    with reliance(
        "base_model_prefix names the child that holds the blocks",
        "components/architecture.py: find_architecture",
        "which finds heads",
    ):
        model = tiny_model("vit")
        assert model.base_model_prefix == "vit"
        assert getattr(model, model.base_model_prefix) is model.base_model
