"""Training runs that go on at once: their parameters are stacked, and `torch.func.vmap` maps each step over them.

The recipe is that of the Trainer: AdamW without weight decay, a linear warm-up in the first tenth of the steps, a
cosine schedule, and gradients whose norm is clipped to 1. A small model leaves most of a GPU idle; several runs of it
take hardly longer than one. On a GPU the step is recorded once and replayed as a CUDA graph, because Python would
need longer to start its operations than the GPU to do them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F
from transformers import AttentionInterface

from plasticity_peft.measuring.pilot import scheduled

BATCH_SIZE = 32
EVALUATED, EVALUATED_ON_CPU = 250, 50
"""Number of images in one pass of the evaluation. On a CPU they should fit into its caches."""
EAGER_STEPS = 3
"""Number of steps before one is recorded on a GPU: torch asks for a few, which allocate what later ones use."""


PLAIN = "plain_attention"
"""Name under which transformers finds `plain_attention`."""


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Returns what attention comes to, (batch, tokens, heads, features), by operations that vmap can batch.

    For this name transformers makes no mask. The mask that it makes for "eager" is copied from the CPU in each pass,
    which a CUDA graph cannot record.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = (query @ key.transpose(-1, -2) * scale).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLAIN, plain_attention)


class Part(NamedTuple):
    """Images of one split, on the device of the model."""

    images: torch.Tensor
    """Pixel values, (images, channels, height, width)."""
    labels: torch.Tensor
    """Whole numbers, (images,)."""


class StackedRuns:
    """Copies of a model that train at once, each at its own rates."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        rates: Sequence[Mapping[str, float]],
        images: Part,
        order: torch.Tensor,
    ) -> None:
        """Prepares the runs.

        Args:
            models: a model for each run. They differ in the parameters that train only, are in evaluation mode, and
                have `plain_attention`. They stay as they are.
            rates: the rates of each run, by the names of the parameters that train.
            images: the images to train on.
            order: the numbers of the images of each batch, (steps, runs, batch).
        """
        self.model, self.images = models[0], images
        self.names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        by_run = [dict(model.named_parameters()) for model in models]
        self.values = {name: torch.stack([own[name].detach() for own in by_run]) for name in self.names}
        device = images.images.device
        self.order = order.to(device)
        self.norms = torch.zeros(order.shape[:2], device=device)
        """Norm of the gradient of each run before it is clipped, (steps, runs)."""
        self.done = 0
        steps = len(order)
        self._schedule = torch.tensor([scheduled(number, steps) for number in range(steps)], device=device)
        self._number = torch.zeros((), dtype=torch.long, device=device)
        self._parameters = {
            (name, run): values[run] for name, values in self.values.items() for run in range(len(models))
        }
        self._rates: list[tuple[torch.Tensor, float]] = []
        self._optimizer = self._create_optimizer(rates)
        self._graph: torch.cuda.CUDAGraph | None = None

    def _create_optimizer(self, rates: Sequence[Mapping[str, float]]) -> torch.optim.Optimizer:
        """Returns AdamW, with a group for each run and rate. The rates are tensors, which a graph can change."""
        groups = []
        for run, own in enumerate(rates):
            for rate in dict.fromkeys(own[name] for name in self.names):
                parameters = [self._parameters[name, run] for name in self.names if own[name] == rate]
                now = torch.tensor(rate, dtype=torch.float32, device=self.order.device)
                self._rates.append((now, rate))
                groups.append({"params": parameters, "lr": now})
        on_gpu = self.order.device.type == "cuda"
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=on_gpu)

    def train(self, until: int) -> None:
        """Trains up to a number of steps, counted from the start."""
        on_gpu = self.order.device.type == "cuda"
        while self.done < until:
            if on_gpu and self._graph is None and self.done >= EAGER_STEPS:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._step()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step()
            self.done += 1

    def _step(self) -> None:
        """Trains one step. All that depends on its number is read from tensors."""
        rows = self.order.index_select(0, self._number.reshape(1))[0]
        gradients, _ = vmap(grad_and_value(self._loss))(
            self.values, self.images.images[rows], self.images.labels[rows]
        )
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
        self.norms.index_copy_(0, self._number.reshape(1), norms[None])
        clip = (1 / (norms + 1e-6)).clamp_max(1)
        # A run that diverged stays where it is, and does not stop the others.
        clipped = {
            name: torch.nan_to_num(gradient * clip.reshape(-1, *[1] * (gradient.ndim - 1)))
            for name, gradient in gradients.items()
        }
        self._assign(clipped)
        factor = self._schedule.index_select(0, self._number.reshape(1))[0]
        for now, peak in self._rates:
            now.copy_(factor * peak)
        self._optimizer.step()
        self._number += 1

    def _assign(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Gives each run's parameters their gradients."""
        for (name, run), parameter in self._parameters.items():
            parameter.grad = gradients[name][run]

    def _loss(self, values: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(values, images), labels)

    def logits(self, values: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """Returns the logits of one run."""
        return functional_call(self.model, values, kwargs={"pixel_values": images}).logits

    @torch.no_grad()
    def accuracies(self, part: Part) -> list[float]:
        """Returns the share of right answers of each run."""
        run = vmap(self.logits, in_dims=(0, None))
        batches = part.images.split(EVALUATED_ON_CPU if self.order.device.type == "cpu" else EVALUATED)
        answers = torch.cat([run(self.values, batch).argmax(dim=-1) for batch in batches], dim=1)
        return (answers == part.labels).double().mean(dim=1).tolist()


def order_of_images(images: int, seeds: Sequence[int], steps: int) -> torch.Tensor:
    """Returns the numbers of the images of each batch, (steps, seeds, batch).

    Each seed has its own order, drawn anew in each epoch. An epoch repeats no image.
    """
    by_seed = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-steps // (images // BATCH_SIZE))
        drawn = [torch.randperm(images, generator=generator) for _ in range(epochs)]
        batches = [row[: images - images % BATCH_SIZE].reshape(-1, BATCH_SIZE) for row in drawn]
        by_seed.append(torch.cat(batches)[:steps])
    return torch.stack(by_seed, dim=1)
