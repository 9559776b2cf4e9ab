"""What of a model trains beside the chosen components, and what is to be said of the rest.

PEFT finds modules by how their paths end, and trains and saves modules only. So a head may have to be named by its
parts, and what cannot be named is reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.blocks import is_timm_model
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
from plasticity_peft.components.wrappers import walk
from plasticity_peft.errors import ConfigError, ModelError

# Below the logger of transformers, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

ADDED_BY_PEFT = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""Names that PEFT adds to `modules_to_save` for a `task_type`, whether the model has them or not."""


@dataclass(frozen=True)
class Training:
    """What of a model trains: paths of modules."""

    linears: tuple[str, ...]
    """Those that take LoRA."""
    others: tuple[str, ...]
    """Chosen modules that train in full."""
    heads: tuple[str, ...]
    """Heads, or the modules in them that the user did not freeze; they train in full."""
    named: tuple[str, ...]
    """What the user names in `modules_to_save`."""

    @property
    def full(self) -> tuple[str, ...]:
        """All that trains in full and is saved."""
        return tuple(outermost([*self.others, *self.heads, *self.named]))

    def holds(self, path: str) -> bool:
        """Returns whether a module, or a parameter, trains in full."""
        return any(within(path, module) for module in self.full)


def heads_that_train(model: nn.Module, heads: Iterable[str]) -> tuple[str, ...]:
    """Returns the heads, or the modules in them, that the user did not freeze.

    Flags mean nothing in a model in which all is frozen, and in one that carries adapters: PEFT has frozen it. There
    the heads are those that another adapter trains, if it trains any.
    """
    heads = tuple(heads)
    inside = [path for path, module in model.named_modules() if "original_module" in module._modules]
    trained = outermost(path for path in inside if any(within(path, head) for head in heads))
    if _adapted(model) or not any(parameter.requires_grad for parameter in model.parameters()):
        return tuple(trained) or heads
    modules = dict(walk(model))
    return tuple(part for head in heads for part in _unfrozen(modules, head))


def _adapted(model: nn.Module) -> bool:
    return any({"original_module", "base_layer"} & set(module._modules) for module in model.modules())


def _unfrozen(modules: dict[str, nn.Module], path: str) -> Iterator[str]:
    """Yields a module if it trains, or the modules in it that do; a layer that is frozen in part counts as trained."""
    module = modules[path]
    if not all(holds_plain_weights(part) for _, part in walk(module)):  # whose flags are not the user's
        yield path
        return
    flags = [parameter.requires_grad for parameter in module.parameters() if parameter.is_floating_point()]
    if all(flags):
        yield path
    elif any(flags):
        children = [name for name, child in module.named_children() if holds_weights(child)]
        for name in children:
            yield from _unfrozen(modules, f"{path}.{name}")
        if not children:
            yield path


def named_by_the_user(model: nn.Module, names: Iterable[str] | None, task_type: object = None) -> tuple[str, ...]:
    """Returns the modules whose paths end with one of the names, as PEFT finds them; lists of modules by their items.

    Raises:
        ConfigError: a name matches no module; the message contains the nearest that there is.
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
    """Yields a module, or those in it if it is only a list of modules, which PEFT cannot train."""
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
            f"modules_to_save names {name!r}, and {parameters[0]} is a parameter. PEFT trains and saves modules only: "
            "make it a parameter of a module of its own, and name that module."
        )
    last = [path.rpartition(".")[2] for path in modules]
    near = get_close_matches(name, dict.fromkeys([*modules, *last]), n=1, cutoff=0.5)
    hint = (
        f"Did you mean {near[0]!r}?" if near else f"Its parts are {', '.join(n for n, _ in model.named_children())}."
    )
    return f"modules_to_save names {name!r}, and {type(model).__name__} has no module whose path ends so. {hint}"


def peft_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Returns names by which PEFT finds each of the modules once; a head whose name also means a part of it, by parts.

    PEFT trains every module whose path ends with a name, so that the name "head" also means "head.head", which would
    be saved twice and never loaded.

    Raises:
        ModelError: a module cannot be named without another in it.
    """
    modules = dict(walk(model))
    names: list[str] = []
    for path in paths:
        clash = next((other for other in modules if other != path and other.endswith(path)), None)
        parts = [f"{path}.{name}" for name, child in modules[path].named_children() if holds_weights(child)]
        if clash is None or not parts:
            names.append(path)
        elif parameter_count(modules[path]):
            raise ModelError(
                f"PEFT finds modules by how their paths end: {path} cannot train without {clash} being saved twice. "
                f"Name its parts in modules_to_save: {parts}."
            )
        else:
            names += peft_names(model, parts)
    return names


def names_to_save(model: nn.Module, training: Training, given: Iterable[str] | None) -> list[str]:
    """Returns the `modules_to_save` of the LoRA config: the user's names if they do, and the paths of the rest."""
    full, names = list(training.full), []
    paths = [path for path, _ in walk(model)]
    for name in given or ():
        matching = [path for path in paths if path and path.endswith(name)]
        if matching and set(matching) <= set(full):
            names.append(name)
    own = [path for path in full if not path.endswith(tuple(names))]
    return list(dict.fromkeys([*peft_names(model, own), *names]))


def check_named_are_not_chosen(training: Training) -> None:
    """Raises ConfigError if a module that the user names holds one that was chosen: it would train twice."""
    for path in (*training.linears, *training.others):
        for name in training.named:
            if within(path, name) and (path != name or path in training.linears):
                raise ConfigError(
                    f"modules_to_save names {name}, and {path} of it was chosen. Name other modules, or leave its "
                    "kind out of candidates."
                )


def check_has_head(model: nn.Module, architecture: Architecture, given: Iterable[str] | None) -> None:
    """Raises ModelError for a class of transformers whose head was not found, unless the user names what trains."""
    for path, owner in _owners(model, architecture):
        if not is_for_a_task(owner) or architecture.heads or given is not None:
            continue
        beside = _beside(owner, path, architecture)
        if beside and not (isinstance(owner, PreTrainedModel) and owner.can_generate()):
            raise ModelError(
                f"{type(owner).__name__} takes more than images, and its head could not be found. Name in "
                f"modules_to_save what is to train beside the chosen components, of {', '.join(beside)} and what lies "
                "in them, or give modules_to_save=[] to train nothing else."
            )


def report_what_trains(model: nn.Module, architecture: Architecture, training: Training, units: Iterable[str]) -> None:
    """Logs in one line what the model consists of; warns of what looks as if it were to train and does not."""
    problems = [*_fresh(model, architecture, training), *_left(model, architecture, training)]
    problems += _thawed(model, training)
    frozen = _frozen(model, architecture, training)
    beside = ", ".join([*training.heads, *training.named]) or "nothing"
    line = (
        f"{type(model).__name__}: {', '.join(units)} train (LoRA on {len(training.linears)} layers, "
        f"{len(training.others)} modules in full); beside them, in full: {beside}. "
        f"Frozen: {', '.join([*frozen, 'the rest of the blocks'])}."
    )
    without = _without_head(model, architecture, training)
    log = logger.warning if problems or without else logger.info
    log(" ".join([line, *without, *problems]))
    for problem in problems:
        warnings.warn(problem, stacklevel=2)


def _owners(model: nn.Module, architecture: Architecture) -> list[tuple[str, nn.Module]]:
    """Returns the modules in which the backbone lies, the model first, and the one that holds the blocks."""
    modules = dict(walk(model))
    return [(path, modules[path]) for path in lineage(architecture.trunk)]


def _beside(owner: nn.Module, path: str, architecture: Architecture) -> list[str]:
    """Returns what lies in a module beside the backbone: children with weights, and parameters of its own."""
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
    if lost:
        yield (
            f"{', '.join(lost)}: made at random when the model was loaded, because its checkpoint has no such "
            "weights. They stay frozen and are not saved with the adapter, so that another process makes others. If "
            f"the model uses them, train and save them: modules_to_save={lost}."
        )


def _left(model: nn.Module, architecture: Architecture, training: Training) -> Iterator[str]:
    """Yields what is to be said of weights in modules of the user's that would train without PEFT, and now do not."""
    modules, parameters = dict(walk(model)), dict(_trainable(model))
    parts: list[str] = []
    for path, owner in _owners(model, architecture):
        if not (from_transformers(owner) or is_timm_model(owner)):
            parts += _beside(owner, path, architecture)
    left = [name for name in parameters if any(within(name, part) for part in parts) and not training.holds(name)]
    whole = outermost(part for part in parts if part in modules and not any(within(t, part) for t in training.full))
    whole = [part for part in whole if any(within(name, part) for name in left)]
    single = [name for name in left if not any(within(name, part) for part in whole)]
    if single:
        yield (
            f"{', '.join(single)}: parameters of their own, which PEFT cannot train or save. They stay frozen. Put "
            "them into a module, which is then found or can be named in modules_to_save."
        )
    if whole:
        found = f"No head was found in {type(model).__name__}. " if not (training.heads or training.named) else ""
        yield (
            f"{found}What lies beside its vision transformer stays frozen and is not saved: {', '.join(whole)}. "
            "Name in modules_to_save what should train, or freeze it with requires_grad_(False)."
        )


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters that the user left to train; none in a model with adapters, which PEFT has frozen."""
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
            f"{', '.join(thawed)}: frozen before, and trained now, because PEFT trains a module as a whole. Give them "
            "a module of their own to keep them frozen."
        )


def _without_head(model: nn.Module, architecture: Architecture, training: Training) -> list[str]:
    """Returns what to say of a class with a head of which none trains."""
    if training.heads or training.named:
        return []
    owners = [owner for path, owner in _owners(model, architecture) if is_for_a_task(owner)]
    owners = [
        owner for path, owner in _owners(model, architecture) if owner in owners and _beside(owner, path, architecture)
    ]
    return [f"No head of {type(owner).__name__} trains: name it in modules_to_save if it should." for owner in owners]


def _frozen(model: nn.Module, architecture: Architecture, training: Training) -> list[str]:
    """Returns the outermost modules in which nothing trains, the blocks left out."""
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
