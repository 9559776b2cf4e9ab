"""Sensitivity to noise on a token: the rate of change between an image and the same image with one disturbed token.

    E_x [ ||f(x) - f(x + n)||_F / ||n||_F ],   n: Gaussian noise on one random token

*Transformers Learn Low Sensitivity Functions* (arXiv 2403.06925) disturbs the patches of an image one at a time and
observes the model's predictions. Here the tokens that enter block 0 are disturbed, and the components are observed
with the protocols of `rate_of_change`. The noise is as large as the tokens: its standard deviation is the root mean
square of the features of the image's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Call, block_input
from plasticity_peft.components.hooks import before_calls
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.criteria.rate_of_change import protocol_of, ratios
from plasticity_peft.errors import ModelError
from plasticity_peft.images.sampler import ImageBatch, SingleImages


class TokenSensitivity(Criterion):
    """Rate of change for disturbed tokens."""

    name = "token_sensitivity"
    title = "token sensitivity"
    sampler = SingleImages
    protocols = True

    def prepare(
        self, model: nn.Module, architecture: Architecture, sampler: SingleImages
    ) -> Callable[[ImageBatch], Observations]:
        """Returns the function from images to the rate of change between each image and its disturbed copy."""
        block = model.get_submodule(architecture.blocks[0])
        tokens = block_input(model, architecture, sampler.example()).tokens
        if tokens.shape[-1] != architecture.hidden_size:
            raise ModelError(
                f"{type(model).__name__}: its blocks take {tuple(tokens.shape[1:])} per image, not tokens of "
                f"{architecture.hidden_size} features. Use another criterion."
            )
        distances = protocol_of(sampler)(model, architecture)

        def observe(batch: ImageBatch) -> Observations:
            twice = {name: torch.cat([value, value]) for name, value in batch.images.items()}
            with _second_half_disturbed(block, [sampler.generator(number) for number in batch.numbers]):
                return ratios(architecture, distances(twice))

        return observe


@contextmanager
def _second_half_disturbed(block: nn.Module, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Inside, noise is added to the second half of a batch of tokens that enters the block, one generator per
    image."""

    def disturb(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        call = Call(args, kwargs)
        first, second = call.tokens.chunk(2)
        return call.with_tokens(torch.cat([first, disturbed(second, generators)]))

    with before_calls(block, disturb):
        yield


def disturbed(tokens: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Returns the tokens (images, tokens, features) with noise on one token of each image."""
    tokens = tokens.clone(memory_format=torch.contiguous_format)
    # The windows or patches of an image may be separate rows.
    for image, generator in zip(tokens.view(len(generators), -1, tokens.shape[-1]), generators, strict=True):
        place = int(torch.randint(len(image), (), generator=generator, device="cpu"))
        noise = torch.randn(image.shape[-1], generator=generator, device="cpu", dtype=torch.float32).to(image.device)
        image[place] += (noise * image.float().square().mean().sqrt()).to(image.dtype)
    return tokens
