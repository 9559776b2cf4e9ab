"""The paper's upper bounds on the rate of change, from the weights alone (arXiv 2602.06883, section 4).

    norm       max |gain| / std of its input
    linear     ||W||, the spectral norm
    attention  sum over heads of ||O_h|| ||V_h|| sqrt(3 n + (12 n + 3) r^4 ||A_h||^2)

A_h = W_Q,h^T W_K,h / sqrt(d_h). n is the number of tokens, and r is the root mean square of their norms. The std is
that of the features of a token, mean over tokens. The tokens are those of a blank image (zeros, the mean of what an
image processor makes), so no data are needed. A head is d_h *rows* of the query, key and value weights, because heads
split the output features of these layers, and d_h columns of the output projection. The authors' script slices columns
of all four.
"""

from __future__ import annotations

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture, matrices, weights_of
from plasticity_peft.components.calls import Inputs, block_input, why_unlike
from plasticity_peft.components.component import Component
from plasticity_peft.criteria.criterion import WeightCriterion
from plasticity_peft.errors import ModelError


class Bound(WeightCriterion):
    """Upper bound on the rate of change."""

    name = "bound"
    title = "upper bound"

    def score(self, model: nn.Module, architecture: Architecture, *, image: Inputs, seed: int) -> torch.Tensor:
        """Returns the upper bound of each component."""
        reason = why_unlike(model, architecture, image)
        if reason:
            raise ModelError(
                f"criterion='bound' uses the tokens that enter the first block as the input of every component, and "
                f"{reason} ({type(model).__name__}). Use another criterion."
            )
        tokens = block_input(model, architecture, image).tokens[0].double()
        config = model.get_submodule(architecture.backbone).config
        heads = int(config.num_attention_heads)  # type: ignore[arg-type, union-attr]
        bounds = [_bound(model, part, tokens, heads) for part in architecture.components]
        return torch.stack(bounds).cpu()


def _bound(model: nn.Module, part: Component, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    weights = [weight.double() for _, weight in matrices(model, part)]
    if part.kind == "MHA":
        query, key, value, output = weights if len(weights) == 4 else (*weights[0].chunk(3), weights[1])
        if len(key) != len(query):
            raise ModelError(
                f"{part.id}: the bound holds for attention in which each head has its own keys. Here heads share them."
            )
        r = float(tokens.square().sum(dim=1).mean().sqrt())
        return attention_bound(query, key, value, output, heads=heads, tokens=len(tokens), r=r)
    if part.features:
        return _spectral(weights[0])
    norm = weights_of(model, part)[0]
    # A root mean square norm, which has no bias, does not subtract the mean.
    centred = tokens - tokens.mean(dim=1, keepdim=True) if "bias" in dict(norm.named_parameters()) else tokens
    variance = centred.square().mean(dim=1) + getattr(norm, "eps", 0.0)
    return weights[0].abs().max() / variance.sqrt().mean()


def attention_bound(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    *,
    heads: int,
    tokens: int,
    r: float,
) -> torch.Tensor:
    """Returns the bound of self-attention.

    Args:
        query: weight of shape (heads * d_h, d); so are `key` and `value`, and `output` is (d, heads * d_h).
        key: see `query`.
        value: see `query`.
        output: see `query`.
        heads: number of heads.
        tokens: number of tokens, n.
        r: root mean square of the norms of the tokens.
    """
    total = query.new_zeros(())
    by_head = [torch.chunk(weight, heads) for weight in (query, key, value)] + [torch.chunk(output, heads, dim=1)]
    for q, k, v, o in zip(*by_head, strict=True):
        scores = _spectral(q.T @ k) / len(q) ** 0.5
        total = total + _spectral(o) * _spectral(v) * (3 * tokens + (12 * tokens + 3) * r**4 * scores**2).sqrt()
    return total


def _spectral(matrix: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.matrix_norm(matrix, ord=2)
    return norm
