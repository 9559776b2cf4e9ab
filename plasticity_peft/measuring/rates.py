"""Learning rates for Adam, one for each group of what trains in a model.

What a step of Adam changes depends on the learning rate and on how many weights move together: to first order the loss
falls by `rate * ||gradient||_1`. A rate that is inversely proportional to this norm is too large if the gradient is
mostly noise, and too small if the features have to move far. A rate that is inversely proportional to the number of
weights does not see the data. Weights that train in full get the geometric mean of the two. LoRA has no gradient to
speak of before it trains, as one of its two matrices is zero; its rate follows from the sizes of the layers.

A gradient that comes through a fresh head is noise, and so small that the rate would be far too large. A decoder of
a segmentation or a depth model cannot be fitted in closed form, so what is in front of it gets at most the rate by
size. A decoder itself trains at the rate of other matrices of its size. That is near what others use: 4.7e-4 for that
of SegFormer-B0, whose authors train it at 6e-4, and 5.5e-5 for UperNet with 30 million weights, where mmsegmentation
has 6e-5.
`examples/benchmarks/rates.py` compares these rates with grids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from plasticity_peft.components.architecture import Architecture, find_architecture, weights_of
from plasticity_peft.components.calls import input_names, label_names, with_forward_kwargs
from plasticity_peft.components.component import Component
from plasticity_peft.components.heads import within
from plasticity_peft.components.quantized import holds_plain_weights
from plasticity_peft.components.sharding import shape_of, whole
from plasticity_peft.components.wrappers import bare
from plasticity_peft.criteria.losses import own_loss
from plasticity_peft.errors import ConfigError, DataError, ModelError, NonFiniteError
from plasticity_peft.images.indexed import Images
from plasticity_peft.images.items import LABELS
from plasticity_peft.images.sampler import Batches
from plasticity_peft.measuring.head import (
    FittedHead,
    fit_of,
    fitted_head,
    is_fitted,
    linear_at,
    linears_of_head,
    sampler_of,
)
from plasticity_peft.measuring.left_as_found import run_left_as_found
from plasticity_peft.measuring.passes import say_smaller, tried
from plasticity_peft.report.head import HeadFit

# Below the logger of transformers, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

GROUPS = ("head", "vector", "matrix", "lora_A", "lora_B")
"""Names of the groups: the head; what is no matrix of a layer, such as norms, biases and embeddings; weights of linear
and convolutional layers that train in full; the two matrices of LoRA."""
IN_FULL = ("vector", "matrix")

OF_GRADIENT = {"matrix": 30.0, "vector": 16.0}
"""Rate of what trains in full, times the root of the product of the number of its parameters and the sum of the
absolute values of its gradient in nats."""
MOST_OVER_MATRICES = 10.0
"""Largest rate of vectors that train beside matrices, as a multiple of the rate of the matrices."""
OF_LORA = 6.0
"""Rate of LoRA, times its scale, its rank, and the smaller width of a layer, in the mean over the layers."""
OF_FITTED_HEAD, OF_FRESH_HEAD = 0.03, 0.3
"""Rate of a head times the number of its features."""
WITHOUT_DATA = {"matrix": 0.3, "vector": 3.0}
"""Rate of what trains in full, times the root of the number of its parameters, if there are no labels to ask."""
MOST_OVER_SIZE = 100.0
"""Largest rate by the gradient, as a multiple of the rate by size alone. A gradient that vanishes says nothing of the
rate. In our experiments the multiple was 0.4 to 8."""
LONG = 100
"""Number of steps from which the rate of what trains in full does not depend on it."""
OF_SHORT_RUN = 0.25
"""Share of that rate in shorter runs; below 50 steps the share falls with their square. At the whole rate, large steps
first disturb the features, and a short run may end before these are better than they were: after 60 steps it was 1 to
5 points below the quarter on two of the four pairs of the demo's model, and up to 1.6 above it on the other two."""
IMAGES = 256
"""Number of images whose mean gradient is taken."""
TO_FIT = 1024
"""Number of images that a head is fitted on for the gradient alone."""
USUAL_SHARE = 0.6
"""Loss of images that a head was fitted on, as a share of their loss if left out, for a few hundred images."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    """One of `GROUPS`."""
    parameters: tuple[tuple[str, nn.Parameter], ...]
    """By their names in the model."""

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(shape_of(parameter).numel() for _, parameter in self.parameters)


def trained_groups(model: nn.Module) -> list[Group]:
    """Returns what trains in a model, in the order of `GROUPS`; groups without parameters are left out.

    Raises:
        ConfigError: nothing trains.
    """
    base = bare(model)
    heads = find_architecture(base).heads
    owners = {id(parameter): module for module in base.modules() for parameter in module.parameters(recurse=False)}
    found: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUPS}
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            found[_group(name, parameter, owners[id(parameter)], heads)].append((name, parameter))
    groups = [Group(name, tuple(members)) for name, members in found.items() if members]
    if not groups:
        raise ConfigError(f"No parameter of {type(base).__name__} trains. Adapt the model first, with get_peft_model.")
    return groups


def _group(name: str, parameter: nn.Parameter, module: nn.Module, heads: Iterable[str]) -> str:
    parts = name.split(".")
    if any(part.endswith("_A") for part in parts) and "lora" in name:
        return "lora_A"
    if any(part.startswith("lora_") for part in parts):
        return "lora_B"
    if any(within(name, head) for head in heads):
        return "head"
    weighs = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and parameter is module.weight
    return "matrix" if weighs or (len(shape_of(parameter)) == 2 and parts[-1] == "weight") else "vector"


def recommended_rates(
    model: nn.Module,
    groups: Sequence[Group],
    train_dataset: Any = None,
    *,
    num_training_steps: int | None = None,
    rate_factor: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    backbone: str | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Returns a learning rate of Adam for each of the groups, by name; see `create_plasticity_optimizer`."""
    by_name = {group.name: group for group in groups}
    rates = {}
    if "head" in by_name:
        rates["head"] = _rate_of_head(bare(model), by_name["head"])
    lora = [name for name in ("lora_A", "lora_B") if name in by_name]
    if lora:
        rates |= dict.fromkeys(lora, rate_factor * _rate_of_lora(bare(model)))
    in_full = [by_name[name] for name in IN_FULL if name in by_name]
    if not in_full:
        return rates
    counts = {group.name: group.count for group in in_full}
    sums: Mapping[str, float] = {}
    most = MOST_OVER_SIZE
    if train_dataset is not None:
        gradient = Gradient(model, train_dataset, batch_size, seed, backbone, forward_kwargs)
        sums, fitted = gradient.sums_of_magnitudes(in_full)
        most = MOST_OVER_SIZE if fitted else 1.0
    found = rates_in_full(counts, sums, most)
    share = _share(of_short_run(num_training_steps), rate_factor)
    return rates | {name: share * rate for name, rate in found.items()}


def _share(of_run: float, factor: float) -> float:
    """Returns the share of the rates of a long run, given the share for the length of the run and a factor.

    Both lower the rates for the same reason, so the smaller one counts. Where a quarter was good for a long run, on
    ViT-Ti with CIFAR-10 at 224 pixels, it was better than a sixteenth for 60 steps too.
    """
    return min(of_run, factor) if factor < 1 else of_run * factor


def of_short_run(steps: int | None) -> float:
    """Returns the rate of what trains in full in a run of so many steps, as a share of that in a long run.

    Examples:
        >>> of_short_run(50), of_short_run(1000), of_short_run(None)
        (0.25, 1.0, 1.0)
    """
    if steps is None or steps >= LONG:
        return 1.0
    return min(OF_SHORT_RUN, (steps / LONG) ** 2)


def rates_in_full(
    counts: Mapping[str, int], sums: Mapping[str, float], most: float = MOST_OVER_SIZE
) -> dict[str, float]:
    """Returns the rate of each group that trains in full.

    Args:
        counts: number of parameters by group: "matrix", "vector", or both.
        sums: sum of the absolute values of their gradient. A group that is missing gets a rate by its size alone.
        most: largest rate by the gradient, as a multiple of the rate by size alone.
    """
    wanted = {name: WITHOUT_DATA[name] / math.sqrt(count) for name, count in counts.items()}
    # A group without a gradient, such as biases of keys, does not move the loss at any rate.
    moved = {name: count for name, count in counts.items() if sums.get(name, 0) > 0}
    for name, count in moved.items():
        wanted[name] = min(most * wanted[name], OF_GRADIENT[name] / math.sqrt(count * sums[name]))
    if len(wanted) == len(IN_FULL):
        wanted["vector"] = min(wanted["vector"], MOST_OVER_MATRICES * wanted["matrix"])
    return wanted


def rate_of_fitted_head(features: int) -> float:
    """Returns the rate of a head that was fitted in closed form."""
    return OF_FITTED_HEAD / features


def times(rates: Mapping[str, float], factor: float) -> dict[str, float]:
    """Returns rates by group, multiplied by a factor, but for that of the head.

    Examples:
        >>> times({"head": 0.001, "matrix": 0.002}, 0.5)
        {'head': 0.001, 'matrix': 0.001}
    """
    return {name: rate if name == "head" else factor * rate for name, rate in rates.items()}


def groups_in_full(model: nn.Module, components: Iterable[Component]) -> dict[str, dict[str, Group]]:
    """Returns the weights of each component by its id, in the groups that would train in full."""
    found = {}
    for part in components:
        by_group: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for path, module in zip(part.modules, weights_of(model, part), strict=True):
            for name, parameter in module.named_parameters(recurse=False):
                group = _group(f"{path}.{name}", parameter, module, ())
                by_group.setdefault(group, []).append((f"{path}.{name}", parameter))
        found[part.id] = {group: Group(group, tuple(members)) for group, members in by_group.items()}
    return found


def _rate_of_head(model: nn.Module, head: Group) -> float:
    """Returns the rate of a linear layer by its features, and that of a decoder of several layers by its size."""
    if is_fitted(model):
        return rate_of_fitted_head(_features(head))
    matrices = [name for name, parameter in head.parameters if len(shape_of(parameter)) > 1]
    if any(sum(within(name, path) for name in matrices) > 1 for path in find_architecture(model).heads):
        return rates_in_full({"matrix": head.count}, {})["matrix"]
    return OF_FRESH_HEAD / _features(head)


def _features(head: Group) -> int:
    """Returns the number of features that the largest matrix of a head receives."""
    shapes = [shape_of(parameter) for _, parameter in head.parameters]
    return max((shape[1:].numel() for shape in shapes if len(shape) > 1), default=max(map(torch.Size.numel, shapes)))


def _rate_of_lora(model: nn.Module) -> float:
    """Returns the rate at which a step changes the output of each adapted layer by about the same."""
    layers: list[Any] = [module for module in model.modules() if "lora_A" in module._modules]
    adapted = [(layer, name) for layer in layers for name in layer.active_adapters if name in layer.r]
    strength = max(layer.scaling[name] * layer.r[name] for layer, name in adapted)
    widths = [min(layer.in_features, layer.out_features) for layer, _ in adapted]
    return float(OF_LORA * len(widths) / (strength * sum(widths)))


def _loss(model: nn.Module, architecture: Architecture, sampler: Batches, number: int) -> torch.Tensor:
    """Returns the model's own loss for a batch. Its errors say that rates can do without one."""
    try:
        return own_loss(model, architecture, sampler, sampler.load([number]))
    except (DataError, ModelError) as error:
        raise type(error)(
            f"{error} If the model has no loss of images and labels alone, leave train_dataset out: the rates then "
            "follow from the sizes of what trains."
        ) from error


@dataclass(frozen=True, eq=False)
class Gradient:
    """The mean gradient of the loss over labeled images, through a head that is fitted to them."""

    model: nn.Module
    dataset: Any
    batch_size: int
    seed: int
    backbone: str | None
    forward_kwargs: Mapping[str, Any] | None

    def sums_of_magnitudes(self, groups: Sequence[Group]) -> tuple[dict[str, float], bool]:
        """Returns the sum of the absolute values of the gradient by each group, as for images left out of a fit.

        The second value is False if the head could not be fitted, and the gradient came through the head as it is.
        """
        with whole(self.model) as model:
            fit = self._present_fit(model)
            head = self._head(model) if fit is None else None
            with head.restored() if head is not None else nullcontext():
                if head is not None:
                    head.set()
                    fit = head.found
                sums, loss = self._measured(model, groups)
        # The fewer images a head is fitted on, the better it fits them, and the smaller is their gradient.
        share = loss / fit.loss / USUAL_SHARE if fit is not None and fit.loss > 0 else 1.0
        return {name: total / share if 0 < share < 1 else total for name, total in sums.items()}, fit is not None

    def _present_fit(self, model: nn.Module) -> HeadFit | None:
        """Returns what `fit_head` found for the head of the model; None if it is not as `fit_head` left it."""
        paths = linears_of_head(model, find_architecture(model, self.backbone))
        fits = [fit for path in paths if (fit := fit_of(linear_at(model, path))) is not None]
        return fits[0] if len(fits) == 1 else None

    def _head(self, model: nn.Module) -> FittedHead | None:
        """Returns a fitted head: what comes through a fresh one is noise. None if the head cannot be fitted."""
        try:
            return fitted_head(
                model,
                self.dataset,
                max_samples=TO_FIT,
                batch_size=self.batch_size,
                seed=self.seed,
                backbone=self.backbone,
                forward_kwargs=self.forward_kwargs,
            )
        except ModelError as error:
            logger.info("The gradient is taken through the head as it is. %s", error)
            return None

    def _measured(self, model: nn.Module, groups: Sequence[Group]) -> tuple[dict[str, float], float]:
        """Returns the sums of the gradient as it is, and the mean loss."""
        architecture = find_architecture(model, self.backbone)
        architecture = with_forward_kwargs(model, architecture, self.forward_kwargs)
        parameters = [model.get_parameter(name) for group in groups for name, _ in group.parameters]

        def measured() -> tuple[dict[str, float], float]:
            with torch.enable_grad():
                for parameter in parameters:
                    parameter.requires_grad_(True)
                mean, loss = self._mean(model, architecture, parameters)
                gradients = iter(mean)
                sums = {g.name: sum(float(next(gradients).abs().sum()) for _ in g.parameters) for g in groups}
            return sums, loss

        sums, loss = run_left_as_found(measured, model, self.seed, None, self.dataset)
        for name, total in sums.items():
            if not math.isfinite(total):
                raise NonFiniteError(f"The gradient of the {name} group is NaN or infinite. Train in float32.")
        return sums, loss

    def _mean(
        self, model: nn.Module, architecture: Architecture, parameters: Sequence[nn.Parameter]
    ) -> tuple[list[torch.Tensor], float]:
        """Returns the mean gradient, as float64, and the mean loss. Batches are halved if memory runs out."""
        size = self.batch_size
        while True:
            sampler = self._sampler(model, architecture, size)
            found = tried(partial(self._mean_over, sampler, model, architecture, parameters))
            if found:
                return found[0]
            if sampler.images_per_batch == 1 or sampler.target.collated:
                raise ModelError(
                    f"Out of memory for the gradient of {sampler.images_per_batch} images by all that trains. Use "
                    "smaller batches or images, or leave train_dataset out: the rates then follow from the sizes of "
                    "what trains."
                )
            size = sampler.images_per_batch // 2
            say_smaller("the gradient", f"{size} images")

    def _mean_over(
        self, sampler: Batches, model: nn.Module, architecture: Architecture, parameters: Sequence[nn.Parameter]
    ) -> tuple[list[torch.Tensor], float]:
        batches = range(sampler.available(IMAGES))
        total: list[torch.Tensor] = []
        losses = []
        for number in batches:
            loss = _loss(model, architecture, sampler, number)
            losses.append(float(loss.detach()))
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            total = list(found) if not total else [a.add_(b) for a, b in zip(total, found, strict=True)]
        return [gradient.double() / len(batches) for gradient in total], sum(losses) / len(losses)

    def _sampler(self, model: nn.Module, architecture: Architecture, batch_size: int) -> Batches:
        images = Images(
            self.dataset,
            "train_dataset",
            read_at_most=IMAGES,
            names=input_names(model, architecture),
            seed=self.seed,
            label_names=label_names(model, architecture) or LABELS,
            whole_batches=True,
        )
        return sampler_of(Batches, images, model, IMAGES, batch_size, self.seed)


@dataclass(frozen=True, eq=False)
class RatesOfSets:
    """What the recommended learning rates of a set follow from; empty for a model that cannot train in full."""

    counts: Mapping[str, Mapping[str, int]]
    """Number of parameters by component, and by group of parameters."""
    sums: Mapping[str, float]
    """Sums of the absolute values of their gradient, by component and group: "0.MHA matrix"."""

    @classmethod
    def of(cls, model: nn.Module, architecture: Architecture, gradient: Gradient) -> RatesOfSets:
        """Computes the gradient once, for all sets."""
        modules = [module for part in architecture.components for module in weights_of(model, part)]
        if not all(map(holds_plain_weights, modules)):
            return cls({}, {})
        groups = groups_in_full(model, architecture.components)
        named = [replace(group, name=f"{part} {name}") for part, own in groups.items() for name, group in own.items()]
        counts = {part: {name: group.count for name, group in own.items()} for part, own in groups.items()}
        return cls(counts, gradient.sums_of_magnitudes(named)[0])

    def of_set(self, parts: Sequence[Component], features: int) -> dict[str, float] | None:
        """Returns the rates of a set, and of a fitted head that trains along; None if they are unknown."""
        if not self.counts:
            return None
        counts: dict[str, int] = {}
        sums: dict[str, float] = {}
        for part in parts:
            for group, count in self.counts[part.id].items():
                counts[group] = counts.get(group, 0) + count
                sums[group] = sums.get(group, 0.0) + self.sums[f"{part.id} {group}"]
        return {"head": rate_of_fitted_head(features), **rates_in_full(counts, sums)}
