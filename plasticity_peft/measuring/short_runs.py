"""Short runs of everything at two multiples of the recommended rates, and what the rates should be multiplied by.

If pretrained features fit the images as they are, the recommended rates are too large: what is lost first does not
come back. A short run at smaller rates gains more then. `docs/criteria.md` has the runs of nine pairs of a model and
images that tell the two cases apart. Short runs of a part of the model do not: attention alone gained more at smaller
rates on the digits, where the recommended ones are better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from transformers.utils import logging

from plasticity_peft.arguments import check_arguments
from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.calls import with_forward_kwargs
from plasticity_peft.components.sharding import is_sharded, whole
from plasticity_peft.errors import ModelError
from plasticity_peft.measuring.head import (
    check_finite,
    final_layer,
    labeled_images,
    linear_at,
    problem_type,
    received,
    targets_of,
)
from plasticity_peft.measuring.left_as_found import run_left_as_found
from plasticity_peft.measuring.passes import tried
from plasticity_peft.measuring.pilot import CLASSES, STEPS, WITHOUT_RUNS, Pilot, check_classes, passes_of_short_run
from plasticity_peft.measuring.processes import failing_together, gathered, same, this_process
from plasticity_peft.measuring.rates import TO_FIT, Gradient, RatesOfSets, times
from plasticity_peft.report.forecast import PilotRun

# Below the logger of transformers, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

SMALLER = 0.25
"""What the recommended rates are multiplied by in the run at smaller rates, but for that of the head."""
CLEARLY = 2.0
"""Smallest difference of two runs that is not taken for chance, in standard errors."""


@dataclass(frozen=True, eq=False)
class ShortRuns:
    """Short runs of copies of a model. Each process makes the same ones; the numbers are those of the first."""

    model: nn.Module
    architecture: Architecture
    dataset: Any
    max_samples: int
    batch_size: int
    seed: int
    dtype: str | None
    rates: Mapping[str, float]
    """Recommended learning rates of everything: of "head", "matrix" and "vector"."""
    features: np.ndarray
    """What the head receives for each image before training: float32 of shape (n, features)."""
    targets: np.ndarray
    """-1 and 1 for each class: float32 of shape (n, classes)."""

    def run(self, steps: int, factor: float) -> PilotRun | None:
        """Returns what a run of so many steps gains at a multiple of the rates; None if training diverged.

        Raises:
            ModelError: memory does not suffice for a copy of the model, its gradients and its optimizer.
        """
        share = this_process()

        def trained() -> PilotRun | None:
            with failing_together(share):
                sampler = labeled_images(
                    self.model, self.architecture, self.dataset, self.max_samples, self.batch_size, self.seed
                )
                path = final_layer(self.model, self.architecture, sampler.example())
                pilot = Pilot(self.model, self.architecture, sampler, path, times(self.rates, factor), steps)
                found = tried(partial(pilot.run, self.features, self.targets))
                if not found:
                    raise ModelError(
                        f"Out of memory to train a copy of {type(self.model).__name__} in full for a few steps. Use "
                        f"{WITHOUT_RUNS}."
                    )
            return gathered(share, found[0])[0]

        found = run_left_as_found(trained, self.model, self.seed, self.dtype, self.dataset)
        return None if found is None else replace(found, rate_factor=factor)


def at_better_rates(run: Callable[[int, float], PilotRun | None]) -> PilotRun | None:
    """Returns a short run at the recommended rates, or one at smaller rates if it gains clearly more.

    Args:
        run: trains a copy of a model for a number of steps, at a multiple of the recommended rates. It returns None if
            training diverged.
    """
    usual, smaller = run(STEPS, 1.0), run(STEPS, SMALLER)
    shown = _shown(usual), _shown(smaller), SMALLER
    logger.info("Short runs: %s at the recommended rates, %s at %g times them", *shown)
    if usual is None or smaller is None:
        return usual or smaller
    more, error = smaller.gain - usual.gain, float(np.hypot(smaller.gain_error, usual.gain_error))
    return smaller if more > CLEARLY * error else usual


def _shown(run: PilotRun | None) -> str:
    return "diverged" if run is None else f"{100 * run.gain:+.1f} ± {100 * run.gain_error:.1f} points"


def find_rate_factor(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 32,
    seed: int = 0,
    backbone: str | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> float:
    """Returns what the recommended rates should be multiplied by: 1, or 0.25 if a short run gains clearly more so.

    Two copies of the model train everything in full for 16 steps of 32 images, one at the recommended rates and one at
    a quarter of them. `create_plasticity_optimizer(rate_factor="auto")` asks for it. The model stays as it is. Under
    `accelerate launch` the result is the same in each process.

    Args:
        model: a vision transformer with a head that ends in one linear layer, adapted or not.
        dataset: labeled images in the forms of `fit_head`, with one class per image. At most 1,024 are used.
        batch_size: largest number of images in one pass, also in a step of training. It is halved if memory runs out.
        seed: seed of the drawing of images.
        backbone: path of the vision transformer in a model that contains several.
        forward_kwargs: arguments of each forward pass, as in `measure_plasticity`.

    Raises:
        DataError: there are too few images, or labels are missing or do not fit the head.
        ModelError: the model cannot train in full for a few steps: it has no head that ends in one linear layer, or
            more than one class per image, or weights that are quantized or spread over processes.
        NonFiniteError: a feature or a gradient is NaN or infinite.
    """
    options = check_arguments({"batch_size": batch_size, "seed": seed, "backbone": backbone})
    options |= check_arguments({"forward_kwargs": forward_kwargs})
    if is_sharded(model):
        raise ModelError(
            f"{type(model).__name__}: short runs need weights that are not spread over processes. {_ELSE}"
        )
    with whole(model) as inner:
        architecture = with_forward_kwargs(inner, find_architecture(inner, backbone), options["forward_kwargs"])
        features, targets = features_and_targets(inner, architecture, dataset, TO_FIT, batch_size, seed)
        gradient = Gradient(inner, dataset, batch_size, seed, backbone, forward_kwargs)
        rates = RatesOfSets.of(inner, architecture, gradient).of_set(architecture.components, features.shape[1])
        if rates is None:
            raise ModelError(f"{type(inner).__name__}: short runs train in full, and weights are quantized. {_ELSE}")
        runs = ShortRuns(inner, architecture, dataset, TO_FIT, batch_size, seed, None, rates, features, targets)
        better = at_better_rates(runs.run)
    if better is None:
        logger.warning("Short runs diverged, so they do not tell what the recommended rates should be multiplied by.")
        return 1.0
    return better.rate_factor


_ELSE = "Give rate_factor as a number, or leave it out."


def features_and_targets(
    model: nn.Module, architecture: Architecture, dataset: Any, max_samples: int, batch_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features and the targets of labeled images, as `ShortRuns` takes them."""
    share = this_process()

    def seen() -> tuple[np.ndarray, np.ndarray]:
        with failing_together(share):
            sampler = labeled_images(model, architecture, dataset, max_samples, batch_size, seed)
            path = final_layer(model, architecture, sampler.example())
            check_classes(model, problem_type(model, sampler), "short runs need one class per image", _ELSE)
            count = sampler.available(max_samples)
            outputs = linear_at(model, path).out_features
            features, targets, order = [], [], list[int]()
            passes = passes_of_short_run(sampler)
            for batch, found in received(path, model, architecture, passes, range(count)):
                check_finite(found, path)
                order.extend(batch.numbers)
                features.append(found)
                targets.append(targets_of(sampler.labels(batch), outputs, CLASSES))
        same(share, "number of images", count)
        rows = np.argsort(order)
        return np.concatenate(features)[rows], np.concatenate(targets)[rows]

    return run_left_as_found(seen, model, seed, None, dataset)
