"""The connection with PEFT: registration, and the step from scores to adapted modules.

Only this file, `peft_model.py` and `originals.py` use internals of PEFT. This file relies on the following:

- the table of configs, which maps a `peft_type` to its class, takes a new key (`register_peft_method` takes only
  members of the closed enum `PeftType`);
- `inject_adapter` of the tuner runs for the first adapter and for every further one, before any module is replaced.
  `LoraModel` and `MixedModel` are the two tuners that take a LoRA config. Their `inject_adapter` is extended: the
  components of a `PlasticityConfig` are selected first. So a PlasticityConfig works everywhere that a `LoraConfig`
  works, and the adapted model contains only LoRA;
- adapters are switched off by a flag on each layer, which hides them without touching `requires_grad`;
- `get_peft_model` looks up the class of the adapted model by `task_type`, in a table that takes a new key. Without a
  `task_type`, `PeftModel.from_pretrained` uses the class on which it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from peft import LoraModel, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import logging

from plasticity_peft.adapters.chosen import labels_of
from plasticity_peft.adapters.config import CHOOSERS, PlasticityConfig
from plasticity_peft.adapters.originals import keep_originals_away
from plasticity_peft.adapters.peft_model import PlasticityPeftModel
from plasticity_peft.adapters.preconditions import (
    check_labels,
    check_loadable,
    check_lora_takes_part,
    check_not_in_other_mode,
    check_not_wrapped,
    check_only_chosen_match,
    check_switchable,
    check_trainable,
)
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
from plasticity_peft.components.sharding import whole
from plasticity_peft.components.wrappers import originals_in_place
from plasticity_peft.errors import ConfigError, ModelError, SelectionError
from plasticity_peft.measuring.head import fitted_head
from plasticity_peft.measuring.measure import measure_by
from plasticity_peft.registration import PEFT_TYPE
from plasticity_peft.report.head import HeadFit
from plasticity_peft.report.report import PlasticityReport

# Below the logger of transformers, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

NO_TARGET_MODULES: str = DUMMY_TARGET_MODULES
"""Value of `target_modules` for an adapter without any LoRA layer."""


def register() -> None:
    """Adds the config and the adapted model to PEFT's tables, and extends the tuners to select components."""
    CHOOSERS.append(choose_components)
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = PlasticityConfig  # type: ignore[index]
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING[PEFT_TYPE] = PlasticityPeftModel
    for tuner in (LoraModel, MixedModel):
        tuner.inject_adapter = choosing_first(tuner.inject_adapter)  # type: ignore[method-assign]


def choosing_first(inject: Callable[..., None]) -> Callable[..., None]:
    """Returns the `inject_adapter` of a tuner, extended so that it selects the components of a PlasticityConfig first.

    For other configs, nothing changes. If selecting or injecting fails, the model is restored.
    """

    @wraps(inject)
    def inject_adapter(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = tuner.peft_config[adapter_name]
        if isinstance(config, PlasticityConfig):
            with _unmarked_on_failure(model), originals_in_place(model):
                choose_components(tuner.model, config)
                if getattr(model, "_hf_peft_config_loaded", False):
                    check_switchable(model, config.modules_to_save or ())
                with restored_on_failure(model):
                    inject(tuner, model, adapter_name, *args, **kwargs)
                    _add_switch(model, adapter_name)
                    _finish(tuner, adapter_name, config)
                    keep_originals_away(model)
        else:
            inject(tuner, model, adapter_name, *args, **kwargs)

    return inject_adapter


@contextmanager
def _unmarked_on_failure(model: nn.Module) -> Iterator[None]:
    """Inside, an exception removes the mark that transformers' `add_adapter` sets on a model before it calls PEFT."""
    try:
        yield
    except BaseException:
        if not hasattr(model, "peft_config"):
            vars(model).pop("_hf_peft_config_loaded", None)
        raise


def _finish(tuner: BaseTuner, adapter_name: str, config: PlasticityConfig) -> None:
    """Changes the config of an injected adapter so that PEFT saves it as a LoRA config."""
    # PEFT saves the class of the base model in adapter_config.json only if the task type is None.
    config.task_type = None if config.task_type == PEFT_TYPE else config.task_type
    if not _trains_what_was_chosen(tuner.model, adapter_name, config):
        tuner.peft_config[adapter_name] = config.to_lora()


def choose_components(model: nn.Module, config: PlasticityConfig) -> PlasticityConfig:
    """Returns `config` after it has selected components of `model`; see `PlasticityConfig.choose`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if config.chosen is None:
        config.check_modules_are_not_named()
        check_not_wrapped(base)
        with whole(base):
            _choose(base, config)
    config.check_is_for(base)
    return config


def _trains_what_was_chosen(model: nn.Module, adapter_name: str, config: PlasticityConfig) -> bool:
    """Returns whether the LoRA layers of an adapter are those that were selected.

    An adapter that `add_weighted_adapter` makes of several adapters has the layers of all of them.
    """
    assert config.chosen is not None
    layers = {
        path.replace(".base_layer", "")  # adapters of several types on one module wrap each other
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    return layers == set(config.chosen.linears)


_SWITCH = "modules_to_save_switch"


def _add_switch(model: nn.Module, adapter_name: str) -> None:
    """Adds the switch below to a model that uses transformers' own adapter methods."""
    if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, _SWITCH):
        model.add_module(_SWITCH, _ModulesToSaveSwitch(model, adapter_name))


class _ModulesToSaveSwitch(nn.Module, BaseTunerLayer):
    """Makes transformers' own adapter methods work on modules that train in full. It has no weights.

    transformers, unlike a PeftModel, reads the active adapter from the first adapter layer, and enables only adapter
    layers. With `modules_to_save` alone, it could not save an adapter, or enable it again after disabling.
    """

    adapter_layer_names = ()

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that the model does not become its own child
        self._active_adapter = [adapter_name]
        self._disable_adapters = False
        self.merged_adapters = []

    def enable_adapters(self, enabled: bool) -> None:
        """Enables or disables all modules that train in full."""
        for module in self._model[0].modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled)


def _choose(model: nn.Module, config: PlasticityConfig) -> None:
    """Measures the model, or uses the given report, and turns `config` into the LoRA config of the selection."""
    architecture = find_architecture(model, config.backbone)
    check_has_head(model, architecture, config.modules_to_save)
    heads = heads_that_train(model, architecture.heads)
    named = named_by_the_user(model, config.modules_to_save, config.task_type)
    check_trainable(model, architecture, config, heads)
    check_loadable(model, architecture, config)
    labels = _labels(model, architecture) if heads else None
    report = config.load_report()
    if report is not None:
        report.check_matches(architecture.model_type, architecture.components)
    config.rule.check_possible(architecture.components, architecture.parameters)
    with _head_fitted(model, config) as head_fit:
        if report is None:
            report = _measure(model, config)
            with _keeping(report):
                selection = config.select(report)
        else:
            selection = config.select(report)
        training = Training(*_split(architecture.components, selection.components, config.training), heads, named)
        check_lora_takes_part(model, architecture, training.linears)
        names = _lora_names(model, training, config.modules_to_save)
        config.resolve(model, report, selection, **names, id2label=labels, head_fit=head_fit)
    report_what_trains(model, architecture, training, selection.units)


@contextmanager
def _keeping(report: PlasticityReport) -> Iterator[None]:
    """Inside, an error of selecting says where the report is that was just measured."""
    try:
        yield
    except SelectionError as error:
        kept = SelectionError(
            f"{error} Nothing needs to be measured again: the attribute `report` of this error is the report, and "
            "PlasticityConfig(report=error.report, ...) selects from it."
        )
        kept.report = report
        raise kept from error


@contextmanager
def _head_fitted(model: nn.Module, config: PlasticityConfig) -> Iterator[HeadFit | None]:
    """Inside, and after it, the head is fitted if the config asks for it. An exception inside takes that back."""
    if not config.fit_head:
        yield None
        return
    if config.target_data is None:
        raise ConfigError("fit_head=True needs labeled images: give them as target_data. Got None.")
    with _adapters_hidden(model):
        fitted = fitted_head(
            model,
            config.target_data,
            batch_size=config.batch_size,
            seed=config.seed,
            dtype=config.dtype,
            backbone=config.backbone,
            forward_kwargs=config.forward_kwargs,
        )
    with fitted.kept():
        logger.info("%s", fitted.found)
        yield fitted.found


def _lora_names(model: nn.Module, training: Training, given: Iterable[str] | None) -> dict[str, Any]:
    """Returns the `target_modules` and `modules_to_save` by which PEFT finds exactly the modules that train."""
    check_named_are_not_chosen(training)
    check_not_in_other_mode(model, training.linears, training.others)
    names = names_to_save(model, training, given)
    check_only_chosen_match(model, training.linears, [name for name in names if name not in (given or ())])
    return {"target_modules": list(training.linears) or NO_TARGET_MODULES, "modules_to_save": names or None}


def _labels(model: nn.Module, architecture: Architecture) -> dict[int, str] | None:
    """Returns the names of the labels, from the config of the model or of the outermost part that has one."""
    names = architecture.backbone.split(".") if architecture.backbone else []
    paths = (".".join(names[:depth]) for depth in range(len(names) + 1))
    found = (labels_of(model.get_submodule(path)) for path in (*paths, architecture.entry))
    labels = next((labels for labels in found if labels is not None), None)
    check_labels(labels)
    return labels


def _measure(model: nn.Module, config: PlasticityConfig) -> PlasticityReport:
    with _adapters_hidden(model):
        return measure_by(config.rule, config.settings, model, config.target_data, config.source_data)


def lora_arguments(
    components: Iterable[Component], chosen: Iterable[str], training: str, *, heads: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the `target_modules` and `modules_to_save` of the LoRA config that trains the selected components.

    Args:
        components: all components, with the module paths of the model to train.
        chosen: canonical ids of the selected components.
        training: "lora" or "full".
        heads: paths of further modules that train in full.
    """
    linears, others = _split(components, chosen, training)
    modules_to_save = list(dict.fromkeys([*others, *heads]))
    return {"target_modules": list(linears) or NO_TARGET_MODULES, "modules_to_save": modules_to_save or None}


def merged_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of the base model with the active adapters merged, so that it computes what `model` does.

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
    """Returns the paths of the selected modules: those that get LoRA, and those that train in full."""
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
    """Inside, the model computes what its base model does. `requires_grad` does not change."""
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in layers):
        raise ModelError("An adapter is merged into the model. Call unmerge_adapter() before adding another.")
    before = [layer._disable_adapters for layer in layers]

    def put_back() -> None:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled

    with originals_in_place(model):
        try:
            try:
                for layer in layers:
                    layer._disable_adapters = True
                yield
            finally:
                put_back()
        finally:
            put_back()  # an interrupt may have cut the first one short
