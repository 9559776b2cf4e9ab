"""Tangent kernels of components: inner products of the gradients of images, from sketches of these gradients.

The gradient is that of the features, projected on a few random directions that all images share, with respect to the
parameters of a layer. For a linear layer it is G' X, with the inputs X (tokens, inputs) and the gradient G at the
output (tokens, outputs). A sketch of it is (G P)' (X Q), with random P (outputs, `WIDTH`) and Q (inputs, `WIDTH`), so
that the gradient itself is never formed. Inner products of sketches are those of gradients in the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.criteria.gradients import gradients_of_rows

WIDTH = 20
"""Rows and columns of the sketch of a gradient. A smaller gradient is kept as it is."""


_SIDES = ("outputs", "inputs", "whole")
"""What is projected: a side of the gradient of a linear layer, or a sketch that is still too wide."""


@dataclass(frozen=True, eq=False)
class Sketcher:
    """Sketches the gradient of a layer, image by image. Every process draws the same projections."""

    layers: Sequence[str]
    """Paths of all layers."""
    seed: int
    width: int = WIDTH
    _drawn: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def __call__(self, path: str, layer: nn.Module, tokens: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Returns the sketches: float32 of shape (images, numbers).

        Args:
            path: path of the layer.
            layer: a linear layer, a norm, or any other module with weights of its own.
            tokens: input of the layer, (images, tokens, inputs).
            gradients: gradient at the output of the layer, (images, tokens, outputs).
        """
        if isinstance(layer, nn.Linear):
            if layer.bias is not None:
                tokens = F.pad(tokens, (0, 1), value=1.0)
            back = self._narrowed(path, "outputs", gradients, self.width)
            found = (back.mT @ self._narrowed(path, "inputs", tokens, self.width)).flatten(1)
        elif type(layer) is nn.LayerNorm and layer.elementwise_affine and layer.bias is not None:
            normalized = F.layer_norm(tokens, layer.normalized_shape, eps=layer.eps)
            found = torch.cat([(normalized * gradients).sum(dim=1), gradients.sum(dim=1)], dim=1)
        else:
            rows = gradients_of_rows(layer, tokens, gradients)
            found = torch.stack([torch.cat([slope.flatten() for slope in slopes]) for slopes in rows])
        return self._narrowed(path, "whole", found, self.width**2).float().cpu()

    def _narrowed(self, path: str, side: str, values: torch.Tensor, width: int) -> torch.Tensor:
        """Returns values (..., numbers) projected to (..., width), or as they are if they are narrow already."""
        numbers = values.shape[-1]
        if numbers <= width:
            return values
        if (path, side) not in self._drawn:
            state = np.random.SeedSequence([self.seed, self.layers.index(path), _SIDES.index(side)]).generate_state(1)
            generator = torch.Generator("cpu").manual_seed(int(state[0]))
            drawn = torch.randn(numbers, width, generator=generator, device="cpu", dtype=torch.float32)
            self._drawn[path, side] = drawn / width**0.5
        return values @ self._drawn[path, side].to(values)


@dataclass(frozen=True, eq=False)
class Tangents:
    """Sketches of the gradients of n images for each layer, by path: float32 of shape (n, directions, numbers)."""

    sketches: Mapping[str, np.ndarray]

    def kernels(self, architecture: Architecture) -> dict[str, np.ndarray]:
        """Returns the kernel of each component, by its id: float32 of shape (n, n), centered.

        Adam divides a step by the size of the gradient. So the kernel of a layer is divided by the root mean square of
        its gradient for one parameter. The mean of the diagonal of the sum of all kernels is 1.
        """
        found = {}
        for part in architecture.components:
            counts = _parameters(part.parameters, part.features)
            weighted = [
                _weighted(self.sketches[path], count) for path, count in zip(part.modules, counts, strict=True)
            ]
            found[part.id] = _centered(sum(weighted[1:], start=weighted[0]))
        scale = sum(float(np.trace(kernel)) / len(kernel) for kernel in found.values())
        return {name: kernel / np.float32(scale or 1.0) for name, kernel in found.items()}


def _parameters(total: int, features: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the number of parameters of each layer of a component."""
    if not features:
        return [total]
    sizes = [inputs * outputs for inputs, outputs in features]
    return [round(total * size / sum(sizes)) for size in sizes]


def _weighted(sketches: np.ndarray, parameters: int) -> np.ndarray:
    """Returns the kernel of a layer, divided by the root mean square of its gradient for one parameter."""
    rows = sketches.reshape(len(sketches), -1)
    kernel = rows @ rows.T / np.float32(sketches.shape[1])
    size = float(np.sqrt(np.trace(kernel) / len(kernel) / parameters))
    return np.asarray(kernel / np.float32(size)) if size > 0 else kernel


def _centered(kernel: np.ndarray) -> np.ndarray:
    """Returns the kernel of the features less their mean over the images."""
    means = kernel.mean(axis=0)
    return np.asarray(kernel - means - means[:, None] + means.mean())
