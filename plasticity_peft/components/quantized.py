"""Layers whose weights are stored in fewer bits, by bitsandbytes, torchao and other libraries that PEFT supports.

Each library stores them in its own way: in bytes, in another shape, in a subclass of a tensor. This module uses what
they have in common: a layer computes the product with a matrix, and has attributes for its widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from plasticity_peft.components.sharding import shape_of
from plasticity_peft.components.wrappers import is_adapted, unwrap
from plasticity_peft.errors import ModelError


def holds_plain_weights(module: nn.Module) -> bool:
    """Returns whether the module's own weights are ordinary floating-point parameters, which can be read and trained.

    Examples:
        >>> holds_plain_weights(nn.Linear(2, 2))
        True
    """
    return all(
        parameter.is_floating_point() and type(parameter) in (nn.Parameter, torch.Tensor)
        for parameter in module.parameters(recurse=False)
    )


def matrix_of(module: nn.Module) -> torch.Tensor:
    """Returns the weight of a layer as numbers: (outputs, inputs) of a linear layer, (features,) of a norm.

    The weight of a layer that is quantized, or that has an adapter such as LoRA, is its output for the identity: the
    matrix that it multiplies by. It is in float32 if the layer is quantized.
    """
    layer = unwrap(module)
    plain = holds_plain_weights(layer)
    if not isinstance(layer, nn.Linear) or (plain and not is_adapted(module)):
        return layer.get_parameter("weight")
    parameter = next(layer.parameters(recurse=False))
    dtype, device = parameter.dtype if plain else torch.float32, parameter.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        columns: torch.Tensor = module(torch.eye(layer.in_features, dtype=dtype, device=device))
        nothing: torch.Tensor = module(torch.zeros(1, layer.in_features, dtype=dtype, device=device))
        return (columns.to(dtype) - nothing.to(dtype)).T


def parameter_count(module: nn.Module) -> int:
    """Returns the number of the module's own weights and biases, also if they are quantized.

    Examples:
        >>> parameter_count(nn.Linear(3, 2))
        8
    """
    counts = {name: shape_of(parameter).numel() for name, parameter in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Linear) and "weight" in counts and not holds_plain_weights(module):
        counts["weight"] = module.in_features * module.out_features
    return sum(counts.values())


def check_not_packed(model: nn.Module) -> None:
    """Raises ModelError if bitsandbytes has packed 4-bit weights into a form whose product has no gradient.

    It does so on a CPU with AVX512-BF16 in the first pass of an evaluation.
    """
    for path, module in _that_pack(model).items():
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"{path}: an evaluation on this CPU has packed its 4-bit weights into a form that bitsandbytes cannot "
                "train. Load the model again, and set support_avx512bf16_for_cpu = False on its Linear4bit layers "
                "before it is run."
            )


@contextmanager
def trainable_after(model: nn.Module) -> Iterator[None]:
    """Inside, bitsandbytes does not pack its 4-bit weights, so a model that was measured can be trained.

    Raises:
        ModelError: they have been packed already.
    """
    check_not_packed(model)
    packing = _that_pack(model).values()
    before = [module.support_avx512bf16_for_cpu for module in packing]
    try:
        for module in packing:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        yield
    finally:
        for module, packs in zip(packing, before, strict=True):
            module.support_avx512bf16_for_cpu = packs


def _that_pack(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that would pack their weights, by path."""
    return {path: module for path, module in model.named_modules() if "support_avx512bf16_for_cpu" in vars(module)}
