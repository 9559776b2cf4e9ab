"""A Trainer callback that logs the ranking, the selection and, during training, the change of the scores."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from plasticity_peft.adapters.config import PlasticityConfig
from plasticity_peft.adapters.loggers import show
from plasticity_peft.adapters.model import merged_copy
from plasticity_peft.checks import check_count
from plasticity_peft.deprecation import renamed_arguments
from plasticity_peft.errors import ConfigError
from plasticity_peft.measuring.measure import measure_plasticity
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection


class PlasticityCallback(TrainerCallback):
    """Writes the ranking and the selection to the Trainer's loggers, and can measure again every few epochs.

    It logs through `Trainer.log`, so every integration in `report_to`, the progress bar and the log history get the
    values. A callback does not know its Trainer, so the Trainer is an argument. Add the callback with `add_callback`.

    At the start of training it logs, for every kind (and every component, with granularity="component"),
    `plasticity/MHA`, `plasticity/standard_error/MHA`, `plasticity/rank/MHA` and `plasticity/selected/MHA`, which is 1
    for a selected unit; and of the selection `plasticity/parameters` and what a training step costs,
    `plasticity/cost/time` and `plasticity/cost/memory`, as shares of finetuning everything. TensorBoard, W&B and
    MLflow also get the table and, with the extra `plot`, a picture. With `every`, the scores are measured again at the
    end of every `every`-th epoch, and logged under the same names. `reports` contains all reports, by epoch.

    During training, a merged copy of the model is measured: the weights of the components include what the adapters
    have learned so far. Training is not affected: weights, random numbers and losses are the same as without the
    callback. The copy takes the memory of the model once more while it is measured. In a distributed run, all
    processes measure together.

    Args:
        trainer: the Trainer to which the callback is added.
        target_data: images to measure on, as in `measure_plasticity`, without augmentation. Required with `every`.
        source_data: the other half of each pair, as in `measure_plasticity`.
        every: number of epochs between measurements; None measures nothing during training.
        measuring: other arguments of `measure_plasticity`. By default they are those of the model's PlasticityConfig,
            so that the scores can be compared.

    Raises:
        ConfigError: `every` is given without images, or images without `every`, or an argument is unknown. At the
            start of training: without `every`, the model has no adapter of a PlasticityConfig; with `every`, DeepSpeed
            or FSDP has sharded the weights over processes.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
        >>> from plasticity_peft import PlasticityConfig
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=8, patch_size=4)
        >>> images = torch.rand(8, 3, 8, 8)
        >>> model = get_peft_model(ViTForImageClassification(config), PlasticityConfig(target_data=images))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = TrainingArguments(folder, report_to="none", use_cpu=True)
        ...     trainer = Trainer(model, arguments, train_dataset=[{"pixel_values": x, "labels": 0} for x in images])
        ...     trainer.add_callback(PlasticityCallback(trainer, images, every=2))
    """

    @renamed_arguments(pairs="max_samples")
    def __init__(
        self,
        trainer: Any,  # a transformers.Trainer, whose import is slow
        target_data: Any = None,
        source_data: Any = None,
        *,
        every: int | None = None,
        **measuring: Any,
    ) -> None:
        if every is not None:
            check_count("every", every, 1)
        images = target_data is not None or source_data is not None or bool(measuring)
        if (every is None and images) or (every is not None and target_data is None):
            raise ConfigError(
                "To measure during training, give both target_data (images) and every (a number of epochs). "
                f"Got every={every!r} and {'no ' if target_data is None else ''}target_data."
            )
        parameters = inspect.signature(measure_plasticity).parameters.items()
        allowed = [name for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        if set(measuring) - set(allowed):
            raise ConfigError(f"Measuring takes {', '.join(allowed)}. Got {', '.join(sorted(measuring))}.")
        self.trainer, self.every = trainer, every
        self.reports: dict[float, PlasticityReport] = {}
        """The reports, by the epoch at whose end they were measured; 0.0 is the start of training."""
        self._images, self._measuring = (target_data, source_data), measuring

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs the report and the selection from before training, unless training is resumed."""
        model, config = kwargs["model"], _config_of(kwargs["model"])
        if self.every is not None:
            self._check_whole()
        elif config is None:
            raise ConfigError(
                "The model has no active adapter of a PlasticityConfig, so there is nothing to log. Give "
                "target_data and every to measure during training."
            )
        if state.global_step:
            return  # resumed: this was logged when training began
        if config is None:
            self._report(self._measure(model), None, args, state, control)
        elif isinstance(config.report, PlasticityReport):
            self._report(config.report, config, args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures again at the end of every `every`-th epoch."""
        epoch = state.epoch or 0.0
        whole = abs(epoch - round(epoch)) < 1e-6  # training may end within an epoch
        if self.every is not None and whole and round(epoch) % self.every == 0:
            config = _config_of(kwargs["model"])
            self._report(self._measure(kwargs["model"]), config, args, state, control)

    def _check_whole(self) -> None:
        if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            raise ConfigError(
                "every=... measures a copy of the model, but DeepSpeed or FSDP has spread its weights over the "
                "processes. Omit every, or train with DDP."
            )

    def _measure(self, model: nn.Module) -> PlasticityReport:
        config = _config_of(model)
        settings: dict[str, Any] = {}
        if config is not None and isinstance(config.report, PlasticityReport):
            settings = asdict(config.settings) | asdict(config.rule)
            settings |= {"criterion": config.report.criterion, "inputs": config.report.inputs}
        if "criterion" in self._measuring or "inputs" in self._measuring:
            settings |= {"criterion": None, "inputs": None}
        if "top_k" in self._measuring or "budget" in self._measuring:
            settings |= {"top_k": None, "budget": None}
        return measure_plasticity(merged_copy(model), *self._images, **(settings | self._measuring))

    def _report(
        self,
        report: PlasticityReport,
        config: PlasticityConfig | None,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        self.reports[float(state.epoch or 0)] = report
        should_log = control.should_log
        selection = config.selection if config is not None else None
        training = None if config is None else config.training
        self.trainer.log(scalars(report, selection, training))
        if state.is_world_process_zero:
            show(self.trainer.callback_handler.callbacks, report, selection, state.global_step)
        # Trainer.log resets should_log, but the loss of this step may not have been logged yet.
        control.should_log = should_log


def scalars(report: PlasticityReport, selection: Selection | None, training: str | None = None) -> dict[str, float]:
    """Returns the values to log of a report, by name. They are numbers, which every logger accepts."""
    granularities = ["kind"] if selection is None or selection.granularity == "kind" else ["kind", "component"]
    logs: dict[str, float] = {}
    for granularity in granularities:
        for rank, row in enumerate(report.ranking(granularity), start=1):
            logs[f"plasticity/{row.unit}"] = row.score
            logs[f"plasticity/standard_error/{row.unit}"] = row.standard_error
            logs[f"plasticity/rank/{row.unit}"] = rank
            if selection is not None and selection.granularity == granularity:
                logs[f"plasticity/selected/{row.unit}"] = int(row.unit in selection.units)
    if selection is not None and training is not None:
        logs["plasticity/parameters"] = selection.parameters[training]
    if selection is not None and selection.cost is not None:
        logs["plasticity/cost/time"] = selection.cost.time
        logs["plasticity/cost/memory"] = selection.cost.memory
    return logs


def _config_of(model: nn.Module) -> PlasticityConfig | None:
    """Returns the config of the first active adapter that has selected components; None if there is none."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    active: Any = model.active_adapters  # a list in a PeftModel, a method in a transformers model
    names = active() if callable(active) else active
    found = (configs[name] for name in names if name in configs)
    return next((config for config in found if isinstance(config, PlasticityConfig) and config.selection), None)
