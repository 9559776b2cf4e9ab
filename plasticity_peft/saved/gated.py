"""LoRA on the two input layers of a gated MLP, which are one layer in some releases of transformers.

DINOv2 has one layer until transformers 5.17, and two layers since. LoRA on them is split or joined; its output does
not change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from plasticity_peft.errors import AdapterError
from plasticity_peft.saved.layers import Layer


def split_gated(layer: Layer) -> tuple[Layer, Layer]:
    """Returns the adapters of the two halves of a layer's outputs, the first half first.

    Both get the whole lora_A. Together they compute the output of `layer`.
    """

    def half(number: int) -> Layer:
        lora = {
            name: value.clone() if name == "lora_A.weight" else value.chunk(2)[number].clone()
            for name, value in layer.lora.items()
        }
        full = {name: value.chunk(2)[number].clone() for name, value in layer.full.items()}
        return Layer(lora, full, scaling=layer.scaling)

    return half(0), half(1)


def join_gated(halves: Mapping[int, Layer]) -> Layer:
    """Returns the adapter of one layer whose outputs are the outputs of two layers, one after the other.

    lora_A contains the rows of both, and lora_B is block diagonal: the rank is the sum of the ranks. A half that the
    adapter does not train gets zeros.

    Args:
        halves: the adapters of the first layer, 0, and of the second one, 1; at least one of them.

    Raises:
        AdapterError: only one half is trained, in full or by DoRA. Half a layer cannot be trained like that.
    """
    first = next(iter(halves.values()))
    if len(halves) == 1 and (first.full or "lora_magnitude_vector" in first.lora):
        raise AdapterError(
            "The adapter trains one of the two input layers of a gated MLP in full or by DoRA, and in this release of "
            "transformers both are one layer."
        )
    if first.full:
        return Layer(full={name: torch.cat([halves[0].full[name], halves[1].full[name]]) for name in first.full})
    lora = {
        "lora_A.weight": torch.cat([halves[number].lora["lora_A.weight"] for number in sorted(halves)]),
        "lora_B.weight": _block_diagonal(halves, first),
    }
    for name in sorted(set(first.lora) - set(lora)):
        lora[name] = torch.cat([_vector(name, halves.get(number), first) for number in (0, 1)])
    return Layer(lora, scaling=first.scaling)


def _block_diagonal(halves: Mapping[int, Layer], first: Layer) -> torch.Tensor:
    """Returns lora_B of the joined layer at the scaling of `first`: (outputs of both, ranks of both)."""
    outputs, total = len(first.lora["lora_B.weight"]), sum(layer.rank for layer in halves.values())
    joined = first.lora["lora_B.weight"].new_zeros(2 * outputs, total)
    column = 0
    for number in sorted(halves):
        half = halves[number]
        rows, columns = slice(number * outputs, (number + 1) * outputs), slice(column, column + half.rank)
        joined[rows, columns] = half.lora["lora_B.weight"] * (half.scaling / first.scaling)
        column += half.rank
    return joined


def _vector(name: str, half: Layer | None, first: Layer) -> torch.Tensor:
    """Returns a bias at the scaling of `first`, or a magnitude; zeros for a half that is not trained."""
    if half is None:
        return torch.zeros_like(first.lora[name])
    return half.lora[name] * (half.scaling / first.scaling if name == "lora_B.bias" else 1.0)
