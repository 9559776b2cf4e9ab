"""Finds the modules of the components by their names (`blocks.py`), and checks their structure (`structure.py`).

LayerScale (DINOv2) and tables of position biases (BEiT, Swin) are bare parameters of a block. They belong to no
component: they are not measured and not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from plasticity_peft.components.blocks import find_stack
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.components.computed import check_plain_weights
from plasticity_peft.components.heads import find_entry, find_heads, within
from plasticity_peft.components.layouts import BlockLayout
from plasticity_peft.components.offloading import onloaded
from plasticity_peft.components.quantized import matrix_of, parameter_count
from plasticity_peft.components.sharding import check_not_flattened
from plasticity_peft.components.structure import check_structure, norm_width
from plasticity_peft.components.wrappers import bare, unwrap, walk
from plasticity_peft.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """The components of one model, and what else measuring needs to know of it. Contains paths, not modules."""

    model_type: str
    """`config.model_type` of the backbone."""
    backbone: str
    """Path of the vision transformer; "" if it is the model itself."""
    trunk: str
    """Path of the module that contains the embeddings and the blocks: the backbone, or a module in it."""
    entry: str
    """Path of the module that is run on images: "" for the model, or the backbone if the model needs text too."""
    blocks: tuple[str, ...]
    """Paths of the blocks, in the order in which they run."""
    components: tuple[Component, ...]
    """Block by block, and within a block in the order of `KINDS`."""
    heads: tuple[str, ...]
    """Paths of the modules that have weights and are not part of the backbone. They train unless the user froze them.
    Empty for a bare backbone."""
    hidden_size: int
    """Features of a token at the input of the first block."""
    parameters: int
    """Number of weights and biases of the whole model, adapters not counted."""
    layout: BlockLayout
    """Names of the parts of a block."""
    forward_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of every forward pass in addition to the images."""

    @property
    def called_heads(self) -> tuple[str, ...]:
        """The heads that take part when the model is run on images."""
        return tuple(head for head in self.heads if within(head, self.entry))

    @property
    def hierarchical(self) -> bool:
        """True if the width or number of tokens changes between blocks, so that no input fits all blocks."""
        return self.components[0].stage is not None


def find_components(model: nn.Module, backbone: str | None = None) -> tuple[Component, ...]:
    """Returns the components of `model`, block by block, in the order LN1, MHA, LN2, FC1, FC2.

    Args:
        model: a vision transformer of transformers, with or without a head, or a model that contains one. It may have
            PEFT adapters. Of a PeftModel, the base model is searched.
        backbone: path of the vision transformer in `model`, such as "model.vision_tower". Required if there are
            several.

    Raises:
        ModelError: there is no supported vision transformer, or more than one, or its structure contradicts its names.
            Use `register_architecture` to add an architecture.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> components = find_components(ViTForImageClassification(config))
        >>> [component.id for component in components][:5]
        ['0.LN1', '0.MHA', '0.LN2', '0.FC1', '0.FC2']
        >>> components[4].features
        ((64, 16),)
    """
    return find_architecture(bare(model), backbone).components


def find_architecture(model: nn.Module, backbone: str | None = None) -> Architecture:
    """Returns the components, blocks and head of `model`. Arguments and errors are those of `find_components`."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module. Got an object of type {type(model).__name__}.")
    check_not_flattened(model)
    stack = find_stack(model, backbone)
    layout = stack.layout
    check_plain_weights(model, stack.paths)
    names = [(path, _indices(path, layout)) for path in stack.paths]
    stages = sorted({indices[0] for _, indices in names}) if len(names[0][1]) == 2 else None
    components = []
    for path, indices in names:
        block = model.get_submodule(path)
        check_structure(path, block, layout)
        stage = None if stages is None else stages.index(indices[0])
        components += [_component(stage, indices[-1], kind, path, block, layout) for kind in KINDS]
    entry = find_entry(model, stack.backbone)
    return Architecture(
        model_type=stack.model_type,
        backbone=stack.backbone,
        trunk=stack.trunk,
        entry=entry,
        blocks=stack.paths,
        components=tuple(components),
        heads=find_heads(model, stack, entry),
        hidden_size=norm_width(model.get_submodule(f"{stack.paths[0]}.{layout.LN1}")),
        parameters=sum(parameter_count(module) for _, module in walk(model)),
        layout=layout,
    )


def weights_of(model: nn.Module, component: Component) -> list[nn.Module]:
    """Returns the modules of the base model that contain the weights of a component."""
    return [unwrap(model.get_submodule(path)) for path in component.modules]


def matrices(model: nn.Module, component: Component) -> list[tuple[str, torch.Tensor]]:
    """Returns (path, weight) for each matrix of a component, or for the gains of a norm, as the model computes now.

    The input layers of a gated MLP count as one matrix with the outputs of all of them. Some releases of transformers
    have them in one layer, and a score must not depend on that. The path is that of the first layer.
    """
    modules = [model.get_submodule(path) for path in component.modules]
    with onloaded(*weights_of(model, component)):
        weights = [matrix_of(module) for module in modules]
    if component.kind == "FC1" and len(weights) > 1:
        return [(component.modules[0], torch.cat([*weights]))]
    return list(zip(component.modules, weights, strict=True))


def _indices(path: str, layout: BlockLayout) -> tuple[int, ...]:
    match = layout.pattern.fullmatch(path)
    assert match
    return tuple(map(int, match.groups()[1:]))


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
