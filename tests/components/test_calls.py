"""What a forward pass calls: once, in order, and no hook outlasts it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.calls import block_input, check_calls, first_tensor
from plasticity_peft.errors import DataError, ModelError
from tests.support.models import random_images, tiny_model
from tests.support.snapshots import assert_same, snapshot

IMAGES = {"pixel_values": random_images(3)}


def test_supported_models_call_every_layer_once_in_order(model: PreTrainedModel) -> None:
    check_calls(model, find_architecture(model), IMAGES)


def unused(parts: dict[str, nn.Module], projections: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """A block that uses query and key without calling them, as transformers 4's VideoMAE does."""
    query, key, value, output = projections
    normed = parts["LN1"](x)
    scores = F.linear(normed, query.weight, query.bias) @ F.linear(normed, key.weight, key.bias).mT
    x = x + output(scores.softmax(-1) @ value(normed))
    return x + parts["FC2"](F.gelu(parts["FC1"](parts["LN2"](x))))


def shared(parts: dict[str, nn.Module], projections: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """A block that applies its MLP twice."""
    x = x + first_tensor(parts["MHA"](parts["LN1"](x)))
    for _ in range(2):
        x = x + parts["FC2"](F.gelu(parts["FC1"](parts["LN2"](x))))
    return x


def post_norm(parts: dict[str, nn.Module], projections: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """A block whose norms follow attention and MLP."""
    x = x + parts["LN1"](first_tensor(parts["MHA"](x)))
    return x + parts["LN2"](parts["FC2"](F.gelu(parts["FC1"](x))))


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (unused, r"calls vit\..*(q_proj|query) 0 times. .* has no effect"),
        (shared, r"calls vit\..*layernorm_after 2 times"),
        (post_norm, r"vit\.\S+ is called out of the order LN1, MHA, LN2, FC1, FC2"),
    ],
)
def test_a_block_that_works_otherwise_is_refused(
    forward: Callable[[dict[str, nn.Module], list[nn.Module], torch.Tensor], torch.Tensor], text: str
) -> None:
    model = tiny_model()
    architecture = find_architecture(model)
    second = [part for part in architecture.components if part.block == 1]
    parts = {part.kind: model.get_submodule(part.path) for part in second}
    projections = [model.get_submodule(path) for path in second[1].modules]
    model.get_submodule(architecture.blocks[1]).forward = lambda x, *args, **kwargs: forward(parts, projections, x)
    with pytest.raises(ModelError, match=text):
        check_calls(model, architecture, IMAGES)


def test_the_block_input_is_the_first_hidden_state(model: PreTrainedModel) -> None:
    with torch.no_grad():
        call = block_input(model, find_architecture(model), IMAGES)
        expected = model(**IMAGES, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(call.tokens, expected)


def test_no_hook_outlasts_a_pass_or_a_failure(model: PreTrainedModel) -> None:
    before = snapshot(model)
    architecture = find_architecture(model)
    with torch.no_grad():
        block_input(model, architecture, IMAGES)
        check_calls(model, architecture, IMAGES)
        for shape in ((2, 1, 8, 8), (2, 3, 8)):
            images = {"pixel_values": torch.rand(shape)}
            with pytest.raises(DataError, match="refused pixel_values of shape"):
                block_input(model, architecture, images)
            with pytest.raises(DataError, match="refused pixel_values of shape"):
                check_calls(model, architecture, images)
    before["random"] = snapshot(model)["random"]
    assert_same(before, snapshot(model))
