"""What the scripts in this folder share: their arguments, how they choose what trains, and what they end with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from plasticity_peft import PlasticityConfig, create_plasticity_optimizer
from plasticity_peft.card import update_card

logger = logging.getLogger(__name__)


@dataclass
class TaskArguments:
    """The model, the data, and what of the model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of a pretrained model (default: a small one, to see that all works)."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or folder of a dataset with splits train and test, and the columns that the script "
            "names (default: scenes made from the images in examples/data)."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most so many for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most so many for the test."})
    training: str = field(default="full", metadata={"help": "full or lora", "choices": ["full", "lora"]})
    top_k: int | None = field(default=None, metadata={"help": "Number of the best kinds to train (default: 1)."})
    budget: str | None = field(default=None, metadata={"help": "How much to train, not top_k; see PlasticityConfig."})
    criterion: str | None = field(default=None, metadata={"help": "Criterion that ranks."})
    max_samples: int = field(default=256, metadata={"help": "Measure on at most so many."})

    def configure(self, target_data: Dataset, **options: Any) -> PlasticityConfig:
        """Returns the config that measures on `target_data`."""
        names = ("training", "top_k", "budget", "criterion", "max_samples")
        return PlasticityConfig(
            **{name: getattr(self, name) for name in names}, target_data=target_data, batch_size=8, **options
        )

    def load(self, scenes: Callable[[int, int], DatasetDict]) -> tuple[Dataset, Dataset]:
        """Returns the images for training and for the test."""
        if self.dataset_name is None:
            data = scenes(self.max_train_samples or 384, self.max_eval_samples or 128)
        else:
            data = load_dataset(self.dataset_name)
        parts = (data["train"], self.max_train_samples), (data["test"], self.max_eval_samples)
        train, test = (part.select(range(min(most or len(part), len(part)))) for part, most in parts)
        return train, test

    def base(self, small: Callable[[Path], str], output_dir: str) -> str:
        """Returns the Hub name or folder of the model; a small one is made if none is given."""
        if self.model_name_or_path is not None:
            return self.model_name_or_path
        logger.info(
            "Without --model_name_or_path, a small model is made, to see that all works. The blocks of its vision "
            "tower are pretrained on Fashion-MNIST, and the rest is random."
        )
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # the default config of SigLIP, not this one, warns of itself
        try:
            return small(Path(output_dir, "base"))
        finally:
            transformers_logging.set_verbosity(verbosity)


AnyTask = TypeVar("AnyTask", bound=TaskArguments)


@dataclass
class FinetuningArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults for finetuning a part of a model."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder to write the adapter to."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of all that trains (default: one for each group)."}
    )
    num_train_epochs: float = field(default=4, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Images per step on each device."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: int = field(default=10, metadata={"help": "Steps of warm-up."})
    logging_steps: float = field(default=0.1, metadata={"help": "Steps between logs; below 1, a share of all steps."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The transforms need all columns."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin the memory of images, for a GPU."})
    report_to: str = field(default="none", metadata={"help": "Loggers to report to."})


def optimizer_for(
    model: nn.Module, arguments: TrainingArguments, train_dataset: Dataset | None = None, **options: Any
) -> torch.optim.Optimizer:
    """Returns AdamW with --learning_rate, or the recommended rates.

    With images, the rates depend on the gradient of the model's own loss too. A model without one, or whose loss is
    one of images and texts, gets rates by the sizes of what trains.
    """
    return create_plasticity_optimizer(
        model,
        torch.optim.AdamW,
        train_dataset=train_dataset,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        batch_size=8,
        **options,
    )


def parse(name: str, kind: type[AnyTask] = TaskArguments) -> tuple[AnyTask, FinetuningArguments]:
    """Returns the arguments of the command line of the script `name`."""
    task, arguments = HfArgumentParser((kind, FinetuningArguments)).parse_args_into_dataclasses()
    arguments.output_dir = arguments.output_dir or f"outputs/{name}"
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for noisy in ("httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # peft reads an attribute that transformers renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    set_seed(arguments.seed)
    return task, arguments


def finish(trainer: Trainer, before: dict[str, float], after: dict[str, float], *names: str) -> None:
    """Saves the adapter with its report and card, and logs what training gave and how the adapter is loaded."""
    arguments, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    config = model.peft_config["default"]
    trainer.save_model(arguments.output_dir)
    metrics = {name: after[f"eval_{name}"] for name in names}
    if arguments.should_save:
        update_card(arguments.output_dir, metrics=metrics, dataset=trainer.eval_dataset, split="test")
    logger.info("\n%s\n", config.report)
    trainable, total = model.get_nb_trainable_parameters()
    units = ", ".join(config.selection.units)
    logger.info("%s and heads train (%s): %d of %d parameters", units, config.training, trainable, total)
    for name in names:
        logger.info("%s: %.3f before training, %.3f after", name, before[f"eval_{name}"], after[f"eval_{name}"])
    base, folder = type(model.get_base_model()).__name__, arguments.output_dir
    logger.info("The adapter is in %s. To load it:", folder)
    logger.info('    base = %s.from_pretrained("%s")', base, config.base_model_name_or_path)
    logger.info('    model = PeftModel.from_pretrained(base, "%s")', folder)
