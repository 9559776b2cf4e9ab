"""Which modules of a model are the components: names say it, structure checks it.

Each architecture is a row of data, `BlockLayout`, with the names that its block uses; families that were renamed have
one row per naming, and what exists in the model decides between them, not a version number. A row is believed only if
the structure agrees: the named modules are all the linear layers and norms that the block has, and their widths fit
together. Whether they are called, and in which order, shows only in a forward pass: `calls.py` checks that.

LayerScale (Dinov2) is a bare parameter of the block that multiplies a component's output. It belongs to no component:
it is not measured and not trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from plasticity_peft.components import KINDS, Component
from plasticity_peft.errors import ModelError


@dataclass(frozen=True)
class BlockLayout:
    """Where a block keeps its components: paths relative to the block."""

    LN1: str
    MHA: str
    projections: tuple[str, ...]
    """The linear layers of the attention: query, key, value, and last the output projection."""
    LN2: str
    FC1: str
    FC2: str

    def path(self, kind: str) -> str:
        """Returns the path of the module that computes the component of this kind."""
        return str(getattr(self, kind))

    def weights(self, kind: str) -> tuple[str, ...]:
        """Returns the paths of the modules that hold the weights of the component of this kind."""
        return self.projections if kind == "MHA" else (self.path(kind),)


_SPLIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_NESTED = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
)

VIT = BlockLayout("layernorm_before", "attention", _SPLIT, "layernorm_after", "mlp.fc1", "mlp.fc2")
VIT_UNTIL_5_8 = BlockLayout(
    "layernorm_before", "attention", _NESTED, "layernorm_after", "intermediate.dense", "output.dense"
)
DINOV2 = BlockLayout("norm1", "attention", _SPLIT, "norm2", "mlp.fc1", "mlp.fc2")
DINOV2_UNTIL_5_17 = BlockLayout("norm1", "attention", _NESTED, "norm2", "mlp.fc1", "mlp.fc2")

LAYOUTS: dict[str, tuple[BlockLayout, ...]] = {
    "deit": (VIT, VIT_UNTIL_5_8),
    "dinov2": (DINOV2, DINOV2_UNTIL_5_17),
    "vit": (VIT, VIT_UNTIL_5_8),
}
"""The supported values of `config.model_type`, each with the namings of its block, newest first."""


@dataclass(frozen=True)
class Architecture:
    """The components of one model, and what the probe needs beside them. Holds names, no modules."""

    model_type: str
    blocks: tuple[str, ...]
    """Paths of the blocks, in the order of their indices."""
    components: tuple[Component, ...]
    """Block by block, and within a block in the order of `KINDS`."""
    heads: tuple[str, ...]
    """Paths of the modules outside the backbone that hold weights: they always train. Empty for a bare backbone."""
    hidden_size: int
    """Features of a token."""
    parameters: int
    """Number of weights and biases of the whole model, adapters not counted."""


def find_components(model: nn.Module) -> tuple[Component, ...]:
    """Returns the components of `model`, block by block, in the order LN1, MHA, LN2, FC1, FC2.

    Args:
        model: a vision transformer of transformers, with or without a head; it may carry PEFT adapters, or be a
            PeftModel, whose base model is then looked at.

    Raises:
        ModelError: the model is not a supported vision transformer, or its structure disagrees with its names.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> components = find_components(ViTForImageClassification(config))
        >>> [component.id for component in components][:5]
        ['0.LN1', '0.MHA', '0.LN2', '0.FC1', '0.FC2']
        >>> components[4].features
        ((64, 16),)
    """
    get_base_model = getattr(model, "get_base_model", None)
    return find_architecture(get_base_model() if callable(get_base_model) else model).components


def find_architecture(model: nn.Module) -> Architecture:
    """Returns the components, blocks and head of `model`. Arguments and errors are those of `find_components`."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in LAYOUTS:
        raise ModelError(
            f"{type(model).__name__} (model_type {model_type!r}) is not a vision transformer whose components are "
            f"known. Supported values of config.model_type: {', '.join(sorted(LAYOUTS))}."
        )
    stack, blocks, layout = _find_blocks(model, LAYOUTS[model_type])
    paths = tuple(f"{stack}.{name}" for name, _ in blocks)
    for path, (_, block) in zip(paths, blocks, strict=True):
        _check_structure(path, block, layout)
    hidden_size = _linear(blocks[0][1].get_submodule(layout.projections[0])).in_features
    return Architecture(
        model_type=model_type,
        blocks=paths,
        components=tuple(
            _component(index, kind, path, block, layout)
            for index, (path, (_, block)) in enumerate(zip(paths, blocks, strict=True))
            for kind in KINDS
        ),
        heads=_find_heads(model),
        hidden_size=hidden_size,
        parameters=sum(_own_parameters(module) for _, module in walk(model)),
    )


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


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _find_blocks(
    model: nn.Module, layouts: tuple[BlockLayout, ...]
) -> tuple[str, list[tuple[str, nn.Module]], BlockLayout]:
    """Returns (path of the list of blocks, its named children, the layout that they all have)."""
    stacks = [
        (path, list(module.named_children()))
        for path, module in walk(model)
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    found = [
        (path, blocks, layout)
        for path, blocks in stacks
        for layout in layouts
        if all(_has_layout(block, layout) for _, block in blocks)
    ]
    if len(found) != 1:
        names = [f"{path}.0: {', '.join(name for name, _ in _leaves(blocks[0][1]))}" for path, blocks in stacks]
        raise ModelError(
            f"{type(model).__name__}: expected one list of blocks with the layers {_expected(layouts)}; found "
            f"{len(found)}. The lists of modules that it has hold: {'; '.join(names) or 'none'}."
        )
    return found[0]


def _expected(layouts: tuple[BlockLayout, ...]) -> str:
    return " or ".join(", ".join(name for kind in KINDS for name in layout.weights(kind)) for layout in layouts)


def _has_layout(block: nn.Module, layout: BlockLayout) -> bool:
    names = {name for name, _ in walk(block)}
    return all(name in names for kind in KINDS for name in (layout.path(kind), *layout.weights(kind)))


def _leaves(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the linear layers and norms of a block: what must belong to exactly one component."""
    return [
        (name, module)
        for name, module in walk(block)
        if isinstance(module, nn.Linear) or type(module).__name__.endswith("Norm")
    ]


def _check_structure(path: str, block: nn.Module, layout: BlockLayout) -> None:
    """Raises ModelError unless the structure of the block is what the names of the layout promise."""
    leaves = dict(_leaves(block))
    named = {name for kind in KINDS for name in layout.weights(kind)}
    if set(leaves) != named:
        raise ModelError(
            f"Block {path}: its linear layers and norms are {sorted(leaves)}, but the names of this architecture "
            f"account for {sorted(named)}. A layer that belongs to no component would be passed over."
        )
    query, key, value, output = (_linear(leaves[name]) for name in layout.projections)
    fc1, fc2 = _linear(leaves[layout.FC1]), _linear(leaves[layout.FC2])
    width = query.in_features
    widths = {
        "key": key.in_features,
        "value": value.in_features,
        "output projection (outputs)": output.out_features,
        "LN1": _norm_width(leaves[layout.LN1]),
        "LN2": _norm_width(leaves[layout.LN2]),
        "FC1": fc1.in_features,
        "FC2 (outputs)": fc2.out_features,
    }
    wrong = {name: found for name, found in widths.items() if found != width}
    if wrong or fc1.out_features != fc2.in_features or output.in_features != value.out_features:
        raise ModelError(
            f"Block {path}: its layers do not fit together as a transformer block of width {width}: "
            f"{wrong or widths}, FC1 {fc1.in_features}->{fc1.out_features}, FC2 {fc2.in_features}->{fc2.out_features}."
        )


def _linear(module: nn.Module) -> nn.Linear:
    module = unwrap(module)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"Expected a linear layer. Got {type(module).__name__}.")
    return module


def _norm_width(module: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in module.named_parameters() if name == "weight")


def _component(index: int, kind: str, path: str, block: nn.Module, layout: BlockLayout) -> Component:
    modules = [unwrap(block.get_submodule(name)) for name in layout.weights(kind)]
    return Component(
        block=index,
        kind=kind,
        path=f"{path}.{layout.path(kind)}",
        modules=tuple(f"{path}.{name}" for name in layout.weights(kind)),
        parameters=sum(parameter.numel() for module in modules for parameter in module.parameters()),
        features=tuple((m.in_features, m.out_features) for m in modules if isinstance(m, nn.Linear)),
    )


def _find_heads(model: nn.Module) -> tuple[str, ...]:
    """Returns the direct children of the model, outside its backbone, that hold weights."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix not in dict(model.named_children()):
        return ()
    return tuple(
        name
        for name, child in model.named_children()
        if name != prefix and any(_own_parameters(module) for _, module in walk(child))
    )
