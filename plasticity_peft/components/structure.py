"""Checks that a block has the structure that the names of its layers promise.

A row of `layouts.py` is used only if the structure agrees with it: the named modules are all the linear layers and
norms of a block, every block is covered, and the widths fit together. Only a forward pass shows whether the layers are
called, and in which order; `calls.py` checks that.
"""

from __future__ import annotations

from torch import nn

from plasticity_peft.components.component import KINDS
from plasticity_peft.components.layouts import BlockLayout
from plasticity_peft.components.sharding import shape_of
from plasticity_peft.components.wrappers import leaves, unwrap
from plasticity_peft.errors import ModelError


def check_structure(path: str, block: nn.Module, layout: BlockLayout) -> None:
    """Raises ModelError unless the block has the structure that the names of the layout promise."""
    layers = dict(leaves(block))
    named = {name for kind in KINDS for name in layout.weights(kind)}
    if set(layers) - set(layout.others) != named:
        raise ModelError(
            f"Block {path}: its linear layers and norms are {sorted(layers)}, but the names of this architecture "
            f"account for {sorted({*named, *layout.others})}. A layer that belongs to no component would be "
            "ignored."
        )
    wrong, block_widths, fc2 = _wrong_widths(layers, layout)
    if wrong:
        raise ModelError(
            f"Block {path}: its layers do not fit together as a transformer block that takes {block_widths[0]} "
            f"features and returns {block_widths[1]}: {wrong}; FC2 takes {fc2}."
        )


def _wrong_widths(layers: dict[str, nn.Module], layout: BlockLayout) -> tuple[dict[str, object], tuple[int, int], int]:
    """Returns the widths that do not fit together, the widths of the block's input and output, and that of FC2."""
    *inputs, output = (_linear(layers[name]) for name in layout.projections)
    hidden, fc2 = [_linear(layers[name]) for name in layout.weights("FC1")], _linear(layers[layout.FC2])
    # The input of a block may be narrower than its output (Hiera). A norm after its layer has the layer's width.
    entering, leaving = inputs[0].in_features, output.out_features
    query, key, value = (layer.out_features for layer in (inputs if len(inputs) == 3 else inputs * 3))
    if len(inputs) == 1:
        query, key, value = (output.in_features if query == 3 * output.in_features else query,) * 3
    widths = {
        "LN1": (norm_width(layers[layout.LN1]), leaving if layout.post_norm else entering),
        "inputs of the projections": (sorted({layer.in_features for layer in inputs}), [entering]),
        "outputs of key": (key, value),
        # With grouped queries (Sapiens 2), several heads share a key and a value.
        "outputs of query": (query % key, 0),
        "inputs of the output projection": (output.in_features % value, 0),
        "LN2": (norm_width(layers[layout.LN2]), leaving),
        "inputs of FC1": (sorted({layer.in_features for layer in hidden}), [leaving]),
        "outputs of FC2": (fc2.out_features, leaving),
    }
    wrong: dict[str, object] = {name: got for name, (got, due) in widths.items() if got != due}
    outputs = {layer.out_features for layer in hidden}
    # The two halves of a gated FC1 may lie in one layer (DINOv2 until transformers 5.17).
    if outputs != {fc2.in_features} and not (len(hidden) == 1 and outputs == {2 * fc2.in_features}):
        wrong["outputs of FC1"] = sorted(outputs)
    return wrong, (entering, leaving), fc2.in_features


def _linear(module: nn.Module) -> nn.Linear:
    module = unwrap(module)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"Expected a linear layer. Got {type(module).__name__}.")
    return module


def norm_width(module: nn.Module) -> int:
    """Returns the number of features that a norm scales."""
    return sum(
        shape_of(parameter).numel() for name, parameter in unwrap(module).named_parameters() if name == "weight"
    )
