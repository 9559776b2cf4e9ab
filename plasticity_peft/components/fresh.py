"""Finds weights that were initialized at random when a pretrained model was loaded, as its checkpoint lacks them.

transformers 5 marks every parameter that it loads. transformers 4 does not, and a copy of a model loses the marks. In
these cases a layer counts as new if it looks as transformers initializes it: a bias of zeros, and weights of a known
standard deviation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from plasticity_peft.components.heads import outermost, within
from plasticity_peft.components.offloading import onloaded
from plasticity_peft.components.quantized import holds_plain_weights
from plasticity_peft.components.wrappers import walk

LOADED = "_is_hf_initialized"
"""Attribute of a parameter that transformers loaded from a checkpoint."""


def fresh_weights(model: nn.Module, *, blocks: tuple[str, ...] = (), saved: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the paths of modules and parameters with random weights in an otherwise pretrained model.

    Args:
        model: any model; the transformers models in it are searched.
        blocks: paths of modules in which only marks count, because biases of zeros are common in them.
        saved: paths of modules to skip, because their weights are saved with an adapter.

    Examples:
        >>> fresh_weights(nn.Linear(2, 2))
        ()
    """
    models = {path: module for path, module in walk(model) if isinstance(module, PreTrainedModel)}
    found: list[str] = []
    for path in outermost(models):
        parameters = dict(_parameters(models[path], path))
        missing = {name for name, parameter in parameters.items() if not getattr(parameter, LOADED, False)}
        if len(missing) == len(parameters):
            missing = set(_by_look(models[path], path, blocks))
        missing = {name for name in missing if not any(within(name, module) for module in saved)}
        random = {name for name in missing if _is_random(parameters[name])}
        found += _grouped([name for name, _ in walk(models[path], path)], set(parameters), missing, random)
    return tuple(found)


def _parameters(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, part in walk(module, path):
        for key, parameter in part.named_parameters(recurse=False):
            yield (f"{name}.{key}" if name else key), parameter


def _is_random(parameter: nn.Parameter) -> bool:
    """Returns False for a constant, such as ones or zeros, which is the same after every initialization."""
    return not parameter.is_meta and parameter.numel() > 1 and bool((parameter != parameter.flatten()[0]).any())


def _by_look(model: PreTrainedModel, path: str, blocks: tuple[str, ...]) -> Iterator[str]:
    """Yields the parameters of layers that look newly initialized, if other layers look trained."""
    spread = getattr(model.config, "initializer_range", None)
    made, trained = [], False
    for name, layer in walk(model, path):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.bias is None or not holds_plain_weights(layer):
            continue
        bias, weight = layer.bias, layer.weight
        with onloaded(layer):
            if bias.is_meta or bias.any():
                trained = trained or not bias.is_meta
            elif spread and not any(within(name, block) for block in blocks) and _has_spread(weight, spread):
                made += [f"{name}.weight", f"{name}.bias"]
    yield from made if trained else ()


def _has_spread(weight: torch.Tensor | None, spread: float) -> bool:
    """Returns whether numbers look as if they were drawn from a normal distribution around zero."""
    if weight is None or weight.numel() < 64:
        return False
    tolerance = 3 / (2 * weight.numel()) ** 0.5 + 0.02
    centered = abs(float(weight.detach().float().mean())) < 4 * spread / weight.numel() ** 0.5
    return bool(centered and abs(float(weight.detach().float().std()) / spread - 1) < tolerance)


def _grouped(modules: list[str], parameters: set[str], missing: set[str], random: set[str]) -> list[str]:
    """Returns modules whose weights are all missing and partly random, and the other random parameters."""
    grouped: list[str] = []
    for path in modules if random else ():
        if path and not any(within(path, other) for other in grouped):
            held = {name for name in parameters if within(name, path)}
            grouped += [path] if held <= missing and held & random else []
    return grouped + sorted(name for name in random if not any(within(name, other) for other in grouped))
