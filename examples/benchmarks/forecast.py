"""The time of a forecast, compared with an epoch of finetuning everything on the same images.

    python examples/benchmarks/forecast.py        ViT-S at 96 px, about ten minutes on one core

The images are random, so nothing that the forecast says has a meaning. What it computes does not depend on it, but for
the 64 steps that follow if features move far. They are timed by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from harness import StepArguments, classifier, in_turns, report, training_step
from huggingface_hub.utils import disable_progress_bars
from torch import nn
from transformers import HfArgumentParser

from plasticity_peft import forecast_finetuning
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.measuring.forecaster import MORE_STEPS
from plasticity_peft.measuring.short_runs import ShortRuns, features_and_targets, find_rate_factor

COLUMNS = {"what": "what", "seconds": "seconds", "ratio": "epochs of as many images", "of_5000": "of 5,000 images"}
EPOCH = "an epoch of finetuning everything"
SMALL = {"head": 1e-5, "matrix": 1e-6, "vector": 1e-6}
"""Learning rates with which a run does not diverge on random images."""


@dataclass
class BenchmarkArguments(StepArguments):
    """The settings of the benchmark."""

    image_size: int = field(default=96, metadata={"help": "Pixels; patches are 16 wide."})
    batch_size: int = field(default=32, metadata={"help": "Images in a step, and in a pass without training."})
    images: int = field(default=1024, metadata={"help": "Number of images."})
    rounds: int = field(default=1, metadata={"help": "Number of timed rounds."})
    num_threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/benchmarks/forecast.json", metadata={"help": "JSON file to write."})


def epoch(step: Callable[[], None], steps: int) -> None:
    """Makes so many training steps."""
    for _ in range(steps):
        step()


def longer_run(model: nn.Module, images: list[dict[str, Any]], batch_size: int) -> None:
    """Makes the run that follows if short runs gain more than kernels promise.

    Its time includes a pass for the features before it, which a forecast has already.
    """
    architecture = find_architecture(model)
    features, targets = features_and_targets(model, architecture, images, len(images), batch_size, 0)
    runs = ShortRuns(model, architecture, images, len(images), batch_size, 0, None, SMALL, features, targets)
    runs.run(MORE_STEPS, 1.0)


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.num_threads)
    disable_progress_bars()
    pixels = torch.randn(arguments.images, 3, arguments.image_size, arguments.image_size)
    images = [{"pixel_values": image, "labels": number % 10} for number, image in enumerate(pixels)]
    step = training_step(classifier(arguments), pixels[: arguments.batch_size])
    forecast = partial(
        forecast_finetuning,
        classifier(arguments),
        images,
        max_samples=arguments.images,
        batch_size=arguments.batch_size,
    )
    ways = {
        EPOCH: partial(epoch, step, len(images) // arguments.batch_size),
        "a forecast from gradients alone, pilot=False": partial(forecast, pilot=False),
        "a forecast": forecast,
        f"{MORE_STEPS} further steps, if features move far": partial(
            longer_run, classifier(arguments), images, arguments.batch_size
        ),
        'rate_factor="auto"': partial(
            find_rate_factor, classifier(arguments), images, batch_size=arguments.batch_size
        ),
    }
    times = in_turns(ways, arguments.rounds)
    rows = [
        {
            "what": name,
            "seconds": seconds,
            "ratio": seconds / times[EPOCH],
            "of_5000": seconds / times[EPOCH] * arguments.images / 5000,
        }
        for name, seconds in times.items()
    ]
    title = f"{arguments.size}, {arguments.image_size} px, {arguments.images} images"
    report(title, COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
