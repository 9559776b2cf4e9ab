"""The seam with PEFT: registration, and the step from scores to adapted modules.

The only file that touches private parts of PEFT. What it relies on:

- the three tables that map a `peft_type` to its config, tuner and prefix take a new key (`register_peft_method` takes
  only members of the closed enum `PeftType`);
- `inject_adapter` runs for the first adapter and for every further one, before any module is replaced;
- adapters are switched off by a flag on each layer, which hides them without touching `requires_grad`;
- a PeftModel, and transformers' `add_adapter`, call the tuner through the tables;
- `get_peft_model` looks up the class of the adapted model by `task_type`, in a table that takes a new key, and
  `PeftModel.from_pretrained` takes the class that it is called on where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraModel, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from plasticity_peft.adapters.config import PEFT_TYPE, PlasticityConfig
from plasticity_peft.adapters.peft_model import PlasticityPeftModel
from plasticity_peft.adapters.preconditions import (
    check_not_in_other_mode,
    check_not_wrapped,
    check_only_chosen_match,
    check_switchable,
    check_trainable,
)
from plasticity_peft.adapters.reuse import checksums, given_modules, remember, report_at_hand
from plasticity_peft.adapters.rollback import restored_on_failure
from plasticity_peft.adapters.what_trains import (
    Training,
    check_has_head,
    check_named_are_not_chosen,
    heads_that_train,
    named_by_the_user,
    names_to_save,
    report_what_trains,
)
from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.component import Component
from plasticity_peft.errors import ModelError
from plasticity_peft.measuring.measure import measure_by
from plasticity_peft.report.report import PlasticityReport

NO_TARGET_MODULES: str = DUMMY_TARGET_MODULES
"""Value of `target_modules` for an adapter without any LoRA layer."""


class PlasticityModel(LoraModel):
    """LoRA on the components that a `PlasticityConfig` chooses; made by `peft.get_peft_model`, not by hand.

    In full mode there is no LoRA layer at all: the chosen modules are trained copies in PEFT's `modules_to_save`, and
    the originals stay for `disable_adapter`.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Chooses the components where the adapter's config has not yet, then injects as LoRA does."""
        config = self.peft_config[adapter_name]
        try:
            if isinstance(config, PlasticityConfig) and config.peft_type == PEFT_TYPE:
                config = self.peft_config[adapter_name] = _choose(model, config)
            if getattr(model, "_hf_peft_config_loaded", False):
                check_switchable(model, getattr(config, "modules_to_save", None) or ())
            with restored_on_failure(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, _SWITCH):
                    model.add_module(_SWITCH, _ModulesToSaveSwitch(model, adapter_name))
        except BaseException:
            # transformers' add_adapter marks the model as adapted before it asks us.
            if not hasattr(model, "peft_config"):
                vars(model).pop("_hf_peft_config_loaded", None)
            raise


_SWITCH = "modules_to_save_switch"


class _ModulesToSaveSwitch(nn.Module, BaseTunerLayer):
    """Lets transformers' own adapter methods reach modules that train in full. It has no weights and computes nothing.

    transformers, unlike a PeftModel, asks the first adapter layer for the active adapter, and enables adapter layers
    only: with nothing but `modules_to_save` it could not save, and after disabling it could not enable them again.
    """

    adapter_layer_names = ()

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that the model does not become its own child
        self._active_adapter = [adapter_name]
        self._disable_adapters = False
        self.merged_adapters = []

    def enable_adapters(self, enabled: bool) -> None:
        """Enables or disables all that trains in full."""
        for module in self._model[0].modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled)


def _choose(model: nn.Module, config: PlasticityConfig) -> PlasticityConfig:
    """Measures the model or takes the given report, selects, and returns the LoRA config of the choice.

    `config` shows what was chosen, too, and remains a config that chooses.
    """
    check_not_wrapped(model)
    architecture = find_architecture(model, config.backbone)
    given = given_modules(config)
    check_has_head(model, architecture, given)
    heads = heads_that_train(model, architecture.heads)
    named = named_by_the_user(model, given, config.task_type)
    check_trainable(model, architecture, config, heads)
    report, settings = report_at_hand(model, architecture, config), None
    if report is None:
        report, settings = _measure(model, config), config.settings
    else:
        report.check_matches(architecture.model_type, architecture.components)
    selection = config.select(report)
    training = Training(*_split(architecture.components, selection.components, config.training), heads, named)
    chosen = copy.copy(config)
    chosen.resolve(
        report, selection, **_lora_names(model, training, given), id2label=_labels(model, architecture, heads)
    )
    weights = () if settings is None else checksums(model, architecture)
    remember(config, chosen, settings, weights, given)
    report_what_trains(model, architecture, training, selection.units)
    return chosen


def _lora_names(model: nn.Module, training: Training, given: Iterable[str] | None) -> dict[str, Any]:
    """Returns the `target_modules` and `modules_to_save` by which PEFT finds what trains, and nothing else."""
    check_named_are_not_chosen(training)
    check_not_in_other_mode(model, training.linears, training.others)
    names = names_to_save(model, training, given)
    check_only_chosen_match(model, training.linears, [name for name in names if name not in (given or ())])
    return {"target_modules": list(training.linears) or NO_TARGET_MODULES, "modules_to_save": names or None}


def _labels(model: nn.Module, architecture: Architecture, heads: Iterable[str]) -> dict[int, str] | None:
    """Returns the names of the labels, from the config of the model or of the part of it that is run."""
    if not heads:
        return None
    configs = (getattr(model.get_submodule(path), "config", None) for path in ("", architecture.entry))
    return next((config.id2label for config in configs if hasattr(config, "id2label")), None)


def _measure(model: nn.Module, config: PlasticityConfig) -> PlasticityReport:
    with _adapters_hidden(model):
        return measure_by(config.rule, config.settings, model, config.target_data, config.source_data)


def lora_arguments(
    components: Iterable[Component], chosen: Iterable[str], training: str, *, heads: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the `target_modules` and `modules_to_save` of the LoRA config that trains the chosen components.

    Args:
        components: all components, with the module paths of the model that is to train.
        chosen: canonical ids of those that train.
        training: "lora" or "full".
        heads: paths of what trains in full beside them.
    """
    linears, others = _split(components, chosen, training)
    modules_to_save = list(dict.fromkeys([*others, *heads]))
    return {"target_modules": list(linears) or NO_TARGET_MODULES, "modules_to_save": modules_to_save or None}


def merged_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of the base model that computes what `model` does: what its active adapters train is in it.

    The copy has the module paths of the base model, and shares no memory with `model`.
    """
    copied = copy.deepcopy(model)
    if isinstance(copied, PeftModel):
        merged: nn.Module = copied.merge_and_unload()
        return merged
    for path, module in list(copied.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            copied.set_submodule(path, module.unload_and_optionally_merge_module(True, False, None))
        elif isinstance(module, BaseTunerLayer) and path and not isinstance(module, _ModulesToSaveSwitch):
            module.merge()
            copied.set_submodule(path, module.get_base_layer())
    return copied


def _split(
    components: Iterable[Component], chosen: Iterable[str], training: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the paths of the chosen modules: those that take LoRA, and those that train in full."""
    linears: list[str] = []
    others: list[str] = []
    chosen = set(chosen)
    for component in components:
        if component.id in chosen:
            lora = training == "lora" and component.features
            (linears if lora else others).extend(component.modules)
    return tuple(linears), tuple(others)


@contextmanager
def _adapters_hidden(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base model does; no flag of a parameter changes."""
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in layers):
        raise ModelError("An adapter is merged into the model. Call unmerge_adapter() before adding another.")
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = PlasticityConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = PlasticityModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = LoraModel.prefix  # type: ignore[index]
MODEL_TYPE_TO_PEFT_MODEL_MAPPING[PEFT_TYPE] = PlasticityPeftModel
