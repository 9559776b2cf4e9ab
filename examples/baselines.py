"""What the selected components are compared with: the fitted head, stock PEFT's LoRA, and everything in full.

Every method starts from the same fitted head, trains at its own recommended rates, for the same steps, on the same
images, over several seeds.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub.utils import disable_progress_bars
from peft import LoraConfig, get_peft_model
from step_cost import kept_bytes, state_bytes
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from plasticity_peft import PlasticityConfig, PlasticityReport, create_plasticity_optimizer, find_components, fit_head
from plasticity_peft.arguments import name_components
from plasticity_peft.components.architecture import find_architecture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """One way to choose what trains."""

    name: str
    adapt: Callable[[PreTrainedModel], nn.Module]
    """Returns a model with a fitted head, with nothing but the chosen part and the head to train."""


class Row(NamedTuple):
    """What a method came to."""

    name: str
    parameters: int
    """How many train."""
    accuracies: tuple[float, ...]
    """On the test images, one for each seed."""
    seconds: float
    """Time of training, mean over the seeds."""
    memory: int
    """Bytes of activations that are kept for the backward pass, of gradients and of Adam's state, of one batch."""


def methods(model: PreTrainedModel, report: PlasticityReport, units: Iterable[str], training: str) -> list[Method]:
    """Returns the methods of the table: stock PEFT's LoRA, the selected units, and everything."""
    parts, units = find_components(model), tuple(units)
    heads = list(find_architecture(model).heads)
    linears = [path for part in parts if part.features for path in part.modules]
    query_and_value = [path for part in parts if part.kind == "MHA" for path in part.modules[0:3:2]]

    def lora(targets: list[str]) -> Callable[[PreTrainedModel], nn.Module]:
        config = LoraConfig(target_modules=targets, modules_to_save=heads, r=8, lora_alpha=16)
        return lambda model: get_peft_model(model, copy.copy(config))

    granularity = "component" if name_components(units) else "kind"
    options = {"report": report, "candidates": units, "top_k": len(units)}
    options |= {"granularity": granularity, "training": training}
    if training == "lora":
        options |= {"r": 8, "lora_alpha": 16}
    return [
        Method("stock LoRA on query and value", lora(query_and_value)),
        Method("stock LoRA on all linear layers", lora(linears)),
        Method(
            f"selected: {' + '.join(units)} ({training})",
            lambda model: get_peft_model(model, PlasticityConfig(**options)),
        ),
        Method("everything in full", lambda model: model),
    ]


def recommended_optimizer(
    model: nn.Module,
    arguments: TrainingArguments,
    images: Dataset,
    steps: int,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Returns the optimizer that the arguments name, at recommended rates unless they give one.

    Args:
        model: a model in which something trains.
        arguments: what names the optimizer.
        images: labeled images, on which the rates are recommended.
        steps: number of steps that will be trained.
        rates: rates that were recommended before, by the names of the groups.
    """
    optimizer_cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    learning_rate = options.pop("lr")
    return create_plasticity_optimizer(
        model,
        optimizer_cls,
        train_dataset=images,
        num_training_steps=steps,
        # Rates that were recommended before have the factor in them.
        rate_factor=1.0 if rates else getattr(arguments, "rate_factor", 1.0),
        lr=learning_rate,
        weight_decay=arguments.weight_decay,
        batch_size=arguments.per_device_eval_batch_size,
        **{f"{name}_lr": rate for name, rate in (rates or {}).items()},
        **options,
    )


def batch_size(arguments: TrainingArguments) -> int:
    """Returns the number of images per step, on all devices together."""
    return arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def number_of_steps(arguments: TrainingArguments, images: Dataset) -> int:
    """Returns the number of training steps."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return int(np.ceil(len(images) / batch_size(arguments)) * arguments.num_train_epochs)


def quiet(arguments: TrainingArguments, folder: str) -> TrainingArguments:
    """Returns the recipe for one run of many: only the last weights count, and nothing is written or logged."""
    arguments = copy.copy(arguments)
    arguments.output_dir = folder
    arguments.eval_strategy = arguments.save_strategy = arguments.logging_strategy = "no"
    arguments.load_best_model_at_end = arguments.eval_on_start = arguments.push_to_hub = False
    arguments.resume_from_checkpoint = None
    arguments.disable_tqdm = True
    return arguments


def compare(
    model: PreTrainedModel,
    wanted: Iterable[Method],
    arguments: TrainingArguments,
    splits: Mapping[str, Dataset],
    seeds: int,
    accuracy: Callable[[Trainer], float],
) -> list[Row]:
    """Returns a row for the fitted head alone and for each method. The head of `model` is fitted."""
    disable_progress_bars()
    fit_head(model, splits["target"])
    head = _quiet_trainer(copy.deepcopy(model), arguments, splits)
    heads = find_architecture(model).heads
    trained = sum(p.numel() for path in heads for p in model.get_submodule(path).parameters())
    rows = [Row("fitted head alone", trained, (accuracy(head),), 0.0, 0)]
    for method in wanted:
        logger.info("Training %s, with %d seeds", method.name, seeds)
        runs: list[_Run] = []
        for seed in range(seeds):
            first = runs[0] if runs else None
            runs.append(_run(method, copy.deepcopy(model), arguments, splits, seed, accuracy, first))
        seconds = float(np.mean([run.seconds for run in runs]))
        rows.append(Row(method.name, runs[0].parameters, tuple(run.accuracy for run in runs), seconds, runs[0].memory))
    return rows


class _Run(NamedTuple):
    """What one run of a method came to."""

    parameters: int
    accuracy: float
    seconds: float
    memory: int
    rates: dict[str, float]


def _run(
    method: Method,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    splits: Mapping[str, Dataset],
    seed: int,
    accuracy: Callable[[Trainer], float],
    first: _Run | None,
) -> _Run:
    """Trains a model with a fitted head once, at its recommended rates.

    Those of the first seed are used for all, for they hardly depend on it, and take a while. So does the memory.
    """
    set_seed(seed)
    arguments = copy.copy(arguments)
    arguments.seed = seed
    model = method.adapt(model)
    optimizer = recommended_optimizer(
        model, arguments, splits["target"], number_of_steps(arguments, splits["train"]), first and first.rates
    )
    used = {group["name"]: group["lr"] for group in optimizer.param_groups}
    trainer = _quiet_trainer(model, arguments, splits, optimizers=(optimizer, None))
    memory = first.memory if first else step_memory(trainer)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _Run(parameters, accuracy(trainer), seconds, memory, used)


def _quiet_trainer(
    model: nn.Module, arguments: TrainingArguments, splits: Mapping[str, Dataset], **options: object
) -> Trainer:
    trainer = Trainer(model, arguments, train_dataset=splits["train"], data_collator=default_data_collator, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def step_memory(trainer: Trainer) -> int:
    """Returns the bytes that a step keeps beside the weights: activations, gradients and Adam's two moments."""
    model = trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return kept_bytes(model, batch) + state_bytes(model)


def table(rows: Iterable[Row], parameters: int, images: int) -> str:
    """Returns the rows as a Markdown table; `parameters` is how many the model has, `images` how many were tested."""
    rows = list(rows)
    full = rows[-1]
    lines = [
        "| trained, at its recommended rates | parameters | test accuracy | time | memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        values = 100 * np.array(row.accuracies)
        error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}" if len(values) > 1 else ""
        share = 100 * row.parameters / parameters
        cost = [f"{row.seconds / full.seconds:.2f}", f"{row.memory / full.memory:.2f}"] if row.seconds else ["", ""]
        lines.append(f"| {row.name} | {share:.2f} % | {values.mean():.2f} %{error} | {' | '.join(cost)} |")
    seeds = max(len(row.accuracies) for row in rows)
    lines.append("")
    lines.append(
        f"Accuracy on {images} test images: mean and standard error over {seeds} seeds. Time of training, and memory "
        "of activations, gradients and optimizer, are ratios to training everything in full."
    )
    return "\n".join(lines)
