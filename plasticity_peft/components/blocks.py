"""Finds the blocks of a vision transformer in a model, and the names of their layers.

The names are rows of data (`layouts.py`), looked up by the model type of the part of the model that contains the
blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from plasticity_peft.components.component import KINDS
from plasticity_peft.components.layouts import LAYOUTS, TIMM, TIMM_TYPES, BlockLayout
from plasticity_peft.components.wrappers import leaf_names, leaves, walk
from plasticity_peft.errors import ModelError


@dataclass(frozen=True)
class Stack:
    """The blocks of one vision transformer in a model."""

    model_type: str
    backbone: str
    trunk: str
    """Path of the module that holds the embeddings and, directly or one level down, the blocks."""
    layout: BlockLayout
    paths: tuple[str, ...]
    others: tuple[str, ...] = ()
    """Paths of the other vision transformers in the model."""


class _Named(NamedTuple):
    """A layout that fits a block, and the model type under which it is known."""

    model_type: str
    layout: BlockLayout


def find_stack(model: nn.Module, backbone: str | None) -> Stack:
    """Returns the blocks of the vision transformer. Raises ModelError if there is none, or more than one."""
    every = stacks = _told_apart(list(_stacks(model)))
    if backbone is not None:
        names = [path for path, _ in walk(model)]
        if backbone not in names:
            raise ModelError(
                f"{type(model).__name__} has no module {backbone!r} to take as backbone. Vision transformers found in "
                f"it: {', '.join(stack.backbone or type(model).__name__ for stack in stacks) or 'none'}."
            )
        stacks = [stack for stack in stacks if f"{stack.paths[0]}.".startswith(f"{backbone}." if backbone else "")]
    if len(stacks) > 1:
        raise ModelError(
            f"{type(model).__name__} contains {len(stacks)} vision transformers. Choose one with backbone=, one of "
            f"{', '.join(repr(stack.backbone) for stack in stacks)}."
        )
    if not stacks:
        raise ModelError(_nothing_found(model, backbone))
    found = stacks[0]
    return replace(found, others=tuple(stack.trunk for stack in every if stack is not found))


def _told_apart(stacks: list[Stack]) -> list[Stack]:
    """Returns the stacks with different backbones. A shared path is extended to the part that contains the blocks."""
    shared = {stack.backbone for stack in stacks if sum(stack.backbone == other.backbone for other in stacks) > 1}
    named = []
    for stack in stacks:
        below = stack.paths[0].removeprefix(f"{stack.backbone}." if stack.backbone else "").partition(".")[0]
        path = f"{stack.backbone}.{below}" if stack.backbone else below
        named.append(replace(stack, backbone=path) if stack.backbone in shared else stack)
    return named


def _stacks(model: nn.Module) -> Iterator[Stack]:
    """Yields the stacks of blocks whose names are known, in the order in which the model contains them.

    Raises:
        ModelError: some blocks of a stack have the expected names, and others don't.
    """
    owners: dict[str, tuple[str, ...]] = {}
    found: dict[tuple[str, str], list[tuple[str, _Named | None]]] = {}
    modules = dict(walk(model))
    for path, module in modules.items():
        owners[path] = model_types(module, owners.get(path.rpartition(".")[0], ()))
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        for prefix, blocks, layouts in _matching(path, owners[path]):
            named = _layout_of(module, layouts)
            found.setdefault((prefix, blocks), []).append((path, named))
            if named is not None:
                break
    for (prefix, _), named_blocks in found.items():
        used = {named for _, named in named_blocks}
        if used == {None}:
            continue
        if len(used) > 1:
            path = next(path for path, named in named_blocks if named != named_blocks[0][1])
            raise ModelError(
                f"{type(model).__name__}: the blocks {named_blocks[0][0]} and {path} have different layers: "
                f"{leaf_names(modules[named_blocks[0][0]])}; {leaf_names(modules[path])}."
            )
        named = named_blocks[0][1]
        assert named
        yield Stack(
            model_type=named.model_type,
            backbone=_backbone(prefix, owners, modules),
            trunk=prefix.removesuffix("."),
            layout=named.layout,
            paths=tuple(path for path, _ in named_blocks),
        )


def model_types(module: nn.Module, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the model types whose layouts may fit the blocks in a module: the nearest first.

    Args:
        module: a part of a model.
        above: what this function returned for the module that it lies in.

    A model of timm has no model type. Inside another one, it may be known under that of the other one as well.
    """
    own = getattr(getattr(module, "config", None), "model_type", None)
    if own:
        return (str(own),)
    if set(TIMM_TYPES) & set(above):
        return above
    return (TIMM, *above) if is_timm_model(module) or (not above and from_timm(module)) else above


def from_timm(module: nn.Module) -> bool:
    """Returns whether the class of a module, or one that it extends, is one of timm."""
    return any(kind.__module__.startswith("timm.") for kind in type(module).__mro__)


def is_timm_model(module: nn.Module) -> bool:
    """Returns whether a module is a whole model of timm, or is made like one."""
    return hasattr(module, "pretrained_cfg") or (from_timm(module) and hasattr(module, "get_classifier"))


def _matching(path: str, types: tuple[str, ...]) -> Iterator[tuple[str, str, list[tuple[str, BlockLayout]]]]:
    """Yields the ways in which a path may be that of a block, the most specific first.

    Each is the path before the names of the layout, these names, and the layouts with their model types.
    """
    rows = [(model_type, layout) for model_type in types for layout in LAYOUTS.get(model_type, ())]
    for blocks in sorted(dict.fromkeys(layout.blocks for _, layout in rows), key=lambda names: -names.count(".")):
        named = [(model_type, layout) for model_type, layout in rows if layout.blocks == blocks]
        match = named[0][1].pattern.fullmatch(path)
        if match:
            yield match[1], blocks, named


def _backbone(prefix: str, owners: dict[str, tuple[str, ...]], modules: dict[str, nn.Module]) -> str:
    """Returns the path of the outermost module above the blocks that has their model type."""
    path = prefix.removesuffix(".")
    own = owners[path]
    best = path
    while path:
        path = path.rpartition(".")[0]
        if owners[path] != own:
            break
        if hasattr(modules[path], "config"):
            best = path
    return best


def _nothing_found(model: nn.Module, backbone: str | None) -> str:
    """Returns the error message for a model without known blocks: what was expected, what it has, and what to do."""
    part = model if backbone is None else model.get_submodule(backbone)
    model_type = next(iter(model_types(part)), None)
    lists: list[tuple[str, str]] = []
    for path, module in walk(part):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and len(leaves(module[0])) >= 4:
            owner = "" if any(path.startswith(f"{other}.") for other, _ in lists) else leaf_names(module[0])
            lists += [(path, owner)] if owner else []
    there = "; ".join(f"{path}.*: {names}" for path, names in lists) or "none with four layers or more"
    expected = ""
    if isinstance(model_type, str) and model_type in LAYOUTS:
        rows = [", ".join(name for kind in KINDS for name in row.weights(kind)) for row in LAYOUTS[model_type]]
        expected = f" Its blocks were expected to have the layers {' or '.join(rows)}."
    return (
        f"{type(part).__name__} (model_type {model_type!r}) has no vision transformer whose components are known."
        f"{expected} Lists of modules that it has: {there}. If it is a vision transformer whose blocks have a norm, "
        "self-attention, a norm and an MLP, describe it: plasticity_peft.register_architecture(model_type, "
        "BlockLayout(blocks=..., LN1=..., MHA=..., projections=..., LN2=..., FC1=..., FC2=...)). Known values of "
        f"config.model_type: {', '.join(sorted(LAYOUTS))}."
    )


def _layout_of(block: nn.Module, layouts: Iterable[tuple[str, BlockLayout]]) -> _Named | None:
    """Returns the layout with the most layers whose names all exist in the block; None if there is none.

    Of two that differ only in the order of the layers, it is the one with the order in which the block holds them.
    """
    names = [name for name, _ in walk(block)]
    having = [
        _Named(model_type, layout)
        for model_type, layout in layouts
        if all(name in names for kind in KINDS for name in (layout.path(kind), *layout.weights(kind)))
    ]

    def fit(named: _Named) -> tuple[int, int, bool]:
        weights, order = named.layout.weights, named.layout.order
        layers = sum(len(weights(kind)) for kind in KINDS)
        held = sorted(order, key=lambda kind: names.index(weights(kind)[0]))
        return layers, sum(name in names for name in named.layout.others), held == list(order)

    return max(having, key=fit, default=None)
