"""Finds the blocks of a vision transformer in a model, and the names of their layers.

The names are rows of data (`layouts.py`), looked up by the model type of the part of the model that contains the
blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from plasticity_peft.components.component import KINDS
from plasticity_peft.components.layouts import LAYOUTS, BlockLayout
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
    owners: dict[str, str] = {}  # the model type that the nearest config above a module names
    found: dict[tuple[str, str], list[tuple[str, BlockLayout | None]]] = {}
    modules = dict(walk(model))
    for path, module in modules.items():
        own = getattr(getattr(module, "config", None), "model_type", None)
        owners[path] = str(own) if own else owners.get(path.rpartition(".")[0], "")
        layouts = LAYOUTS.get(owners[path], ())
        for blocks in dict.fromkeys(layout.blocks for layout in layouts):
            named = [layout for layout in layouts if layout.blocks == blocks]
            match = named[0].pattern.fullmatch(path)
            if match and not isinstance(module, (nn.ModuleList, nn.Sequential)):
                found.setdefault((match[1], blocks), []).append((path, _layout_of(module, named)))
    for (prefix, _), named_blocks in found.items():
        used = {layout for _, layout in named_blocks}
        if used == {None}:
            continue
        if len(used) > 1:
            path = next(path for path, layout in named_blocks if layout != named_blocks[0][1])
            raise ModelError(
                f"{type(model).__name__}: the blocks {named_blocks[0][0]} and {path} have different layers: "
                f"{leaf_names(modules[named_blocks[0][0]])}; {leaf_names(modules[path])}."
            )
        first, layout = named_blocks[0]
        assert layout
        yield Stack(
            model_type=owners[first],
            backbone=_backbone(prefix, owners, modules),
            trunk=prefix.removesuffix("."),
            layout=layout,
            paths=tuple(path for path, _ in named_blocks),
        )


def _backbone(prefix: str, owners: dict[str, str], modules: dict[str, nn.Module]) -> str:
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
    model_type = getattr(getattr(part, "config", None), "model_type", None)
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


def _layout_of(block: nn.Module, layouts: Iterable[BlockLayout]) -> BlockLayout | None:
    """Returns the layout with the most layers whose names all exist in the block; None if there is none."""
    names = {name for name, _ in walk(block)}
    having = [
        layout
        for layout in layouts
        if all(name in names for kind in KINDS for name in (layout.path(kind), *layout.weights(kind)))
    ]
    return max(having, key=lambda layout: sum(len(layout.weights(kind)) for kind in KINDS), default=None)
