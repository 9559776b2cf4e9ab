"""Finds the module to run on images, and the heads of a model.

A head is a module that has weights and is not part of the vision transformer. Names decide only if structure cannot:
in a module that contains the blocks directly, as in the models of timm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel

from plasticity_peft.components.blocks import Stack
from plasticity_peft.components.quantized import parameter_count
from plasticity_peft.components.wrappers import PARALLEL, takes_anything, takes_images_alone, unwrap, walk

EMBEDDINGS = re.compile(r"embed|patch|stem|token|(^|_)pos(_|$|ition)|conv_proj")
"""Names of modules before the blocks of a vision transformer."""
HEADS = re.compile(r"head|classif|logit|predict|decod|quer")
"""Names of modules after the blocks, in whichever order they are registered."""


def holds_weights(module: nn.Module) -> bool:
    """Returns whether a module contains weights, adapters not counted."""
    return any(parameter_count(part) for _, part in walk(module))


def from_transformers(module: nn.Module) -> bool:
    """Returns whether the class of a module belongs to transformers, so that its parts are known."""
    return type(module).__module__.startswith("transformers.")


def is_for_a_task(module: nn.Module) -> bool:
    """Returns whether a module is one of the classes of transformers that have a head: `...ForImageClassification`."""
    return from_transformers(module) and re.search("For[A-Z]", type(module).__name__) is not None


def lineage(path: str) -> list[str]:
    """Returns the paths of a module and of all modules that contain it, the model first.

    Examples:
        >>> lineage("vit.encoder")
        ['', 'vit', 'vit.encoder']
    """
    names = path.split(".") if path else []
    return [".".join(names[:count]) for count in range(len(names) + 1)]


def within(path: str, owner: str) -> bool:
    """Returns whether a module is another one, or is inside it.

    Examples:
        >>> within("head.fc", "head"), within("head_dist", "head"), within("head", "")
        (True, False, True)
    """
    return f"{path}.".startswith(f"{owner}." if owner else "")


def find_entry(model: nn.Module, backbone: str) -> str:
    """Returns the path of the module to run on images: the outermost one that needs nothing else.

    A module with `forward(*args, **kwargs)` is run if it has weights of its own, such as a head. Without weights it
    only passes its arguments on. If a transformers model needs more than images, its backbone is run.
    """
    modules = dict(walk(model))
    paths = lineage(backbone)
    known = next(
        (n for n, path in enumerate(paths) if takes_images_alone(modules[path]) or from_transformers(modules[path])),
        -1,
    )
    if known < 0 or not takes_images_alone(modules[paths[known]]):
        return backbone
    entry = paths[known]
    for inner, path in zip(reversed(paths[1 : known + 1]), reversed(paths[:known]), strict=True):
        if not _hands_on(modules[path], inner):
            break
        entry = path if _beside(modules[path], path, inner) else entry
    return entry


def _hands_on(module: nn.Module, inner: str) -> bool:
    """Returns whether a module can be called with the arguments of the module `inner` in it."""
    if isinstance(module, nn.Sequential):
        return next(iter(dict(module.named_children())), "") == inner.rpartition(".")[2]
    return has_forward(module) and takes_anything(module) and not isinstance(module, PARALLEL)


def has_forward(module: nn.Module) -> bool:
    """Returns whether a module can be called; a ModuleList and a ModuleDict cannot."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def find_heads(model: nn.Module, stack: Stack, entry: str) -> tuple[str, ...]:
    """Returns the paths of the heads, outermost first: modules that have weights and are outside the backbone.

    They are searched for next to every module that contains the backbone, and in the module that contains the blocks.
    Frozen heads are included. A second model, such as a teacher or a language model, is not a head.
    """
    modules = dict(walk(model))
    found: list[str] = []
    for path in lineage(stack.trunk):
        owner = modules[path]
        if from_transformers(owner):
            trusted = is_for_a_task(owner) and within(path, entry)
            parts = _candidates(owner, path, stack) if trusted else []
        else:
            parts = [part for part in _candidates(owner, path, stack) if not _is_a_model(modules[part], part, stack)]
        for part in parts:
            found += _callable_parts(modules, part, stack, trusted=from_transformers(owner))
    return tuple(dict.fromkeys(found))


def _candidates(owner: nn.Module, path: str, stack: Stack) -> list[str]:
    """Returns the children of one module that may be heads."""
    if path != stack.trunk:
        inner = lineage(stack.trunk)[len(lineage(path))]
        return _beside(owner, path, inner)
    if from_transformers(owner) and not is_for_a_task(owner):
        return []
    classifier = getattr(owner, "get_classifier", None)
    if callable(classifier) and not from_transformers(owner):
        return _paths_of(owner, path, classifier())
    return _after_the_blocks(owner, path, lineage(stack.paths[0])[len(lineage(path))])


def _beside(owner: nn.Module, path: str, inner: str) -> list[str]:
    """Returns the paths of the children of a module that have weights, without the child `inner`."""
    children = {f"{path}.{name}" if path else name: child for name, child in owner.named_children()}
    return [child for child, module in children.items() if child != inner and holds_weights(module)]


def _paths_of(owner: nn.Module, path: str, wanted: object) -> list[str]:
    """Returns the paths of the modules that `get_classifier` of timm returned: one, or several."""
    modules = wanted if isinstance(wanted, (tuple, list)) else [wanted]
    ids = {id(unwrap(module)) for module in modules if isinstance(module, nn.Module)}
    return [name for name, module in walk(owner, path) if id(module) in ids and holds_weights(module)]


def _after_the_blocks(owner: nn.Module, path: str, blocks: str) -> list[str]:
    """Returns the children of a module with blocks that are heads: after the blocks, and not embeddings or norms."""
    heads, after = [], False
    own_model = isinstance(owner, PreTrainedModel) and not is_for_a_task(owner)
    for name, child in owner.named_children():
        child_path = f"{path}.{name}" if path else name
        after = after or child_path == blocks
        if child_path == blocks or not holds_weights(child) or _is_norm(child):
            continue
        if own_model and from_transformers(unwrap(child)):
            continue  # part of the transformers model that this class extends, such as its pooler
        if HEADS.search(name) or (after and not EMBEDDINGS.search(name)):
            heads.append(child_path)
    return heads


def _is_norm(module: nn.Module) -> bool:
    """Returns whether all weights of a module belong to norms."""
    return all(type(part).__name__.endswith("Norm") or not parameter_count(part) for _, part in walk(module))


def _is_a_model(module: nn.Module, path: str, stack: Stack) -> bool:
    """Returns whether a module is a whole model: a vision transformer, or one of transformers, timm or torchvision."""
    if path in stack.others or hasattr(module, "pretrained_cfg"):
        return True
    if isinstance(module, PreTrainedModel):
        return re.search("Head|Decoder", type(module).__name__) is None
    return type(module).__module__.startswith("torchvision.models.")


def _callable_parts(modules: dict[str, nn.Module], path: str, stack: Stack, *, trusted: bool) -> Iterator[str]:
    """Yields a module, or the modules in it, so that each can be called and none contains a whole model."""
    module = modules[path]
    inside = [name for name in modules if name != path and within(name, path)]
    model = not trusted and any(_is_a_model(modules[name], name, stack) for name in inside)
    if has_forward(module) and not model:
        yield path
        return
    for name, child in module.named_children():
        part = f"{path}.{name}"
        if holds_weights(child) and (trusted or not _is_a_model(modules[part], part, stack)):
            yield from _callable_parts(modules, part, stack, trusted=trusted)


def outermost(paths: Iterable[str]) -> list[str]:
    """Returns the paths that are not inside another one of them.

    Examples:
        >>> outermost(["head.fc", "head", "neck"])
        ['head', 'neck']
    """
    unique = list(dict.fromkeys(paths))
    return [path for path in unique if not any(path != other and within(path, other) for other in unique)]
