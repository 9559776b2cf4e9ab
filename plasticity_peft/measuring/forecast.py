"""What finetuning a set of components will give, forecast before training, from gradients at the pretrained weights.

Finetuning that moves the weights little adds to the head a function whose kernel is the tangent kernel of what trains.
The kernel of a set is the sum of the kernels of its components, so one pass over the images serves all sets. Kernel
ridge regression with the kernel of the fitted head and that of a set predicts the label of each image from all others,
in closed form. Its accuracy, less that of the fitted head, is the forecast of the gain.

The strength of the kernels is the one with which everything has the smallest leave-one-out error. With a strength of
its own, a set of few parameters would be promised what it reaches by large steps alone, in which gradients change.

Gradients do not show that finetuning moves the features far. A short run of everything does (`pilot.py`). If it gains
more than the kernels promise for everything, gains are raised by the difference: on images unlike those of
pretraining, the norms alone reach most of it. What trains in late blocks alone does not, because the features before
them stay: its gain is raised by the share of the depth from its first block on. `docs/forecast.md` compares forecasts
with trained models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from plasticity_peft.arguments import check_arguments, check_candidates
from plasticity_peft.checks import check_count, check_flag, shown
from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.calls import Call, hooked, run, with_forward_kwargs
from plasticity_peft.components.component import KINDS, Component, block_ids
from plasticity_peft.components.sharding import is_sharded, whole
from plasticity_peft.criteria.gradients import GradientsByImage
from plasticity_peft.errors import ConfigError, NonFiniteError
from plasticity_peft.images.sampler import SingleImages
from plasticity_peft.measuring.costs import costs_of
from plasticity_peft.measuring.forecaster import Forecaster, limited_by
from plasticity_peft.measuring.head import (
    check_finite,
    final_layer,
    labeled_images,
    linear_at,
    problem_type,
    targets_of,
)
from plasticity_peft.measuring.left_as_found import run_left_as_found
from plasticity_peft.measuring.passes import Passes
from plasticity_peft.measuring.pilot import CLASSES, check_classes
from plasticity_peft.measuring.predictions import Predictions
from plasticity_peft.measuring.processes import Share, failing_together, same, this_process
from plasticity_peft.measuring.rates import Gradient, RatesOfSets
from plasticity_peft.measuring.rounds import Progress
from plasticity_peft.measuring.seen import Seen
from plasticity_peft.measuring.short_runs import ShortRuns
from plasticity_peft.measuring.tangents import Sketcher
from plasticity_peft.report.cost import Costs
from plasticity_peft.report.forecast import Forecast
from plasticity_peft.report.selection import SelectionRule, among

DIRECTIONS = 2
"""Number of directions of the features whose gradients are taken: a backward pass each."""
MOST_IMAGES = 4096
"""Largest number of images. Each component has a number for every pair of them."""
PAIRS_OF_KINDS = (("LN1", "LN2"), ("MHA", "FC1"), ("MHA", "FC2"), ("FC1", "FC2"))
EVERYTHING, EARLY = "everything", "MHA + FC1 of the first half"

T = TypeVar("T")


def forecast_finetuning(
    model: nn.Module,
    dataset: Any,
    *,
    sets: Any = None,
    budget: float | str | Sequence[float | str] | None = None,
    candidates: Iterable[str] = KINDS,
    max_samples: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    backbone: str | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    pilot: bool = True,
) -> Forecast:
    """Returns the accuracy that finetuning is expected to give, for sets of components, before anything trains.

    The accuracy is that of new images after the set and the head were finetuned in full, on as many images as are used
    here, at recommended rates, from a head fitted in closed form. `print(forecast)` shows a table with intervals;
    `forecast.recommended` is the cheapest set near the best, or None if finetuning is not expected to pay.

    One forward pass and two backward passes, which compute no gradients of weights, serve all sets. A forecast is as
    much work as one and a half epochs of finetuning everything on these images, and two and a half with short runs.
    Under `accelerate launch` the images are spread over the processes, and the result is the same in each. The model
    is left as it was: the fitted head is not set.

    Gradients alone promise too little if features move far. So a copy of the model trains for 16 steps at the
    recommended rates, and another one at a quarter of them. If that gains far more, a quarter is what the forecast's
    `rate_factor` and rates say. If the run gains more than gradients promise, another one trains for 64 steps, and the
    forecast is raised. `docs/forecast.md` compares forecasts with trained models.

    Args:
        model: a vision transformer of transformers with a head that ends in one linear layer.
        dataset: labeled images in the forms of `fit_head`, with one class per image.
        sets: sets of components. Each is a kind ("MHA"), the canonical id of a component ("0.MHA"), or a sequence of
            them. By default: each kind, both norms, each pair of MHA, FC1 and FC2, MHA with FC1 of the first half of
            the blocks, and everything, all five kinds.
        budget: also find a set of components that promises most within a budget, as in `PlasticityConfig`: 0.1, "0.6
            time" or "0.5 memory"; or within each of several. It grows by one component at a time, by the kernels of up
            to 512 images. If the forecast is raised, one also grows from each block on, and that of the largest gain
            is taken. Parameters count as they train in full.
        candidates: kinds, and canonical ids of components, of which a set within a budget may consist. `sets` do not
            depend on it.
        max_samples: largest number of images to use, from 2 to 4,096. Memory and time grow with its square.
        batch_size: largest number of images in one pass on each process, also if a copy trains. It is halved if memory
            runs out.
        seed: seed of the drawing of images, of the directions and of the dataset's own transforms.
        dtype: "bfloat16" or "float16" runs the model in that precision by autocast; None runs it in its own.
        backbone: path of the vision transformer in a model that contains several.
        forward_kwargs: arguments of each forward pass, as in `measure_plasticity`.
        pilot: False leaves out the short run, which takes the memory of training a copy of the model in full. A model
            that is quantized, or whose weights are spread over processes or not all in memory, has none.

    Raises:
        ConfigError: an argument is out of its range, or a set or `candidates` name what the model does not have.
        SelectionError: no component fits into a budget.
        DataError: there are too few images, or labels are missing or do not fit the head.
        ModelError: the model has no head that ends in one linear layer, or not one class per image, or a component
            without gradients, or memory does not suffice.
        NonFiniteError: a feature or a gradient is NaN or infinite.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                                             intermediate_size=64, image_size=8, patch_size=4))
        >>> images = [{"pixel_values": torch.rand(3, 8, 8) + label, "labels": label} for label in (0, 1) * 8]
        >>> forecast = forecast_finetuning(model, images, sets=["MHA", ("0.FC1", "1.FC1")])
        >>> [one.name for one in forecast.sets]
        ['MHA', '0.FC1 + 1.FC1']
    """
    check_flag("pilot", pilot)
    options = check_arguments({"batch_size": batch_size, "seed": seed, "dtype": dtype, "backbone": backbone})
    options |= check_arguments({"forward_kwargs": forward_kwargs})
    check_count("max_samples", max_samples, 2, MOST_IMAGES)
    candidates = check_candidates(candidates, "component")
    budgets = _budgets(budget, candidates)
    sharded = isinstance(model, nn.Module) and is_sharded(model)
    with whole(model) as inner:
        architecture = with_forward_kwargs(inner, find_architecture(inner, backbone), options["forward_kwargs"])
        wanted = named_sets(sets, architecture.components)
        among(architecture.components, candidates)  # an unknown one is an error without a budget too
        for rule in budgets:
            rule.check_possible(architecture.components, architecture.parameters)
        observer = _Observer(inner, architecture, dataset, max_samples, batch_size, seed, budgets)
        seen, costs = run_left_as_found(observer.observed, inner, seed, options["dtype"], dataset)
        rates = RatesOfSets.of(
            inner, architecture, Gradient(inner, dataset, batch_size, seed, backbone, forward_kwargs)
        )
        everything = rates.of_set(architecture.components, seen.features.shape[1])
        forecaster = Forecaster(architecture, Predictions(architecture, seen), costs, rates.of_set, None, seed)
        if pilot and everything is not None and not sharded:
            runs = ShortRuns(
                inner,
                architecture,
                dataset,
                max_samples,
                batch_size,
                seed,
                options["dtype"],
                everything,
                seen.features,
                seen.targets,
            )
            forecaster = forecaster.with_runs(runs.run)
    return forecaster.forecast(wanted | forecaster.grown(budgets))


def named_sets(sets: Any, components: Sequence[Component]) -> dict[str, tuple[Component, ...]]:
    """Returns the components of each set, by the name of the set; see `forecast_finetuning`.

    Raises:
        ConfigError: a set is empty, or names what the model does not have.
    """
    if sets is None:
        return usual_sets(components)
    if isinstance(sets, (str, bytes, Mapping)) or not isinstance(sets, Iterable):
        raise ConfigError(f'sets must be a list of sets, such as ["MHA", ("MHA", "FC1")]. Got {shown(sets)}.')
    found: dict[str, tuple[Component, ...]] = {}
    for units in sets:
        chosen = _members((units,) if isinstance(units, str) else units, components)
        found[EVERYTHING if len(chosen) == len(components) else _name(units)] = chosen
    if not found:
        raise ConfigError("sets must contain at least one set of components. Got none.")
    return found


def usual_sets(components: Sequence[Component]) -> dict[str, tuple[Component, ...]]:
    """Returns the sets that are forecast by default, by their names. The last one is everything."""
    found = named_sets([*KINDS, *PAIRS_OF_KINDS, KINDS], components)
    everything = found.pop(EVERYTHING)
    blocks = block_ids(components)
    early = blocks[: len(blocks) // 2]
    if early:  # one block has no half
        found[EARLY] = tuple(
            part for part in components if part.kind == "MHA" or (part.kind == "FC1" and part.block_id in early)
        )
    return found | {EVERYTHING: everything}


def _name(units: Any) -> str:
    return units if isinstance(units, str) else " + ".join(units)


def _members(units: Any, components: Sequence[Component]) -> tuple[Component, ...]:
    names = {name for part in components for name in (part.kind, part.id)}
    listed = isinstance(units, Iterable) and not isinstance(units, (bytes, Mapping))
    given = list(units) if listed else []
    if not given or not all(isinstance(unit, str) and unit in names for unit in given):
        ids = [part.id for part in components]
        raise ConfigError(
            f"A set of components must be made of kinds ({', '.join(KINDS)}) and canonical ids ({ids[0]}, ..., "
            f"{ids[-1]}). Got {shown(units)}."
        )
    return tuple(part for part in components if part.is_among(given))


def _budgets(budget: Any, candidates: tuple[str, ...]) -> list[SelectionRule]:
    """Returns a rule for each budget.

    Raises:
        ConfigError: a budget is not allowed.
    """
    listed = isinstance(budget, Iterable) and not isinstance(budget, (str, bytes, Mapping))
    given = list(budget) if listed else [budget]
    return [
        SelectionRule(budget=each, granularity="component", candidates=candidates, training="full")
        for each in given
        if each is not None
    ]


@dataclass(frozen=True, eq=False)
class _Observer:
    """Runs the model on labeled images, forward and backward."""

    model: nn.Module
    architecture: Architecture
    dataset: Any
    max_samples: int
    batch_size: int
    seed: int
    budgets: Sequence[SelectionRule] = ()
    """Those into which a component must fit."""

    def observed(self) -> tuple[Seen, Costs | None]:
        """Returns what all processes together know of the images, and what training costs."""
        share = this_process()
        model, architecture = self.model, self.architecture
        with failing_together(share):
            sampler = labeled_images(model, architecture, self.dataset, self.max_samples, self.batch_size, self.seed)
            example = sampler.example()
            one = _Pass.of(model, architecture, sampler, self.seed)
            costs = costs_of(model, architecture, example)
            for rule in self.budgets:
                limited_by(rule, architecture, costs).check_ever_possible()
            count = sampler.available(self.max_samples)
        same(share, "number of images", count)
        with failing_together(share):
            seen = self._seen(one, sampler, share.of(range(count)), share)
        return Seen.of_all(share, seen, architecture), costs

    def _seen(self, one: _Pass, sampler: SingleImages, numbers: range, share: Share) -> list[Seen]:
        """Returns what this process knows of the images with these numbers: none if there are fewer than processes."""
        found, passes = [], Passes(sampler, "the forecast", "to forecast")
        with Progress(sampler, share, "Forecasting") as progress:
            for few, seen in passes.results(numbers, partial(one.seen, sampler)):
                found.append(seen)
                progress.advance(len(few))
            progress.end()
        return [Seen.together(found)] if found else []


@dataclass(frozen=True, eq=False)
class _Pass:
    """A pass of a batch through the model."""

    model: nn.Module
    architecture: Architecture
    path: str
    """Path of the head's linear layer."""
    gradients: GradientsByImage
    directions: torch.Tensor
    """Directions of the features, of length 1: float32 of shape (directions, features)."""
    sketcher: Sketcher

    @classmethod
    def of(cls, model: nn.Module, architecture: Architecture, sampler: SingleImages, seed: int) -> _Pass:
        """Prepares a model. Raises ModelError if it is not one of those that can be forecast."""
        example = sampler.example()
        path = final_layer(model, architecture, example)
        check_classes(
            model,
            problem_type(model, sampler),
            "finetuning can be forecast for one class per image",
            "Use measure_plasticity to rank its components.",
        )
        shape = (DIRECTIONS, linear_at(model, path).in_features)
        drawn = torch.randn(shape, generator=sampler.generator(0, DIRECTIONS), device="cpu", dtype=torch.float32)
        layers = [module for part in architecture.components for module in part.modules]
        return cls(
            model=model,
            architecture=architecture,
            path=path,
            gradients=GradientsByImage(model, architecture, example),
            directions=drawn / drawn.norm(dim=1, keepdim=True),
            sketcher=Sketcher(layers, seed),
        )

    def seen(self, sampler: SingleImages, numbers: Sequence[int]) -> Seen:
        """Returns what is seen of the images with these numbers."""
        batch, layer = sampler.load(numbers), linear_at(self.model, self.path)
        # A single image is passed twice: torch 2.13 computes a wrong gradient of a BatchNorm for one image.
        copies = 2 if len(numbers) == 1 else 1
        images = {name: torch.cat([value] * copies) for name, value in batch.images.items()}
        received: list[torch.Tensor] = []

        def keep(_: str, call: Call, output: Any) -> None:
            received.append(call.tokens)

        def projected() -> torch.Tensor:
            with hooked({self.path: layer}, keep):
                run(self.model, self.architecture, images)
            sums: torch.Tensor = received[0].float().sum(dim=0)
            return self.directions.to(sums.device) @ sums

        sketches = self.gradients.reduced(copies * len(numbers), projected, self.sketcher)
        features = received[0].detach().float().cpu().numpy()[: len(numbers)]
        check_finite(features, self.path)
        return Seen(
            numbers=np.asarray(numbers, dtype=np.int64),
            features=features,
            targets=targets_of(sampler.labels(batch), layer.out_features, CLASSES),
            sketches={name: _stacked(name, sketches, len(numbers)) for name in self.sketcher.layers},
        )


def _stacked(path: str, sketches: Sequence[Mapping[str, torch.Tensor]], count: int) -> np.ndarray:
    """Returns the sketches of a layer, (images, directions, numbers); zeros if the features do not depend on it."""
    if not any(path in each for each in sketches):
        return np.zeros((count, len(sketches), 1), np.float32)
    values = torch.stack([each[path][:count] for each in sketches], dim=1).numpy()
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"The gradient of {path} is NaN or infinite. In half precision this is often overflow: run the model in "
            "float32 or bfloat16."
        )
    return np.asarray(values)
