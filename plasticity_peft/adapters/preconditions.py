"""Checks before an adapter is injected."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from plasticity_peft.adapters.config import PlasticityConfig
from plasticity_peft.checks import shown
from plasticity_peft.components.architecture import Architecture, weights_of
from plasticity_peft.components.quantized import holds_plain_weights
from plasticity_peft.components.wrappers import COMPILED, walk
from plasticity_peft.errors import ConfigError, ModelError


def check_not_wrapped(model: nn.Module) -> None:
    """Raises ModelError if a module was compiled, or wrapped for several processes. Both must happen after adapting.

    Measuring works through such wrappers. Adapting does not: DistributedDataParallel has already recorded the
    parameters that it synchronizes, and a compiled module adds its name to every path of the adapter.
    """
    for path, module in model.named_modules():
        name = path or "the model"
        if COMPILED in module._modules:
            raise ModelError(
                f"Adapt a model before it is compiled: torch.compile(get_peft_model(model, config)). Compiled: {name}."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ModelError(
                "Adapt a model before it is wrapped: DistributedDataParallel(get_peft_model(model, config)). It "
                f"synchronizes only the parameters that exist when it is created. Wrapped: {name}."
            )
    for path, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise ModelError(f"{path} is spread over processes (DTensor). Adapt a model before fully_shard.")


def check_trainable(
    model: nn.Module, architecture: Architecture, config: PlasticityConfig, heads: Iterable[str]
) -> None:
    """Raises ModelError if quantized weights, which only LoRA can adapt, would have to train in full."""
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
        if quantised and part.kind in config.candidates and (config.training == "full" or not part.features):
            raise ModelError(
                f'{part.id} is quantized ({type(weights_of(model, part)[0]).__name__}), and training="full" would '
                'train its weights. Use training="lora", load the model without quantization, or select '
                'other kinds: candidates=("LN1", "LN2").'
            )


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
                f"with {taken[0]}. Adapt only the part of the model that contains the blocks."
            )
