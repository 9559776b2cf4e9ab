"""Checks before an adapter is injected."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from plasticity_peft.adapters.config import PlasticityConfig
from plasticity_peft.checks import shown
from plasticity_peft.components.architecture import Architecture, weights_of
from plasticity_peft.components.calls import uncalled_projections
from plasticity_peft.components.component import KINDS
from plasticity_peft.components.quantized import check_not_packed, holds_plain_weights
from plasticity_peft.components.wrappers import COMPILED, walk
from plasticity_peft.errors import ConfigError, ModelError
from plasticity_peft.images.blank import blank_image
from plasticity_peft.measuring.left_as_found import run_left_as_found
from plasticity_peft.saved.layers import PREFIX

WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel(get_peft_model(model, config))",
    "FullyShardedDataParallel": "FullyShardedDataParallel(get_peft_model(model, config), ...)",
    "DeepSpeedEngine": "deepspeed.initialize(model=get_peft_model(model, config), ...)",
}
"""Wrappers around models that train in several processes, by name, and the right order."""
WITH_REPORT = (
    "To adapt a fresh model by what this one would be measured as: PlasticityConfig(report=measure_plasticity(...))."
)


def check_not_wrapped(model: nn.Module) -> None:
    """Raises ModelError if a module was compiled, or wrapped for several processes. Both must happen after adapting.

    Measuring works through such wrappers. Adapting does not: they have already recorded the parameters that they
    synchronize or spread, and a compiled module adds its name to every path of the adapter.
    """
    for path, module in model.named_modules():
        name = path or "the model"
        if COMPILED in module._modules:
            raise ModelError(
                f"Adapt a model before it is compiled: torch.compile(get_peft_model(model, config)). Compiled: {name}."
            )
        wrapper = next((wrapper for wrapper in WRAPPERS if wrapper in map(_name, type(module).__mro__)), None)
        if wrapper is not None:
            raise ModelError(
                f"Adapt a model before it is wrapped: {WRAPPERS[wrapper]}. It synchronizes only the parameters that "
                f"exist when it is created. {WITH_REPORT} Wrapped: {name}."
            )
    for path, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ModelError(
                f"{path} is spread over processes (DTensor). Adapt a model before fully_shard or parallelize_module, "
                f"which spread only the parameters that exist then. {WITH_REPORT}"
            )


def _name(kind: type) -> str:
    return kind.__name__


def check_trainable(
    model: nn.Module, architecture: Architecture, config: PlasticityConfig, heads: Iterable[str]
) -> None:
    """Raises ModelError if quantized weights, which only LoRA can adapt, would train in full, or were packed."""
    check_not_packed(model)
    for head in heads:
        for path, module in walk(model.get_submodule(head), head):
            if not holds_plain_weights(module):
                raise ModelError(
                    f"{path}, a part of the head, is quantized ({type(module).__name__}), and the head trains in "
                    "full. Exclude the head when you load the model: llm_int8_skip_modules (bitsandbytes) or "
                    f"modules_to_not_convert (others) = {list(heads)}."
                )
    for part in architecture.components:
        quantised = not all(map(holds_plain_weights, weights_of(model, part)))
        if quantised and part.is_among(config.candidates) and (config.training == "full" or not part.features):
            raise ModelError(
                f'{part.id} is quantized ({type(weights_of(model, part)[0]).__name__}), and training="full" would '
                'train its weights. Use training="lora", load the model without quantization, or select '
                'other kinds: candidates=("LN1", "LN2").'
            )


def check_loadable(model: nn.Module, architecture: Architecture, config: PlasticityConfig) -> None:
    """Raises ModelError if PEFT would look for saved LoRA weights under names that the model does not have.

    PEFT renames LoRA weights before it loads them, as transformers renames old checkpoints of the same model. For some
    models that consist of several, the new names are those of another part, and the trained weights would be lost.
    """
    candidates = [part for part in architecture.components if part.is_among(config.candidates) and part.features]
    paths = {path: part.kind for part in candidates if config.training == "lora" for path in part.modules}
    lost = _lost_when_loaded(model, paths)
    if lost:
        kinds = ", ".join(dict.fromkeys(paths[path] for path in lost))
        raise ModelError(
            f"{type(model).__name__}: this release of transformers and PEFT cannot load LoRA weights of {lost[0]} "
            f"again: it takes them for those of another module, and training would be lost. It is so for {kinds}. "
            'Use training="full", or leave these kinds out of candidates.'
        )


def _lost_when_loaded(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Returns the modules of which PEFT renames saved LoRA weights, though they have the names of this model."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # transformers 4, under which nothing is renamed
        return []
    keys = {path: f"{PREFIX}{path}.lora_A.weight" for path in paths}
    weights = {key: torch.empty(1, 1) for key in keys.values()}
    renamed = conversion.convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), weights)
    return [path for path, key in keys.items() if key not in renamed]


def check_lora_takes_part(model: nn.Module, architecture: Architecture, linears: Collection[str]) -> None:
    """Raises ModelError if LoRA is to train a layer whose weight attention uses without calling the layer."""
    chosen = [part for part in architecture.components if part.kind == "MHA" and set(part.modules) & set(linears)]
    uncalled = set(_uncalled(model, architecture)) & set(linears) if chosen else set()
    part = next((part for part in chosen if set(part.modules) & uncalled), None)
    if part is not None:
        path = next(path for path in part.modules if path in uncalled)
        others = tuple(kind for kind in KINDS if kind != "MHA")
        attention = type(model.get_submodule(part.path)).__name__
        raise ModelError(
            f"{part.id} was chosen, and LoRA on {path} would have no effect: {attention} uses the weight of this "
            f"layer without calling the layer. Choose among the other kinds, candidates={others}, or train the layer "
            'itself, training="full". The scores are valid for both: give report=measure_plasticity(...) to measure '
            "only once."
        )


def _uncalled(model: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """Returns the projections that a pass with a blank image does not call; those that look so if none is possible."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return _with_biases_apart(model, architecture)
    try:
        return run_left_as_found(
            lambda: uncalled_projections(model, architecture, blank_image(model, architecture, None)), model, seed=0
        )
    except Exception:  # it may be unknown which size or which other inputs a model takes
        return _with_biases_apart(model, architecture)


def _with_biases_apart(model: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """Returns the projections of attentions that hold biases beside them, which are then given to `F.linear`."""
    attentions = [(part, model.get_submodule(part.path)) for part in architecture.components if part.kind == "MHA"]
    apart = [part for part, module in attentions if "q_bias" in dict(module.named_parameters())]
    return tuple(path for part in apart for path in part.modules[:-1])


def check_labels(labels: Mapping[int, str] | None) -> None:
    """Raises ConfigError if labels are not numbered as the outputs of the head: the adapter could not be loaded."""
    if labels is not None and sorted(labels) != list(range(len(labels))):
        raise ConfigError(
            f"The id2label of the model's config must number its {len(labels)} labels from 0 to {len(labels) - 1}, as "
            f"the outputs of the head. Got {shown(sorted(labels))}. Change model.config.id2label."
        )


def check_not_in_other_mode(model: nn.Module, linears: Iterable[str], others: Iterable[str]) -> None:
    """Raises ConfigError if another adapter of the model trains a selected module in the other mode."""
    for paths, wrapper, held in ((linears, AuxiliaryTrainingWrapper, "full"), (others, BaseTunerLayer, "lora")):
        for path in paths:
            if isinstance(model.get_submodule(path), wrapper):
                raise ConfigError(
                    f'Another adapter of this model trains {path} with training="{held}", and PEFT does not support '
                    f'both on one module. Use training="{held}" here too, or merge or unload that adapter first.'
                )


def check_switchable(model: nn.Module, modules_to_save: Iterable[str]) -> None:
    """Raises ConfigError if transformers could not switch between this adapter and those that the model has.

    Its `set_adapter`, unlike that of a PeftModel, assumes that every adapter contains every module that any of them
    trains in full.
    """
    held = {path for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    saved = tuple(modules_to_save)
    other = [path for path in held if not path.endswith(saved)]
    other += [name for name in saved if not any(path.endswith(name) for path in held)]
    if held and other:
        raise ConfigError(
            f"Only one of this adapter and an adapter of the model trains {min(other)} in full. transformers' "
            "add_adapter cannot switch between such adapters. Select the same components, or use a PeftModel, which "
            "can: get_peft_model(model, config), then model.add_adapter(name, config)."
        )


def check_only_chosen_match(model: nn.Module, linears: Collection[str], modules_to_save: Collection[str]) -> None:
    """Raises ModelError if PEFT, which matches the ends of paths, would adapt modules that were not selected."""
    ends = tuple(f".{path}" for path in linears)
    for path, _ in walk(model):
        taken = [end[1:] for end in ends if path.endswith(end)]
        if not any(f"{path}.".startswith(f"{saved}.") for saved in modules_to_save):
            taken += [saved for saved in modules_to_save if path.endswith(saved)]
        if taken and path not in linears:
            raise ModelError(
                f"{type(model).__name__}: PEFT matches the ends of module paths, so {path} would train together "
                f"with {taken[0]}. Name {taken[0]!r} in modules_to_save to train both, freeze the one that is not in "
                "the blocks with requires_grad_(False), or adapt only the part of the model that contains the blocks."
            )
