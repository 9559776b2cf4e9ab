"""Compare short runs at the recommended learning rates and at smaller ones, of everything or of some kinds.

A forecast makes those of everything.

    python examples/benchmarks/smaller_rates.py --pair demo-digits --output outputs/smaller_rates.jsonl

A copy of the model trains on one half of the images. The gain is the leave-one-out accuracy on the other half of a
head that is fitted after the run, less that of one that is fitted before. It appends a line of JSON for each run.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import HfArgumentParser

from plasticity_peft import create_plasticity_optimizer, fit_head
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.measuring.pilot import STEPS
from plasticity_peft.measuring.short_runs import SMALLER, ShortRuns, features_and_targets

sys.path.insert(0, str(Path(__file__).parents[1]))
from train import DataArguments, ModelArguments, Transform, load_images, load_model, load_processor, split


@dataclass
class Arguments:
    """What is compared."""

    output: str = field(default="outputs/smaller_rates.jsonl", metadata={"help": "File that lines are added to."})
    pair: str = field(default="demo-digits", metadata={"help": "Name of the pair in the results."})
    factors: list[float] = field(default_factory=lambda: [1.0, SMALLER], metadata={"help": "Multiples of the rates."})
    steps: list[int] = field(default_factory=lambda: [STEPS], metadata={"help": "Numbers of steps."})
    kinds: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": "What trains, in full."})


def main() -> None:
    """Parses the arguments, and trains."""
    model_arguments, data, arguments = HfArgumentParser(
        (ModelArguments, DataArguments, Arguments)
    ).parse_args_into_dataclasses()
    images = split(load_images(data.dataset_name, data.dataset_config_name), data, seed=0)["train"]
    model = load_model(model_arguments, images.features[data.label_column].names).eval()
    images = images.with_transform(Transform(load_processor(model_arguments), data, augment=False))
    fit_head(model, images)
    architecture = find_architecture(model)
    parts = tuple(part for part in architecture.components if part.kind in arguments.kinds)
    model.requires_grad_(set(arguments.kinds) == set(KINDS))
    for path in (*architecture.heads, *(module for part in parts for module in part.modules)):
        model.get_submodule(path).requires_grad_(True)
    optimizer = create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=images)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    architecture = replace(architecture, components=parts)
    features, targets = features_and_targets(model, architecture, images, len(images), 32, 0)
    runs = ShortRuns(model, architecture, images, len(images), 32, 0, None, rates, features, targets)
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    for steps, factor in itertools.product(arguments.steps, arguments.factors):
        found = runs.run(steps, factor)
        row = {"pair": arguments.pair, "kinds": arguments.kinds, **(asdict(found) if found else {})}
        with Path(arguments.output).open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    main()
