"""What train.py warns of before it trains: sizes of images, slow steps and learning rates."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from baselines import recommended_optimizer
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from plasticity_peft.components.sharding import is_sharded, whole
from plasticity_peft.report.cost import Cost

ENLARGED = 2
"""Factor from which images are said to be enlarged. They cost more than their own size would, and show no more."""
LARGE = 96
"""Pixels of a side below which an image does not cost much anyway."""
SLOW_STEP = 30
"""Seconds of a step from which training is said to be slow."""
FAR = 5
"""Factor between a learning rate and the recommended one from which accuracy was lost in the experiments."""

logger = logging.getLogger(__name__)


def warn_of_plan(
    model: nn.Module,
    arguments: TrainingArguments,
    splits: Mapping[str, Dataset],
    *,
    image_column: str,
    cost: Cost | None,
    steps: int,
) -> None:
    """Warns of what will disappoint. All processes call it, and the main one logs."""
    images = splits["validation"]  # not a stream, if the others are
    pixels, original = images[0]["pixel_values"], images.with_format(None)[0][image_column].size
    with whole(model) as inner:
        seconds = seconds_of_step(inner, pixels, arguments, cost)
    warnings = [
        *about_size(tuple(pixels.shape[-2:]), original, getattr(model.config, "patch_size", None)),
        *about_time(seconds, steps),
        *([] if is_sharded(model) else about_rate(model, arguments, splits["target"], steps)),
    ]
    if arguments.should_log:
        for warning in warnings:
            logger.warning(warning)


def about_size(size: tuple[int, int], original: tuple[int, int], patch: Any) -> Iterator[str]:
    """Yields what is wrong with the size of the images.

    Args:
        size: (height, width) of an image as the model receives it.
        original: (width, height) of the same image in the dataset.
        patch: side of a patch, in the form of the model's config; None if the model has none.
    """
    height, width = size
    if min(size) >= LARGE and ENLARGED * min(original) <= min(size):
        yield (
            f"The images of {original[0]} x {original[1]} pixels are enlarged to {width} x {height}. If the model "
            "takes a smaller --image_size, half of the side is a quarter of the tokens."
        )
    side = patch[0] if isinstance(patch, (list, tuple)) else patch
    if side and (height % side or width % side):
        yield (
            f"Images of {width} x {height} pixels do not consist of whole patches of {side} pixels, and the model "
            f"ignores the rest. Give a multiple of {side} as --image_size."
        )


def seconds_of_step(model: nn.Module, pixels: torch.Tensor, arguments: TrainingArguments, cost: Cost | None) -> float:
    """Returns about how many seconds a training step will take, from a forward pass and the formula of the costs.

    Finetuning everything takes about three times as long as a forward pass.
    """
    images = min(4, arguments.train_batch_size)
    batch = pixels[None].expand(images, *pixels.shape).contiguous().to(next(model.parameters()).device)
    seconds = []
    with torch.no_grad():
        for _ in range(2):  # the first one also starts what the second one finds started
            start = time.perf_counter()
            model(pixel_values=batch).logits.sum().item()  # item waits for a GPU
            seconds.append(time.perf_counter() - start)
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return 3 * (1.0 if cost is None else cost.time) * seconds[-1] / images * per_step


def about_time(seconds: float, steps: int) -> Iterator[str]:
    """Yields that steps take long, if they do."""
    if seconds >= SLOW_STEP:
        step, training = (timedelta(seconds=round(each)) for each in (seconds, seconds * steps))
        yield (
            f"A step will take about {step}, and the {steps} steps about {training}, without evaluation. A smaller "
            "--image_size, fewer images (--max_train_samples) or epochs (--num_train_epochs), or a GPU would help."
        )


def about_rate(model: nn.Module, arguments: TrainingArguments, images: Dataset, steps: int) -> Iterator[str]:
    """Yields that the learning rate is far from the one that is recommended for the largest group beside the head."""
    given = arguments.learning_rate
    if given is None:
        return
    free = copy.copy(arguments)
    free.learning_rate = None
    groups = [
        group for group in recommended_optimizer(model, free, images, steps).param_groups if group["name"] != "head"
    ]
    if not groups:
        return
    largest = max(groups, key=lambda group: sum(parameter.numel() for parameter in group["params"]))
    if not 1 / FAR <= given / largest["lr"] <= FAR:
        yield (
            f"--learning_rate {given:g} is {given / largest['lr']:.2g} times the rate that is recommended for what "
            f"trains ({largest['name']}), {largest['lr']:.2g}. Without it, each group trains at its recommended rate."
        )
