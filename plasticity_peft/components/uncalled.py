"""Projections whose weights an attention uses without calling them, as BEiT, EVA-02 and Swin V2 of timm do.

Their biases are parameters of the attention, which computes `F.linear(x, self.qkv.weight, bias)`. A hook on such a
layer sees nothing, and LoRA on it would have no effect. A copy of the layer that trains in full is used, because the
weight of the copy takes the place of the layer's.

To measure such a model, its attention is made to call the layers: what it computes stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from plasticity_peft.components.hooks import ReplacedForward, is_of, put_back_forward


@contextmanager
def calling(model: nn.Module, attentions: Mapping[str, Iterable[str]]) -> Iterator[None]:
    """Inside, attentions call their projections where they would use the weights alone.

    Args:
        model: the model in which all paths lie.
        attentions: for the path of each such attention, the paths of the projections that it does not call.
    """
    replaced = [model.get_submodule(path) for path in attentions]
    try:
        for module, paths in zip(replaced, attentions.values(), strict=True):
            module.forward = _Calling(module, [model.get_submodule(path) for path in paths])
        yield
    finally:
        for module in replaced:
            put_back_forward(module)


class _Calling(ReplacedForward):
    """The forward pass of an attention that calls its projections. Calls from other threads are plain ones."""

    def __init__(self, attention: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__(attention)
        self._layers = layers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_of(self._thread):
            return self._forward(*args, **kwargs)
        with _ByLayers(self._layers):
            return self._forward(*args, **kwargs)


class _ByLayers(TorchFunctionMode):
    """Inside, `F.linear` with the weight of one of the layers calls the layer."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self._layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:  # torch switches this mode off here, so that the layer is not asked to call itself
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        layer = next((layer for layer in self._layers if layer.weight is weight), None)
        if layer is None:
            return F.linear(input, weight, bias)
        output: torch.Tensor = layer(input)
        if layer.bias is not bias:
            output = output if layer.bias is None else output - layer.bias  # type: ignore[operator]
            output = output if bias is None else output + bias
        return output
