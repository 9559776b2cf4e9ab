"""The paper's protocol, "embedding": every component of every block gets the tokens e that enter block 0.

FC2 takes a wider input, so it gets e padded with zeros. The distance between the inputs is ||e(x) - e(y)||_F for all
components.

All components get the same tokens, so most need not be called. With D = e(x) - e(y), of shape (tokens, features):

    linear W     ||D W^T||^2 = <W^T W, D^T D>; the bias cancels, and the zeros meet the last columns of FC2
    norm         ||LN(x) - LN(y)||^2 = sum_j g_j^2 v_j, v_j the sum over tokens of (x^_j - y^_j)^2, x^ = e normalised
    attention    the module itself up to its output projection, which is applied to the difference alone

D^T D and v are computed once per pair, and W^T W once per model. So the cost of a linear layer for a pair does not
depend on the number of tokens or the width of the MLP. Modules that are not plain linear layers or layer norms
(quantized, adapted, RMSNorm), and distances other than the Euclidean one, are computed from the definition.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import (
    Call,
    Inputs,
    attention_call,
    block_input,
    call_of,
    first_tensor,
    has_tensors,
)
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.components.hooks import after_calls
from plasticity_peft.components.offloading import execution_device, offloaded, onloaded
from plasticity_peft.components.quantized import holds_plain_weights
from plasticity_peft.criteria.precision import full_precision, precise
from plasticity_peft.criteria.protocols.distances import Distance, Distances, difference, euclidean, norm, together


class EmbeddingProtocol:
    """Distances between the outputs of the components for the tokens that enter block 0."""

    def __init__(self, model: nn.Module, architecture: Architecture, distance: Distance = euclidean) -> None:
        self._model, self._architecture, self._distance = model, architecture, distance
        plain = distance is euclidean
        self._linears = _Linears(model, architecture) if plain else None
        self._norms = _Norms(model, architecture) if plain else None
        self._ends_with_projection: bool | None = None if plain and not offloaded(model) else False
        self._attends: dict[tuple[int, torch.Size], Call] = {}

    def __call__(self, both: Inputs) -> Distances:
        """Returns the distances of some pairs: `both` contains the first images of all pairs, then the second ones."""
        call = block_input(self._model, self._architecture, both)
        found: dict[str, torch.Tensor] = {}
        for shortcut in (self._linears, self._norms):
            if shortcut is not None:
                found.update(shortcut(call.tokens))
        for number, part in enumerate(self._architecture.components):
            if part.kind == "MHA":
                found[part.id] = self._attention(part, number // len(KINDS), call)
            elif part.id not in found:
                modules = [self._model.get_submodule(path) for path in part.modules]
                found[part.id] = together([self._by_definition(module, part, call.tokens) for module in modules])
        device = call.tokens.device
        outputs = torch.stack([found[part.id].to(device) for part in self._architecture.components], dim=1)
        return Distances(outputs, self._distance(call.tokens)[:, None].expand_as(outputs))

    def _attention(self, part: Component, index: int, call: Call) -> torch.Tensor:
        attend = self._attention_call(index, call)
        attention = self._model.get_submodule(part.path)
        projection = self._model.get_submodule(part.modules[-1])
        if self._ends_with_projection is None:
            self._ends_with_projection = all(
                _ends_with(self._model.get_submodule(each.path), self._model.get_submodule(each.modules[-1]), attend)
                for each in self._architecture.components
                if each.kind == "MHA"
            )
        if self._ends_with_projection:
            before = call_of(projection, lambda: attention(*attend.args, **attend.kwargs))
            if before is not None:
                weight = projection.get_parameter("weight")
                with full_precision(weight):
                    return norm(F.linear(difference(before.tokens), weight.to(precise(weight.dtype))))
        return self._distance(first_tensor(attention(*attend.args, **attend.kwargs)))

    def _attention_call(self, index: int, call: Call) -> Call:
        """Returns the call of a block's attention on the tokens, with the other arguments of the block: a mask, a
        bias."""
        key = (index, call.tokens.shape[1:])
        # Other arguments of a block, such as a padding mask, may differ between images.
        alike = not has_tensors(call.extras)
        attend = self._attends.get(key) if alike else None
        if attend is None:
            attend = attention_call(self._model, self._architecture, index, call)
            if alike and not has_tensors(attend.extras):  # then the call is the same for all images
                self._attends[key] = attend.with_tokens(attend.tokens[:0])
        return attend.with_tokens(call.tokens)

    def _by_definition(self, module: nn.Module, part: Component, tokens: torch.Tensor) -> torch.Tensor:
        missing = part.features[0][0] - tokens.shape[-1] if part.features else 0
        return self._distance(module(F.pad(tokens, (0, missing))))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and holds_plain_weights(module)


def _ends_with(attention: nn.Module, projection: nn.Module, call: Call) -> bool:
    """Returns whether the output of the attention is the output of its output projection, a plain linear layer."""
    if not _is_plain(projection):
        return False
    seen: list[torch.Tensor] = []
    with after_calls(projection, lambda module, args, kwargs, output: seen.append(output)):
        output = first_tensor(attention(*call.args, **call.kwargs))
    return len(seen) == 1 and seen[0].shape == output.shape and torch.equal(seen[0], output)


class _Linears:
    """The plain linear layers of the MLPs, by their Gram matrices W^T W.

    A pass of a single pair, which needs the least memory, calls the layers themselves: all Gram matrices together take
    a sixth of the memory of a model whose MLP is four times as wide as its tokens.
    """

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self._device, self._width = execution_device(model), architecture.hidden_size
        self._plain: dict[str, list[nn.Module]] = {}
        for part in architecture.components:
            modules = [model.get_submodule(path) for path in part.modules]
            if part.kind in ("FC1", "FC2") and all(map(_is_plain, modules)):
                self._plain[part.id] = modules
        self._grams: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        apart = difference(tokens).flatten(1, -2)
        if not self._plain:
            return {}
        if len(apart) == 1 and self._grams is None:
            return {name: self._distance(modules, apart) for name, modules in self._plain.items()}
        if self._grams is None:
            self._grams = self._make_grams()
        grams, scales = self._grams
        with full_precision(tokens):
            products = (apart.mT @ apart).transpose(0, 1)
            squares = (products @ grams).double().sum(dim=0)
        distances = squares.clamp_min(0).sqrt() * scales
        return dict(zip(self._plain, distances.unbind(dim=1), strict=True))

    def _distance(self, modules: list[nn.Module], apart: torch.Tensor) -> torch.Tensor:
        with onloaded(*modules), full_precision(apart):
            weights = [module.get_parameter("weight")[:, : self._width] for module in modules]
            return together([norm(F.linear(apart, weight.to(apart))) for weight in weights])

    def _make_grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the Gram matrices, (features, features, layers), and the scale of each.

        This layout gives one matrix product per row of D^T D, summed over rows in double precision.
        """
        found, scales = None, []
        for number, modules in enumerate(self._plain.values()):
            with onloaded(*modules):
                gram, scale = _gram([module.get_parameter("weight")[:, : self._width] for module in modules])
            if found is None:
                found = gram.new_empty(*gram.shape, len(self._plain), device=self._device)
            found[:, :, number] = gram.to(self._device)
            scales.append(scale.double().to(self._device))
        assert found is not None
        return found, torch.stack(scales)


def _gram(weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns W^T W / scale^2 and scale, the largest entry of W, for the rows of W in one or more matrices.

    It is summed in parts, so no weight is copied.
    """
    width, dtype = weights[0].shape[1], precise(weights[0].dtype)
    largest = torch.stack([end for weight in weights for end in weight.aminmax()]).abs().max().to(dtype)
    scale = largest.clamp_min(torch.finfo(dtype).tiny)  # squares must not overflow
    gram = weights[0].new_zeros(width, width, dtype=dtype)
    with full_precision(gram):
        for rows in (rows for weight in weights for rows in torch.split(weight, width)):
            scaled = rows.to(dtype) / scale
            gram.addmm_(scaled.T, scaled)
    return gram, scale


class _Norms:
    """The plain layer norms, by their gains."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.ids: dict[float, list[str]] = {}
        self._gains: dict[float, list[torch.Tensor]] = {}
        device = execution_device(model)
        for part in architecture.components:
            module = model.get_submodule(part.path)
            if part.kind in ("LN1", "LN2") and type(module) is nn.LayerNorm and module.weight is not None:
                self.ids.setdefault(module.eps, []).append(part.id)
                with onloaded(module):
                    self._gains.setdefault(module.eps, []).append(module.weight.double().square().to(device))

    def __call__(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for eps, ids in self.ids.items():
            with full_precision(tokens):
                normalised = F.layer_norm(tokens.to(precise(tokens.dtype)), tokens.shape[-1:], eps=eps)
            spread = difference(normalised).flatten(1, -2).double().square().sum(dim=1)
            distances = (spread @ torch.stack(self._gains[eps], dim=1)).sqrt()
            found.update(zip(ids, distances.unbind(dim=1), strict=True))
        return found
