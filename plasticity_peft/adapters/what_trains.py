"""Decides which modules train in addition to the selected components, and reports on the others.

PEFT matches the ends of module paths, and trains and saves only whole modules. So a head may have to be listed by its
parts, and weights that cannot be listed are reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.blocks import is_timm_model
from plasticity_peft.components.component import block_ids
from plasticity_peft.components.fresh import fresh_weights
from plasticity_peft.components.heads import (
    EMBEDDINGS,
    HEADS,
    from_transformers,
    has_forward,
    holds_weights,
    is_for_a_task,
    lineage,
    outermost,
    within,
)
from plasticity_peft.components.quantized import holds_plain_weights, parameter_count
from plasticity_peft.components.wrappers import original_of, walk
from plasticity_peft.errors import ConfigError, ModelError

# A child of the logger of transformers, so that its verbosity applies here too.
logger = logging.get_logger(f"transformers.{__name__}")

ADDED_BY_PEFT = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""Names that PEFT adds to `modules_to_save` for a `task_type`, whether the model has them or not."""
TAKEN = ("vision_feature_layers", "vision_feature_layer")
"""What the configs of models of images and text, such as LLaVA, call the hidden states that they take."""


@dataclass(frozen=True)
class Training:
    """The modules of a model that train, by path."""

    linears: tuple[str, ...]
    """Selected modules that get LoRA."""
    others: tuple[str, ...]
    """Selected modules that train in full."""
    heads: tuple[str, ...]
    """Heads, or the modules in them that the user did not freeze. They train in full."""
    named: tuple[str, ...]
    """Modules that the user lists in `modules_to_save`."""

    @property
    def full(self) -> tuple[str, ...]:
        """All modules that train in full and are saved."""
        return tuple(outermost([*self.others, *self.heads, *self.named]))

    def holds(self, path: str) -> bool:
        """Returns whether a module, or a parameter, trains in full."""
        return any(within(path, module) for module in self.full)


def heads_that_train(model: nn.Module, heads: Iterable[str]) -> tuple[str, ...]:
    """Returns the heads, or the modules in them, that the user did not freeze.

    `requires_grad` is ignored if the whole model is frozen, and if the model has adapters, because PEFT has frozen it.
    In these cases, the heads are those that another adapter trains, or all heads if there are none.
    """
    heads = tuple(heads)
    inside = [path for path, module in model.named_modules() if original_of(module)]
    trained = outermost(path for path in inside if any(within(path, head) for head in heads))
    if _adapted(model) or not any(parameter.requires_grad for parameter in model.parameters()):
        return tuple(trained) or heads
    modules = dict(walk(model))
    return tuple(part for head in heads for part in _unfrozen(modules, head))


def _adapted(model: nn.Module) -> bool:
    return any(original_of(module) or "base_layer" in module._modules for module in model.modules())


def _unfrozen(modules: dict[str, nn.Module], path: str) -> Iterator[str]:
    """Yields a module if it trains, or the modules in it that train.

    PEFT trains modules only. So a module in which nothing but some of its own parameters is frozen counts as trained.
    """
    module = modules[path]
    if not all(holds_plain_weights(part) for _, part in walk(module)):  # their flags were not set by the user
        yield path
        return
    flags = [parameter.requires_grad for parameter in module.parameters() if parameter.is_floating_point()]
    own = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    inside = all(p.requires_grad for child in module.children() for p in child.parameters() if p.is_floating_point())
    if has_forward(module) and any(flags) and inside and (own or all(flags)):
        yield path
    elif any(flags):
        for name, child in module.named_children():
            if holds_weights(child):
                yield from _unfrozen(modules, f"{path}.{name}")


def named_by_the_user(model: nn.Module, names: Iterable[str] | None, task_type: object = None) -> tuple[str, ...]:
    """Returns the modules whose paths end with one of the names, as in PEFT. Lists of modules yield their items.

    Raises:
        ConfigError: a name matches no module. The message contains the nearest name.
    """
    modules = dict(walk(model))
    found: list[str] = []
    for name in names or ():
        matching = [path for path in modules if path and path.endswith(name)]
        if not matching and name not in ADDED_BY_PEFT.get(str(getattr(task_type, "value", task_type)), ()):
            raise ConfigError(_no_match(model, modules, name))
        found += [part for path in matching for part in _items(modules, path)]
    return tuple(outermost(found))


def _items(modules: dict[str, nn.Module], path: str) -> Iterator[str]:
    """Yields a module, or its items if it is only a list of modules, which PEFT cannot train."""
    if has_forward(modules[path]):
        yield path
        return
    for name, child in modules[path].named_children():
        if holds_weights(child):
            yield from _items(modules, f"{path}.{name}")


def _no_match(model: nn.Module, modules: dict[str, nn.Module], name: str) -> str:
    parameters = [path for path, _ in model.named_parameters() if path.endswith(name)]
    if parameters:
        return (
            f"modules_to_save contains {name!r}, but {parameters[0]} is a parameter. PEFT trains and saves only "
            "modules. Move the parameter to its own module, and list that module."
        )
    last = [path.rpartition(".")[2] for path in modules]
    near = get_close_matches(name, dict.fromkeys([*modules, *last]), n=1, cutoff=0.5)
    hint = (
        f"Did you mean {near[0]!r}?" if near else f"Its parts are {', '.join(n for n, _ in model.named_children())}."
    )
    return f"modules_to_save contains {name!r}, but no module path of {type(model).__name__} ends with it. {hint}"


def peft_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Returns names by which PEFT finds each of the modules exactly once. If needed, a module is listed by its parts.

    PEFT trains every module whose path ends with a name. So the name "head" also matches "head.head", which would be
    saved twice and never loaded.

    Raises:
        ModelError: a name that matches a module also matches a part of it.
    """
    modules = dict(walk(model))
    names: list[str] = []
    for path in paths:
        clash = next((other for other in modules if other != path and other.endswith(path)), None)
        children = [f"{path}.{name}" for name, child in modules[path].named_children() if holds_weights(child)]
        parts = [part for child in children for part in _items(modules, child)]
        if clash is None or not parts:
            names.append(path)
        elif parameter_count(modules[path]):
            raise ModelError(
                f"PEFT matches the ends of module paths, so {clash} would be saved twice if {path} trains. "
                f"List its parts in modules_to_save: {parts}."
            )
        else:
            names += peft_names(model, parts)
    return names


def names_to_save(model: nn.Module, training: Training, given: Iterable[str] | None) -> list[str]:
    """Returns the `modules_to_save` of the LoRA config: the user's names if they match, and paths for the others."""
    full, names = list(training.full), []
    paths = [path for path, _ in walk(model)]
    for name in given or ():
        matching = [path for path in paths if path and path.endswith(name)]
        if matching and set(matching) <= set(full):
            names.append(name)
    own = [path for path in full if not path.endswith(tuple(names))]
    return list(dict.fromkeys([*peft_names(model, own), *names]))


def check_named_are_not_chosen(training: Training) -> None:
    """Raises ConfigError if a module in `modules_to_save` contains a selected module, which would train twice."""
    for path in (*training.linears, *training.others):
        for name in training.named:
            if within(path, name) and (path != name or path in training.linears):
                raise ConfigError(
                    f"modules_to_save contains {name}, but its module {path} was selected. List other modules, or "
                    "leave its kind out of candidates."
                )


def check_has_head(model: nn.Module, architecture: Architecture, given: Iterable[str] | None) -> None:
    """Raises ModelError if the head of a transformers model was not found, unless `modules_to_save` is given."""
    for path, owner in _owners(model, architecture):
        if not is_for_a_task(owner) or architecture.heads or given is not None:
            continue
        inside = [one for one in _owners(model, architecture) if within(one[0], path)]
        beside = [part for place, one in inside for part in _beside(one, place, architecture)]
        if beside and not (isinstance(owner, PreTrainedModel) and owner.can_generate()):
            raise ModelError(
                f"{type(owner).__name__} takes more than images, and its head could not be found. List the modules "
                f"that should also train in modules_to_save: {', '.join(beside)}, or modules in them. Give "
                "modules_to_save=[] to train nothing else."
            )


def report_what_trains(model: nn.Module, architecture: Architecture, training: Training, units: Iterable[str]) -> None:
    """Logs in one line what trains and what is frozen; warns about modules that probably should train but do not."""
    problems = [*_fresh(model, architecture, training), *_left(model, architecture, training)]
    problems += _thawed(model, training)
    frozen = _frozen(model, architecture, training)
    beside = ", ".join([*training.heads, *training.named]) or "nothing"
    line = (
        f"{type(model).__name__}: {', '.join(units)} train (LoRA on {len(training.linears)} layers, "
        f"{len(training.others)} modules in full). Also in full: {beside}. "
        f"Frozen: {', '.join([*frozen, 'the rest of the blocks'])}."
    )
    without = [*_without_head(model, architecture, training), *_without_gradient(model, architecture, training)]
    log = logger.warning if problems or without else logger.info
    log(" ".join([line, *without, *problems]))
    for problem in problems:
        warnings.warn(problem, stacklevel=2)


def _owners(model: nn.Module, architecture: Architecture) -> list[tuple[str, nn.Module]]:
    """Returns the modules that contain the blocks, from the model down to the trunk."""
    modules = dict(walk(model))
    return [(path, modules[path]) for path in lineage(architecture.trunk)]


def _beside(owner: nn.Module, path: str, architecture: Architecture) -> list[str]:
    """Returns the parts of a module outside the backbone: children with weights, and its own parameters."""
    blocks = architecture.blocks[0]
    children = {f"{path}.{name}" if path else name: child for name, child in owner.named_children()}
    names = [name for name, child in children.items() if not within(blocks, name) and holds_weights(child)]
    names += [f"{path}.{name}" if path else name for name, _ in owner.named_parameters(recurse=False)]
    if path != architecture.trunk:
        return names
    norms = {name for name in names if "norm" in type(children.get(name)).__name__.lower()}
    last = {name: name.rpartition(".")[2] for name in names}
    return [
        name for name in names if name not in norms and (HEADS.search(last[name]) or not EMBEDDINGS.search(last[name]))
    ]


def _fresh(model: nn.Module, architecture: Architecture, training: Training) -> Iterator[str]:
    lost = list(fresh_weights(model, blocks=architecture.blocks, saved=training.full))
    modules = [path for path in lost if path in dict(walk(model))]
    single = [path for path in lost if path not in modules]
    advice = [f"train and save them: modules_to_save={modules}"] if modules else []
    if single:
        advice.append(f"keep a copy of {', '.join(single)}: PEFT cannot save parameters that are not in modules")
    if lost:
        yield (
            f"{', '.join(lost)}: initialized at random when the model was loaded, because its checkpoint has no such "
            "weights. They stay frozen and are not saved with the adapter, so another process gets other values. If "
            f"the model uses them, {', and '.join(advice)}."
        )


def _left(model: nn.Module, architecture: Architecture, training: Training) -> Iterator[str]:
    """Yields warnings about weights in heads or modules of the user that would train without PEFT and now do not."""
    modules, parameters = dict(walk(model)), dict(_trainable(model))
    parts = [*architecture.heads]
    for path, owner in _owners(model, architecture):
        if not (from_transformers(owner) or is_timm_model(owner)):
            parts += _beside(owner, path, architecture)
    left = [name for name in parameters if any(within(name, part) for part in parts) and not training.holds(name)]
    whole = outermost(part for part in parts if part in modules and not any(within(t, part) for t in training.full))
    whole = [part for part in whole if any(within(name, part) for name in left)]
    single = [name for name in left if not any(within(name, part) for part in whole)]
    if single:
        yield (
            f"{', '.join(single)}: parameters outside of any layer, which PEFT cannot train or save. They stay "
            "frozen. Move them to a module of their own, or list in modules_to_save a module that contains them, "
            "which then trains as a whole."
        )
    if whole:
        found = f"No head was found in {type(model).__name__}. " if not (training.heads or training.named) else ""
        yield (
            f"{found}Modules outside its vision transformer stay frozen and are not saved: {', '.join(whole)}. "
            "List those that should train in modules_to_save, or freeze them with requires_grad_(False)."
        )


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters that the user did not freeze; none if the model has adapters, as PEFT has frozen it."""
    if _adapted(model):
        return
    for path, module in walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield (f"{path}.{name}" if path else name), parameter


def _thawed(model: nn.Module, training: Training) -> Iterator[str]:
    if _adapted(model) or not any(parameter.requires_grad for parameter in model.parameters()):
        return
    named = training.named
    thawed = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
        and any(within(name, head) for head in training.heads)
        and not any(within(name, module) for module in named)
    ]
    if thawed:
        yield (
            f"{', '.join(thawed)}: frozen before, but trainable now, because PEFT trains whole modules. Move them to "
            "a module of their own to keep them frozen."
        )


def _without_head(model: nn.Module, architecture: Architecture, training: Training) -> list[str]:
    """Returns a note for each class with a head if no head trains."""
    if training.heads or training.named:
        return []
    owners = [owner for path, owner in _owners(model, architecture) if is_for_a_task(owner)]
    owners = [
        owner for path, owner in _owners(model, architecture) if owner in owners and _beside(owner, path, architecture)
    ]
    return [f"No head of {type(owner).__name__} trains. If it should, list it in modules_to_save." for owner in owners]


def _without_gradient(model: nn.Module, architecture: Architecture, training: Training) -> list[str]:
    """Returns a note if the rest of the model takes tokens that some of the selected components come after."""
    for owner, name, given in _taken(model, architecture):
        states = [given] if isinstance(given, int) else given
        parts = _behind(states, architecture, {*training.linears, *training.others})
        if parts:
            return [
                f"{', '.join(parts)}: no gradient, because {type(owner).__name__} takes tokens from before "
                f"({name}={given}). To train others, name them in candidates, with granularity='component'."
            ]
    return []


def _taken(model: nn.Module, architecture: Architecture) -> Iterator[tuple[nn.Module, str, int | list[int]]]:
    """Yields the modules whose config says which hidden states they take, the name of that field, and its value."""
    for _, owner in _owners(model, architecture):
        for name in TAKEN:
            given: Any = getattr(getattr(owner, "config", None), name, None)
            several = isinstance(given, list | tuple) and given and all(isinstance(each, int) for each in given)
            if isinstance(given, int) or several:
                yield owner, name, given


def _behind(states: Iterable[int], architecture: Architecture, modules: set[str]) -> list[str]:
    """Returns the components with some of the modules that are in blocks behind all of some hidden states.

    Hidden state 0 is what the first block receives, and -1 is what the last one returns.
    """
    blocks = block_ids(architecture.components)
    last = max(state % (len(blocks) + 1) for state in states)
    idle = blocks[last:]
    return [
        part.id for part in architecture.components if part.block_id in idle and not modules.isdisjoint(part.modules)
    ]


def _frozen(model: nn.Module, architecture: Architecture, training: Training) -> list[str]:
    """Returns the outermost modules in which nothing trains, without the blocks."""
    modules = dict(walk(model))
    trained = [*training.full, *training.linears]
    found: list[str] = []
    for path, module in modules.items():
        in_block = any(within(path, block) for block in architecture.blocks)
        if not path or in_block or any(within(path, other) for other in [*found, *training.full]):
            continue
        around = any(within(other, path) for other in [*trained, *architecture.blocks])
        if not around and holds_weights(module):
            found.append(path)
    return found
