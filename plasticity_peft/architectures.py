"""Which modules of a model are the components: names say it, structure checks it.

The names are rows of data (`layouts.py`), looked up by the model type of the part of the model that holds the blocks.
A row is believed only if the structure agrees: the named modules are all the linear layers and norms that a block has,
no block is left over, and the widths fit together. Whether they are called, and in which order, shows only in a
forward pass: `calls.py` checks that.

LayerScale (DINOv2) and tables of position biases (BEiT, Swin) are bare parameters of a block. They belong to no
component: they are not measured and not trained.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from plasticity_peft.components import KINDS, Component
from plasticity_peft.errors import ModelError
from plasticity_peft.layouts import LAYOUTS, BlockLayout
from plasticity_peft.offloading import onloaded
from plasticity_peft.quantised import matrix_of, parameter_count

PIXELS = "pixel_values"


@dataclass(frozen=True)
class Architecture:
    """The components of one model, and what the probe needs beside them. Holds names, no modules."""

    model_type: str
    """`config.model_type` of the backbone."""
    backbone: str
    """Path of the module that holds embeddings and blocks; "" if that is the model itself."""
    entry: str
    """Path of the module that is run on images: "" for the model, or the backbone where the model needs text too."""
    blocks: tuple[str, ...]
    """Paths of the blocks, in the order in which they run."""
    components: tuple[Component, ...]
    """Block by block, and within a block in the order of `KINDS`."""
    heads: tuple[str, ...]
    """Paths of the modules outside the backbone that hold weights: they always train. Empty for a bare backbone."""
    hidden_size: int
    """Features of a token at the input of the first block."""
    parameters: int
    """Number of weights and biases of the whole model, adapters not counted."""
    layout: BlockLayout
    """Names of the parts of a block."""

    @property
    def hierarchical(self) -> bool:
        """True where tokens change their width or their number on the way, so that no input suits all blocks."""
        return self.components[0].stage is not None


def find_components(model: nn.Module, backbone: str | None = None) -> tuple[Component, ...]:
    """Returns the components of `model`, block by block, in the order LN1, MHA, LN2, FC1, FC2.

    Args:
        model: a vision transformer of transformers, with or without a head, or a model that has one as a part; it may
            carry PEFT adapters, or be a PeftModel, whose base model is then looked at.
        backbone: path of the vision transformer in `model`, such as "model.vision_tower"; needed where there are
            several.

    Raises:
        ModelError: there is no supported vision transformer, or more than one, or its structure disagrees with its
            names. `register_architecture` makes others known.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> components = find_components(ViTForImageClassification(config))
        >>> [component.id for component in components][:5]
        ['0.LN1', '0.MHA', '0.LN2', '0.FC1', '0.FC2']
        >>> components[4].features
        ((64, 16),)
    """
    model = uncompiled(model)
    get_base_model = getattr(model, "get_base_model", None)
    return find_architecture(get_base_model() if callable(get_base_model) else model, backbone).components


def find_architecture(model: nn.Module, backbone: str | None = None) -> Architecture:
    """Returns the components, blocks and head of `model`. Arguments and errors are those of `find_components`."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module. Got an object of type {type(model).__name__}.")
    if uncompiled(model) is not model:
        raise ModelError("Adapt a model before it is compiled: torch.compile(get_peft_model(model, config)).")
    stack = _one_stack(model, backbone)
    layout = stack.layout
    names = [(path, _indices(path, layout)) for path in stack.paths]
    stages = sorted({indices[0] for _, indices in names}) if len(names[0][1]) == 2 else None
    components = []
    for path, indices in names:
        block = model.get_submodule(path)
        _check_structure(path, block, layout)
        stage = None if stages is None else stages.index(indices[0])
        components += [_component(stage, indices[-1], kind, path, block, layout) for kind in KINDS]
    entry = "" if _takes_images_alone(model) else stack.backbone
    return Architecture(
        model_type=stack.model_type,
        backbone=stack.backbone,
        entry=entry,
        blocks=stack.paths,
        components=tuple(components),
        heads=() if entry else _find_heads(model, stack.backbone),
        hidden_size=_norm_width(model.get_submodule(f"{stack.paths[0]}.{layout.LN1}")),
        parameters=sum(parameter_count(module) for _, module in walk(model)),
        layout=layout,
    )


def uncompiled(model: nn.Module) -> nn.Module:
    """Returns the model that torch.compile wrapped, or the model itself."""
    inner = getattr(model, "_modules", {}).get("_orig_mod")
    return model if inner is None else inner


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module of the base model behind `module`, which PEFT may have wrapped once or more."""
    while True:
        children = dict(module.named_children())
        inner = children.get("base_layer", children.get("original_module"))
        if inner is None:
            return module
        module = inner


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) for the modules of the base model, as if no adapter had been put on it."""
    module = unwrap(module)
    yield path, module
    for name, child in module.named_children():
        yield from walk(child, f"{path}.{name}" if path else name)


def weights_of(model: nn.Module, component: Component) -> list[nn.Module]:
    """Returns the modules of the base model that hold the weights of a component."""
    return [unwrap(model.get_submodule(path)) for path in component.modules]


def matrices(model: nn.Module, component: Component) -> list[tuple[str, torch.Tensor]]:
    """Returns (path, weight) for each matrix of a component, or for the gains of a norm.

    The input layers of a gated MLP count as one matrix, whose outputs are those of all, because some releases of
    transformers hold them in one layer: a score must not depend on that. The path is that of the first.
    """
    modules = weights_of(model, component)
    with onloaded(*modules):
        weights = [matrix_of(module) for module in modules]
    if component.kind == "FC1" and len(weights) > 1:
        return [(component.modules[0], torch.cat([*weights]))]
    return list(zip(component.modules, weights, strict=True))


def main_input(module: nn.Module) -> str:
    """Returns the name of the argument in which a model takes images: "pixel_values", as a rule."""
    parameters = inspect.signature(module.forward).parameters
    names = (getattr(module, "main_input_name", PIXELS), PIXELS, f"{PIXELS}_videos")
    return next((name for name in names if str(name).startswith(PIXELS) and name in parameters), PIXELS)


@dataclass(frozen=True)
class _Stack:
    """The blocks of one vision transformer in a model."""

    model_type: str
    backbone: str
    layout: BlockLayout
    paths: tuple[str, ...]


def _indices(path: str, layout: BlockLayout) -> tuple[int, ...]:
    match = layout.pattern.fullmatch(path)
    assert match
    return tuple(map(int, match.groups()[1:]))


def _one_stack(model: nn.Module, backbone: str | None) -> _Stack:
    """Returns the blocks of the vision transformer. Raises ModelError where there is none, or more than one."""
    stacks = _told_apart(list(_stacks(model)))
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
            f"{type(model).__name__} holds {len(stacks)} vision transformers. Say which one with backbone=, one of "
            f"{', '.join(repr(stack.backbone) for stack in stacks)}."
        )
    if not stacks:
        raise ModelError(_nothing_found(model, backbone))
    return stacks[0]


def _told_apart(stacks: list[_Stack]) -> list[_Stack]:
    """Returns the stacks with backbones of different paths: those that share one are named by the part they lie in."""
    shared = {stack.backbone for stack in stacks if sum(stack.backbone == other.backbone for other in stacks) > 1}
    named = []
    for stack in stacks:
        below = stack.paths[0].removeprefix(f"{stack.backbone}." if stack.backbone else "").partition(".")[0]
        path = f"{stack.backbone}.{below}" if stack.backbone else below
        named.append(replace(stack, backbone=path) if stack.backbone in shared else stack)
    return named


def _stacks(model: nn.Module) -> Iterator[_Stack]:
    """Yields the stacks of blocks whose names are known, in the order in which the model holds them.

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
                f"{_leaf_names(modules[named_blocks[0][0]])}; {_leaf_names(modules[path])}."
            )
        first, layout = named_blocks[0]
        assert layout
        yield _Stack(
            model_type=owners[first],
            backbone=_backbone(prefix, owners, modules),
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
    """Returns what to say where no block is known: what was looked for, what is there, what can be done."""
    part = model if backbone is None else model.get_submodule(backbone)
    model_type = getattr(getattr(part, "config", None), "model_type", None)
    lists: list[tuple[str, str]] = []
    for path, module in walk(part):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and len(_leaves(module[0])) >= 4:
            owner = "" if any(path.startswith(f"{other}.") for other, _ in lists) else _leaf_names(module[0])
            lists += [(path, owner)] if owner else []
    there = "; ".join(f"{path}.*: {names}" for path, names in lists) or "none with as many as four layers"
    expected = ""
    if model_type in LAYOUTS:
        rows = [", ".join(name for kind in KINDS for name in row.weights(kind)) for row in LAYOUTS[model_type]]
        expected = f" Its blocks were expected to hold the layers {' or '.join(rows)}."
    return (
        f"{type(part).__name__} (model_type {model_type!r}) has no vision transformer whose components are known."
        f"{expected} Lists of modules that it has: {there}. If it is a vision transformer whose blocks have a norm, "
        "self-attention, a norm and an MLP, describe it: plasticity_peft.register_architecture(model_type, "
        "BlockLayout(blocks=..., LN1=..., MHA=..., projections=..., LN2=..., FC1=..., FC2=...)). Known values of "
        f"config.model_type: {', '.join(sorted(LAYOUTS))}."
    )


def _layout_of(block: nn.Module, layouts: Iterable[BlockLayout]) -> BlockLayout | None:
    """Returns the layout that names the most layers of the block, of those whose names it all has."""
    names = {name for name, _ in walk(block)}
    having = [
        layout
        for layout in layouts
        if all(name in names for kind in KINDS for name in (layout.path(kind), *layout.weights(kind)))
    ]
    return max(having, key=lambda layout: sum(len(layout.weights(kind)) for kind in KINDS), default=None)


def _leaves(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the linear layers and norms of a block: what must belong to exactly one component."""
    return [
        (name, module)
        for name, module in walk(block)
        if isinstance(module, nn.Linear) or type(module).__name__.endswith("Norm")
    ]


def _leaf_names(block: nn.Module) -> str:
    return ", ".join(name for name, _ in _leaves(block))


def _check_structure(path: str, block: nn.Module, layout: BlockLayout) -> None:
    """Raises ModelError unless the structure of the block is what the names of the layout promise."""
    leaves = dict(_leaves(block))
    named = {name for kind in KINDS for name in layout.weights(kind)}
    if set(leaves) - set(layout.others) != named:
        raise ModelError(
            f"Block {path}: its linear layers and norms are {sorted(leaves)}, but the names of this architecture "
            f"account for {sorted({*named, *layout.others})}. A layer that belongs to no component would be passed "
            "over."
        )
    owner = layout.projections[0].rpartition(".")[0]
    if hasattr(block.get_submodule(owner), "q_bias"):
        # VideoMAE until transformers 5: biases of their own tell that only the weights of these layers are read.
        raise ModelError(
            f"Block {path}: its attention holds biases beside its query, key and value layers and uses their weights "
            "without calling them. LoRA on them would do nothing. Use a release of transformers that calls them (for "
            "VideoMAE, 5.0 or later)."
        )
    *inputs, output = (_linear(leaves[name]) for name in layout.projections)
    hidden, fc2 = [_linear(leaves[name]) for name in layout.weights("FC1")], _linear(leaves[layout.FC2])
    # What enters the block may be narrower than what leaves it (Hiera). A norm after its layer has the layer's width.
    entering, leaving = inputs[0].in_features, output.out_features
    query, key, value = (layer.out_features for layer in (inputs if len(inputs) == 3 else inputs * 3))
    if len(inputs) == 1:
        query, key, value = (output.in_features if query == 3 * output.in_features else query,) * 3
    widths = {
        "LN1": (_norm_width(leaves[layout.LN1]), leaving if layout.post_norm else entering),
        "inputs of the projections": (sorted({layer.in_features for layer in inputs}), [entering]),
        "outputs of key": (key, value),
        # With grouped queries (Sapiens 2), several heads share a key and a value.
        "outputs of query": (query % key, 0),
        "inputs of the output projection": (output.in_features % value, 0),
        "LN2": (_norm_width(leaves[layout.LN2]), leaving),
        "inputs of FC1": (sorted({layer.in_features for layer in hidden}), [leaving]),
        "outputs of FC2": (fc2.out_features, leaving),
    }
    wrong = {name: got for name, (got, due) in widths.items() if got != due}
    outputs = {layer.out_features for layer in hidden}
    # The two halves of a gated FC1 may lie in one layer (DINOv2 until transformers 5.17).
    if outputs != {fc2.in_features} and not (len(hidden) == 1 and outputs == {2 * fc2.in_features}):
        wrong["outputs of FC1"] = sorted(outputs)
    if wrong:
        raise ModelError(
            f"Block {path}: its layers do not fit together as a transformer block that takes {entering} features and "
            f"returns {leaving}: {wrong}; FC2 takes {fc2.in_features}."
        )


def _linear(module: nn.Module) -> nn.Linear:
    module = unwrap(module)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"Expected a linear layer. Got {type(module).__name__}.")
    return module


def _norm_width(module: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in unwrap(module).named_parameters() if name == "weight")


def _component(
    stage: int | None, index: int, kind: str, path: str, block: nn.Module, layout: BlockLayout
) -> Component:
    modules = [unwrap(block.get_submodule(name)) for name in layout.weights(kind)]
    return Component(
        stage=stage,
        block=index,
        kind=kind,
        path=f"{path}.{layout.path(kind)}",
        modules=tuple(f"{path}.{name}" for name in layout.weights(kind)),
        parameters=sum(parameter_count(part) for module in modules for _, part in walk(module)),
        features=tuple((m.in_features, m.out_features) for m in modules if isinstance(m, nn.Linear)),
    )


def _takes_images_alone(model: nn.Module) -> bool:
    """Returns False where a forward pass of the model needs more than images: text, for a vision-language model."""
    parameters = inspect.signature(model.forward).parameters
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    text = any(name.endswith("input_ids") for name in parameters)
    return main_input(model) in parameters and not text and set(needed) <= {main_input(model)}


def _find_heads(model: nn.Module, backbone: str) -> tuple[str, ...]:
    """Returns the direct children of the model, outside its backbone, that hold weights.

    In transformers, only the classes that are *for* a task have a head: `...ForImageClassification`.
    """
    if type(model).__module__.startswith("transformers.") and not re.search("For[A-Z]", type(model).__name__):
        return ()
    children = dict(model.named_children())
    prefix = getattr(model, "base_model_prefix", "")
    part = backbone.partition(".")[0] or (prefix if prefix in children else "")
    if not part:
        return ()
    return tuple(
        name
        for name, child in children.items()
        if name != part and any(parameter_count(module) for _, module in walk(child))
    )
