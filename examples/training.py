"""How train.py trains: the Trainer, its checkpoints, and what it writes at the end, in one process or in many.

The weights may be spread over the processes by FSDP or DeepSpeed. Then all processes save together.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import evaluate
import torch
from accelerate.data_loader import DataLoaderShard
from baselines import number_of_steps, recommended_optimizer
from datasets import Dataset, Features, Value
from peft import PeftModel
from safetensors import SafetensorError
from sklearn.metrics import accuracy_score
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BaseImageProcessor,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import EvalPrediction

from plasticity_peft import PlasticityCallback
from plasticity_peft.card import update_card
from plasticity_peft.checkpoints import check_processes, last_whole_checkpoint, why_not_whole
from plasticity_peft.files import replaced_when_whole

logger = logging.getLogger(__name__)


class Accuracy(evaluate.Metric):
    """Share of right answers. `evaluate.load("accuracy")` is the same, but fetches its script from the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(description="accuracy", citation="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the accuracy of logits against labels."""
    metric = Accuracy(keep_in_memory=True)
    return metric.compute(predictions=prediction.predictions.argmax(axis=-1), references=prediction.label_ids)


def is_sharded(arguments: TrainingArguments) -> bool:
    """Returns whether FSDP or DeepSpeed will spread the model, by an argument or by `accelerate launch`."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # transformers sets it too
    return fsdp or arguments.deepspeed_plugin is not None


class ResumableTrainer(Trainer):
    """A Trainer with the recommended optimizer, whose whole checkpoints can be distinguished from half-written ones.

    FSDP takes no optimizer that was made before the Trainer, so this one makes its own. Every checkpoint contains the
    adapter.
    """

    def __init__(self, *args: object, measured_on: Dataset, **options: object) -> None:
        super().__init__(*args, **options)
        self.measured_on = measured_on

    def create_optimizer(self, *args: object) -> torch.optim.Optimizer:
        """Returns an optimizer with a learning rate for each group of parameters."""
        if self.optimizer is None:
            steps = number_of_steps(self.args, self.train_dataset)
            self.optimizer = recommended_optimizer(self.model, self.args, self.measured_on, steps)
        return super().create_optimizer(*args)

    def get_train_dataloader(self) -> DataLoader:
        """Returns the batches of this process. A stream has been spread already."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        return DataLoaderShard(
            self.train_dataset,
            device=self.args.device,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter. All processes must call this, as they may have to gather it."""
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # The Trainer then leaves the adapter to the user.
            self._save(output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            # Files of an earlier run would make a half-written checkpoint look whole.
            if self.args.should_save and folder.exists():
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own error for a full disk
            raise OSError(f"Cannot write {folder}: {error}") from error


class Lines(ProgressCallback):
    """The Trainer's progress bar, with a line for a person in the place of each dictionary of numbers."""

    HIDDEN = ("epoch", "grad_norm", "learning_rate", "total_flos")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *rest: object, **options: object) -> None:
        """Starts the bar, unless `disable_tqdm` is set."""
        if not args.disable_tqdm:
            super().on_train_begin(args, state, *rest, **options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *rest: object, **options: object) -> None:
        """Moves the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, *rest, **options)

    def on_prediction_step(self, args: TrainingArguments, *rest: object, **options: object) -> None:
        """Shows the progress of the test, but not of each validation."""
        if self.training_bar is None and not args.disable_tqdm:
            super().on_prediction_step(args, *rest, **options)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: object, logs: dict[str, float], **__: object
    ) -> None:
        """Writes the line above the bar."""
        line = self.line(logs, state)
        if not line or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(line, file=sys.stderr)
        else:
            logger.info(line)

    def on_train_end(self, *args: object, **options: object) -> None:
        """Ends the bar."""
        if self.training_bar is not None:
            super().on_train_end(*args, **options)

    @classmethod
    def line(cls, logs: dict[str, float], state: TrainerState) -> str:
        """Returns what is worth reading; "" for the test and the summary of training, which train.py logs itself."""
        if any(name.startswith(("test_", "train_")) for name in logs):
            return ""
        told = [
            f"{name.replace('eval_', 'validation ')} {100 * value:.2f} %"
            if name.endswith("accuracy")
            else f"{name.replace('eval_', 'validation ')} {value:.4g}"
            for name, value in logs.items()
            if name not in cls.HIDDEN and not name.endswith(("_runtime", "_per_second"))
        ]
        return f"Step {state.global_step} of {state.max_steps}: {', '.join(told)}" if told else ""


class TimeEstimate(TrainerCallback):
    """Logs how long training will take, once a few steps are timed."""

    STEPS = 5

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Notes the first step."""
        self.first, self.start = state.global_step, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Logs the estimate."""
        if state.global_step == self.first + self.STEPS and state.is_world_process_zero:
            seconds = (time.perf_counter() - self.start) / self.STEPS * (state.max_steps - self.first)
            logger.info("Training will take about %s, without evaluation", timedelta(seconds=round(seconds)))


def finetune(
    model: PeftModel,
    arguments: TrainingArguments,
    processor: BaseImageProcessor,
    splits: dict[str, Dataset],
    checkpoint: str | None,
    measure_every: int | None = None,
    verbose: bool = False,
) -> tuple[Trainer, dict[str, float]]:
    """Returns the trainer after training, and its metrics on the test images."""
    trainer = ResumableTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        measured_on=splits["target"],
    )
    if measure_every is not None:
        trainer.add_callback(PlasticityCallback(trainer, splits["target"], every=measure_every))
    elif arguments.report_to:
        trainer.add_callback(PlasticityCallback(trainer))
    if not verbose:
        trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
        trainer.add_callback(Lines())
    trainer.add_callback(TimeEstimate())
    trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint and Path(checkpoint).name == f"checkpoint-{trainer.state.global_step}":
        logger.info("%s is the end of training: nothing is left to train.", checkpoint)
    return trainer, trainer.evaluate(splits["test"], metric_key_prefix="test")


def find_checkpoint(arguments: TrainingArguments, *also: str) -> str | None:
    """Returns the checkpoint in `--resume_from_checkpoint`, or the last whole one if it is True.

    If there is none, the result is None, and training starts from the beginning. `also` are further files that the
    checkpoint must contain. Checkpoints that are not used are set aside, so that the run does not write over them.
    """
    wanted = arguments.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        reason = why_not_whole(wanted, processes=None, also=also, save_only_model=arguments.save_only_model)
        if reason:
            raise SystemExit(f"Cannot resume from {wanted}: {reason}.")
        check_processes(wanted, arguments.world_size)
        return wanted
    with arguments.main_process_first():
        checkpoint = last_whole_checkpoint(
            arguments.output_dir,
            processes=arguments.world_size,
            also=also,
            save_only_model=arguments.save_only_model,
            set_aside=arguments.should_save,
        )
    if checkpoint is None:
        logger.info("There is no complete checkpoint in %s. Training starts from the beginning.", arguments.output_dir)
        return None
    logger.info("Training resumes from %s.", checkpoint)
    return str(checkpoint)


def save(trainer: Trainer, metrics: dict[str, float], test: Dataset, about: dict[str, str | None]) -> None:
    """Writes the adapter with its report, card and picture, and the metrics."""
    arguments = trainer.args
    arguments.push_to_hub = False  # save_model would publish before the metrics are known
    with (
        replaced_when_whole(arguments.output_dir, last="adapter_config.json")
        if arguments.should_save
        else nullcontext(arguments.output_dir)
    ) as folder:
        trainer.save_model(str(folder))
    trainer.save_metrics("test", metrics)
    if trainer.is_world_process_zero():
        given, arguments.learning_rate = arguments.learning_rate, peak_rates(trainer.optimizer)  # for the card
        trainer.create_model_card(**about)
        arguments.learning_rate = given
        update_card(arguments.output_dir, metrics={"accuracy": metrics["test_accuracy"]}, dataset=test, split="test")


def peak_rates(optimizer: torch.optim.Optimizer) -> str:
    """Returns the learning rate of each group, at its peak, as text."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # that of Accelerate
    rates = {group["name"]: group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
    return ", ".join(f"{rate:.2g} ({name})" for name, rate in rates.items())
