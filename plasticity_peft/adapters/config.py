"""The one dataclass that a user fills in."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftType

from plasticity_peft.checks import (
    HIGHEST_SEED,
    MOST_PAIRS,
    TRAINING_MODES,
    canonical_granularity,
    check_amount,
    check_choice,
    check_count,
    check_flag,
    check_lora,
    check_number,
    check_path,
    check_patterns,
    check_settle,
    shown,
)
from plasticity_peft.components.component import KINDS
from plasticity_peft.criteria import resolve
from plasticity_peft.criteria.precision import check_dtype
from plasticity_peft.errors import ConfigError
from plasticity_peft.files import replaced_when_whole, write_text
from plasticity_peft.hub import CONFIG_NAME, REPORT_NAME
from plasticity_peft.measuring.measure import Settings
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection, SelectionRule, check_candidates
from plasticity_peft.saved.record import KEY, AdapterDescription
from plasticity_peft.saved.results import results_for

PEFT_TYPE = "PLASTICITY"
"""`peft_type` until the components are chosen; from then on the config is a LoRA config, and says so.

So is `task_type`, by which PEFT finds the class of the adapted model, unless the user gives one.
"""

CHOSEN_FOR_THE_USER = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
)


@dataclass
class PlasticityConfig(LoraConfig):
    """Trains the components of a vision transformer whose training moves its features most.

    A `peft.LoraConfig` that finds its own `target_modules` and `modules_to_save`: `get_peft_model` (or `add_adapter`)
    measures the model on `target_data`, or takes the scores of `report`, ranks the components and adapts the best.
    Every other option of LoraConfig is passed on. The classification head always trains and is saved.

    From then on the config of the adapted model is the LoRA config of what was chosen (`peft_type` LORA), `report` and
    `selection` contain what was found, and the data have been let go. For another model or other data, make another
    config: one that was used before raises ConfigError unless the weights are the same or it gets `target_data` again.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                                             intermediate_size=64, image_size=8, patch_size=4))
        >>> config = PlasticityConfig(target_data=torch.rand(10, 3, 8, 8), pairs=16, top_k=2)
        >>> model = get_peft_model(model, config)
        >>> len(config.selection.units)
        2
    """

    target_data: Any = field(
        default=None,
        repr=False,
        compare=False,
        metadata={
            "help": "Downstream images, unlabelled: a datasets.Dataset or torch Dataset with pixel_values, a "
            "DataLoader of them, or a tensor (images, channels, height, width). Let go once measured, never saved."
        },
    )
    source_data: Any = field(
        default=None,
        repr=False,
        compare=False,
        metadata={
            "help": "Pretraining-like images in the same forms. With them a pair is one source and one target image, "
            "as in the paper; without, two different target images."
        },
    )
    report: PlasticityReport | Mapping[str, Any] | str | os.PathLike[str] | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "Scores to choose from in place of measuring: a PlasticityReport, or the path of a saved one."
        },
    )
    criterion: str | None = field(
        default=None,
        metadata={
            "help": "The rule that ranks. 'parameter_plasticity', the default: how far the features move with the "
            "component's parameters. 'rate_of_change': the paper's measure. Others: relative_rate_of_change, "
            "token_sensitivity, bound, gradient_norm, relative_gradient_norm, condition_number, feature_norm, "
            "inverse, random."
        },
    )
    inputs: str | None = field(
        default=None,
        metadata={
            "help": "What components are fed by the paper's measure (which this stands for, if criterion is not "
            "given) and its relatives: 'embedding', the paper's protocol, or 'activation', what they receive in the "
            "running network."
        },
    )
    granularity: str = field(
        default="kind",
        metadata={
            "help": "What is ranked: 'kind' (MHA, FC1, ... over all blocks, as in the paper) or 'component' (3.MHA)."
        },
    )
    candidates: tuple[str, ...] = field(
        default=KINDS,
        metadata={
            "help": "Kinds that may be chosen, all by default: LN1, MHA, LN2, FC1, FC2. The others are measured and "
            "reported all the same."
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": "How many of the best units to train. With neither this nor budget: 1."}
    )
    budget: float | None = field(
        default=None,
        metadata={
            "help": "Share of the model's parameters to train, such as 0.01, in place of top_k: the best units in "
            "order while they fit, counted as they train; the head is not counted."
        },
    )
    training: str = field(
        default="lora",
        metadata={
            "help": "How the chosen components train: 'lora' (LoRA on their linear layers; a norm, which LoRA cannot "
            "take, in full) or 'full' (all of their weights)."
        },
    )
    pairs: int = field(default=1024, metadata={"help": "Pairs of images, or images, to measure on at most."})
    batch_size: int = field(default=32, metadata={"help": "Pairs, or images, in one pass while measuring."})
    seed: int = field(default=0, metadata={"help": "Seed of the drawing of images."})
    settle: float | None = field(
        default=0.95,
        metadata={
            "help": "Measuring ends as soon as the chosen units differ from the rest at this confidence; None: it "
            "looks at all pairs."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "'bfloat16' or 'float16' to measure in that precision (autocast); None: the model's own."},
    )
    backbone: str | None = field(
        default=None,
        metadata={
            "help": "Path of the vision transformer in a model that holds more than one, such as 'model.vision_tower'."
        },
    )

    selection: Selection | None = field(
        default=None, init=False, repr=False, metadata={"help": "What was chosen; None until a model was adapted."}
    )
    id2label: dict[int, str] | None = field(
        default=None, init=False, repr=False, metadata={"help": "Names of the labels, from the config of the model."}
    )

    def __post_init__(self) -> None:
        self.task_type = None if self.task_type == PEFT_TYPE else self.task_type
        self._check_lora()
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"PEFT refuses the options of LoRA: {error}") from error
        self.peft_type = PEFT_TYPE
        self.task_type = self.task_type or PEFT_TYPE
        for name in CHOSEN_FOR_THE_USER:
            value = getattr(self, name, None)
            if value is not None and not (isinstance(value, Sized) and len(value) == 0):
                raise ConfigError(
                    f"{name} is chosen by the ranking; narrow it with candidates, granularity, top_k or budget, or "
                    f"use LoraConfig to choose modules by name. Got {name}={shown(value)}."
                )
        if self.report is None or (self.criterion, self.inputs) != (None, None):
            self.criterion, self.inputs = resolve(self.criterion, self.inputs)
        self.granularity = canonical_granularity(self.granularity)
        check_choice("training", self.training, TRAINING_MODES)
        self.candidates = check_candidates(self.candidates)
        check_amount(self.top_k, self.budget)
        check_count("pairs", self.pairs, 2, MOST_PAIRS)
        check_count("batch_size", self.batch_size, 1)
        check_count("seed", self.seed, 0, HIGHEST_SEED)
        check_settle(self.settle)
        check_path("backbone", self.backbone)
        self.dtype = check_dtype(self.dtype)
        if not isinstance(self.report, (PlasticityReport, Mapping, str, os.PathLike, type(None))):
            raise ConfigError(f"report must be a PlasticityReport or the path of one. Got {shown(self.report)}.")
        if self.report is not None and self.target_data is not None:
            raise ConfigError("Give report, to choose from scores, or target_data, to measure; got both.")
        if self.source_data is not None and self.target_data is None:
            raise ConfigError("source_data is the other half of each pair: give target_data with it.")

    def _check_lora(self) -> None:
        """Raises ConfigError where an option of LoRA has a type or a value that PEFT would fail on, or pass over."""
        check_lora(self.r, self.rank_pattern, self.use_dora, self.lora_bias)
        check_number("lora_alpha", self.lora_alpha)
        for key, alpha in check_patterns("alpha_pattern", self.alpha_pattern).items():
            check_number(f"alpha_pattern[{key!r}]", alpha)
        check_flag("use_rslora", self.use_rslora)
        check_flag("fan_in_fan_out", self.fan_in_fan_out)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        dropout, names = self.lora_dropout, self.modules_to_save
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ConfigError(f"lora_dropout must be a number from 0 to below 1. Got {shown(dropout)}.")
        if names is None:
            return
        if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"modules_to_save must be a list of module names, or None. Got {shown(names)}.")
        self.modules_to_save = sorted(names) if isinstance(names, (set, frozenset)) else list(names)

    def load_report(self) -> PlasticityReport | None:
        """Returns the scores given as `report`, read where it is a path; None where there are none."""
        if self.report is None or isinstance(self.report, PlasticityReport):
            return self.report
        if isinstance(self.report, Mapping):
            return PlasticityReport.from_dict(self.report)
        return PlasticityReport.load(self.report)

    def select(self, report: PlasticityReport) -> Selection:
        """Returns what this config chooses from the scores of `report`.

        Raises:
            ConfigError: the report was made by another criterion or protocol than this config asks for, or has no
                such choice.
        """
        if self.criterion is not None and (self.criterion, self.inputs) != (report.criterion, report.inputs):
            raise ConfigError(
                f"The report holds scores by criterion={report.criterion!r} with inputs={report.inputs!r}, and the "
                f"config asks for criterion={self.criterion!r} with inputs={self.inputs!r}. Leave both out to take "
                "the report as it is, or measure again."
            )
        return report.select_by(self.rule)

    @property
    def settings(self) -> Settings:
        """How the model is measured."""
        criterion, inputs = resolve(self.criterion, self.inputs)
        return Settings(
            criterion=criterion,
            inputs=inputs,
            max_samples=self.pairs,
            batch_size=self.batch_size,
            seed=self.seed,
            settle=self.settle,
            dtype=self.dtype,
            backbone=self.backbone,
        )

    @property
    def rule(self) -> SelectionRule:
        """What is to be selected."""
        return SelectionRule(**{each.name: getattr(self, each.name) for each in fields(SelectionRule)})

    def resolve(
        self,
        report: PlasticityReport,
        selection: Selection,
        *,
        target_modules: list[str] | str,
        modules_to_save: list[str] | None,
        id2label: dict[int, str] | None,
    ) -> None:
        """Turns this into the LoRA config of what was chosen, and lets go of the data."""
        self.report, self.selection, self.id2label = report, selection, id2label
        self.target_modules, self.modules_to_save = target_modules, modules_to_save
        self.target_data = self.source_data = None
        self.peft_type = PeftType.LORA
        self.task_type = None if self.task_type == PEFT_TYPE else self.task_type

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as a dictionary without the data: those of LoRA alone once the components are chosen."""
        plain = copy.copy(self)
        plain.target_data = plain.source_data = plain.report = plain.selection = None
        values: dict[str, Any] = super(PlasticityConfig, plain).to_dict()  # type: ignore[no-untyped-call]
        own = {f.name for f in fields(self)} - {f.name for f in fields(LoraConfig)}
        hidden = own if self.selection is not None else {"target_data", "source_data", "selection", "id2label"}
        values = {key: sorted(v) if isinstance(v, set) else v for key, v in values.items() if key not in hidden}
        if values["task_type"] == PEFT_TYPE:
            values["task_type"] = None
        if self.selection is not None:
            values["peft_type"] = PeftType.LORA
        if "report" in values:
            report = os.fspath(self.report) if isinstance(self.report, os.PathLike) else self.report
            values["report"] = report.to_dict() if isinstance(report, PlasticityReport) else report
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json with what stock PEFT knows, and beside it plasticity.json with the rest."""
        # The config comes last: without it no loader takes a folder for an adapter.
        with replaced_when_whole(save_directory, last=CONFIG_NAME) as folder:
            super().save_pretrained(str(folder), **kwargs)
            if isinstance(self.report, PlasticityReport) and self.selection is not None:
                adapter = AdapterDescription(self.training, self.selection, self.id2label)
                values = {**self.report.to_dict(), KEY: adapter.to_dict()}
                results = results_for(save_directory)
                if results:
                    values["results"] = [asdict(one) for one in results]
                write_text(folder / REPORT_NAME, json.dumps(values, indent=2) + "\n")
