"""Compare the recommended learning rates with smaller and larger ones, on one pair of a model and images.

    python examples/benchmarks/rates.py --pair demo-digits --output outputs/rates.jsonl
    python examples/benchmarks/rates.py --summary true --output examples/results/rates.jsonl

Each method trains at the rates that `create_plasticity_optimizer` recommends, times each of `--factors`, over several
seeds. All runs of a method train at once: their parameters are stacked, and `torch.func.vmap` maps the step over them.
It appends a line of JSON for each method: accuracy on validation and test images by seed and factor. With `--summary`
it prints the table of docs/getting-started.md from such a file.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from plasticity_peft import (
    PlasticityConfig,
    create_plasticity_optimizer,
    find_components,
    fit_head,
    measure_plasticity,
)
from plasticity_peft.components.architecture import find_architecture

sys.path.insert(0, str(Path(__file__).parents[1]))
from stacked import PLAIN, Part, StackedRuns, order_of_images
from train import DataArguments, ModelArguments, Transform, load_images, load_model, load_processor, split


@dataclass
class Arguments:
    """What is compared, and how long it trains."""

    output: str = field(default="outputs/rates.jsonl", metadata={"help": "File that a line per method is added to."})
    pair: str = field(default="demo-digits", metadata={"help": "Name of the pair in the results."})
    methods: list[str] | None = field(default=None, metadata={"help": "Methods to train (default: all)."})
    factors: list[float] = field(default_factory=lambda: [0.16, 0.4, 1.0, 2.5, 6.25], metadata={"help": "Multiples."})
    seeds: int = field(default=3, metadata={"help": "Number of seeds."})
    steps: int = field(default=375, metadata={"help": "Steps of 32 images."})
    summary: bool = field(default=False, metadata={"help": "Print the table of the file, and train nothing."})


def methods(model: PreTrainedModel, images: torch.Tensor) -> dict[str, Callable[[PreTrainedModel], nn.Module]]:
    """Returns what turns a model with a fitted head into one in which a part of it trains, by name."""
    report = measure_plasticity(model, images, criterion="bound")  # any: the candidates decide
    parts = find_components(model)
    heads = list(find_architecture(model).heads)

    def chosen(training: str, *kinds: str) -> Callable[[PreTrainedModel], nn.Module]:
        options = {"candidates": kinds, "top_k": len(kinds), "training": training, "r": 8, "lora_alpha": 16}
        return lambda model: get_peft_model(model, PlasticityConfig(report=report, **options))

    def lora(paths: list[str], r: int) -> Callable[[PreTrainedModel], nn.Module]:
        options = {"target_modules": paths, "modules_to_save": heads, "r": r, "lora_alpha": 16}
        return lambda model: get_peft_model(model, LoraConfig(**options))

    linears = [path for part in parts if part.features for path in part.modules]
    return {
        "everything": lambda model: model,
        "MHA": chosen("full", "MHA"),
        "lora8 all": lora(linears, 8),
        "norms": chosen("full", "LN1", "LN2"),
        "FC1": chosen("full", "FC1"),
        "MHA+FC1": chosen("full", "MHA", "FC1"),
        "lora8 MHA": chosen("lora", "MHA"),
        "FC2": chosen("full", "FC2"),
        "lora2 all": lora(linears, 2),
        "lora8 qv": lora([path for part in parts if part.kind == "MHA" for path in part.modules[0:3:2]], 8),
    }


def tensors(part: Dataset, transform: Transform, device: torch.device) -> Part:
    """Returns the images and labels of a part of a dataset."""
    batch = transform(part[:])
    return Part(batch["pixel_values"].to(device), torch.tensor(batch["labels"], device=device))


def compare(
    model: PreTrainedModel,
    adapt: Callable[[PreTrainedModel], nn.Module],
    load: Callable[[], PreTrainedModel],
    images: dict[str, Part],
    arguments: Arguments,
) -> dict[str, object]:
    """Returns the recommended rates of a method, and the accuracies by seed and factor."""
    models, rates = [], {}
    items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(*images["train"], strict=True)]
    for seed in range(arguments.seeds):
        fresh = load()
        fresh.load_state_dict(model.state_dict())  # with the fitted head
        set_seed(seed)
        adapted = adapt(fresh).eval()
        if not rates:
            fit_head(adapted, items)  # notes that it is fitted, for the rate of the head
            optimizer = create_plasticity_optimizer(
                adapted, torch.optim.AdamW, train_dataset=items, num_training_steps=arguments.steps
            )
            of = {id(p): (group["name"], group["lr"]) for group in optimizer.param_groups for p in group["params"]}
            rates = {name: of[id(p)] for name, p in adapted.named_parameters() if p.requires_grad}
        models += [adapted] * len(arguments.factors)
    factors = arguments.factors * arguments.seeds
    own = [
        {name: rate * (1.0 if group == "head" else factor) for name, (group, rate) in rates.items()}
        for factor in factors
    ]  # the head keeps its rate
    seeds = [seed for seed in range(arguments.seeds) for _ in arguments.factors]
    runs = StackedRuns(models, own, images["train"], order_of_images(len(items), seeds, arguments.steps))
    runs.train(arguments.steps)
    shape = (arguments.seeds, len(arguments.factors))
    found = {part: np.reshape(runs.accuracies(images[part]), shape).tolist() for part in ("validation", "test")}
    return {"rates": dict(rates.values()), "factors": arguments.factors, "steps": arguments.steps, **found}


def summary(path: Path) -> str:
    """Returns the table: how often the recommended rate is at most a point below the best one, by model."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        validation, test = (np.mean(row[part], axis=0) for part in ("validation", "test"))
        recommended = np.interp(0.0, np.log(row["factors"]), test)  # at a factor of 1
        lost = 100 * (test[validation.argmax()] - recommended)
        rows.append({"model": row["pair"].split("-")[0], "pair": row["pair"], "method": row["method"], "lost": lost})
    frame = pd.DataFrame(rows)
    table = frame.groupby("model").agg(
        pairs=("pair", "nunique"),
        runs=("lost", "size"),
        within_a_point=("lost", lambda lost: int((lost <= 1).sum())),
        largest_loss=("lost", "max"),
        mean_loss=("lost", "mean"),
    )
    return f"{table.round(2).to_string()}\n\n{frame[frame['lost'] > 1].round(2).to_string(index=False)}"


def main() -> None:
    """Parses the arguments, and trains or prints."""
    model_arguments, data, arguments = HfArgumentParser(
        (ModelArguments, DataArguments, Arguments)
    ).parse_args_into_dataclasses()
    if arguments.summary:
        print(summary(Path(arguments.output)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(model_arguments)
    parts = split(load_images(data.dataset_name, data.dataset_config_name), data, seed=0)
    labels = parts["train"].features[data.label_column].names
    transform = Transform(processor, data, augment=False)
    images = {name: tensors(part, transform, device) for name, part in parts.items()}

    def load() -> PreTrainedModel:
        set_seed(0)
        model = load_model(model_arguments, labels).to(device).eval()
        model.set_attn_implementation(PLAIN)
        return model

    model = load()
    fit_head(model, [{"pixel_values": x, "labels": int(y)} for x, y in zip(*images["train"], strict=True)])
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    for name, adapt in methods(model, images["train"][0][:8]).items():
        if arguments.methods is None or name in arguments.methods:
            row = {"pair": arguments.pair, "method": name, **compare(model, adapt, load, images, arguments)}
            with Path(arguments.output).open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, {key: f"{rate:.1e}" for key, rate in row["rates"].items()},
                  [f"{100 * value:.1f}" for value in np.mean(row["test"], axis=0)], flush=True)  # fmt: skip


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    main()
