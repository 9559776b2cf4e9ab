"""`PlasticityConfig`, the config of the method."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from plasticity_peft.adapters.chosen import Chosen, fingerprint
from plasticity_peft.arguments import ARGUMENTS, check_arguments, with_documented_fields
from plasticity_peft.checks import shown
from plasticity_peft.components.component import KINDS
from plasticity_peft.criteria.registry import resolve
from plasticity_peft.deprecation import renamed_arguments, warn_renamed
from plasticity_peft.errors import ConfigError
from plasticity_peft.files import replaced_when_whole
from plasticity_peft.hub import CONFIG_NAME
from plasticity_peft.measuring.measure import Settings
from plasticity_peft.registration import PEFT_TYPE
from plasticity_peft.report.head import HeadFit
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection, SelectionRule
from plasticity_peft.saved.record import AdapterDescription, AdapterRecord, present_results

CHOOSERS: list[Callable[[nn.Module, PlasticityConfig], PlasticityConfig]] = []
"""The function behind `PlasticityConfig.choose`. The tuner, which imports this module, adds it."""

CHOSEN_FOR_THE_USER = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
)

SET_BY_PEFT = ("modules_to_save", "fan_in_fan_out", "runtime_config", "ensure_weight_tying", "trainable_token_indices")
OPTIONS_OF_LORA = tuple(
    each.name
    for each in fields(LoraConfig)
    if each.name not in {*(base.name for base in fields(PeftConfig)), *CHOSEN_FOR_THE_USER, *SET_BY_PEFT}
)
"""Fields of LoraConfig that say how LoRA trains, and not what."""


def _described(name: str) -> dict[str, str]:
    """Returns the metadata of the field of an argument: the help text that all interfaces share."""
    return {"help": ARGUMENTS[name].help}


def _with_own_constructor(cls: type[PlasticityConfig]) -> type[PlasticityConfig]:
    """Returns the class, whose constructor then trains LoRA if an option of LoRA is given, and no `training`.

    It also accepts `pairs`, the former name of `max_samples`, with a FutureWarning.
    """

    def get(self: PlasticityConfig) -> int:
        warn_renamed("pairs", "max_samples", stacklevel=2)
        return self.max_samples

    def set_(self: PlasticityConfig, value: int) -> None:
        warn_renamed("pairs", "max_samples", stacklevel=2)
        self.max_samples = value

    of_dataclass = cls.__init__

    @wraps(of_dataclass)
    def init(self: PlasticityConfig, *arguments: Any, **options: Any) -> None:
        if options.get("training") is None and not options.keys().isdisjoint(OPTIONS_OF_LORA):
            options["training"] = "lora"
        of_dataclass(self, *arguments, **options)

    cls.__init__ = renamed_arguments(pairs="max_samples")(init)  # type: ignore[method-assign]
    cls.pairs = property(get, set_)  # type: ignore[attr-defined]
    return cls


@_with_own_constructor
@with_documented_fields
@dataclass
class PlasticityConfig(LoraConfig):
    """Trains the components of a vision transformer that its plasticity, or another criterion, ranks highest.

    This is a `peft.LoraConfig` that finds its own `target_modules` and `modules_to_save`. `get_peft_model` (or
    `add_adapter`) measures the model on `target_data`, or takes the scores of `report`. Then it ranks the components
    and adapts the best ones. The classification head always trains and is saved. All other options are those of
    `peft.LoraConfig`.

    After that, the config is the LoRA config of the selected components. `report` and `selection` contain the result,
    and the data are released. A config selects once: make a new config for another model or other data. `choose`
    selects without adapting the model, for functions of PEFT that need the target modules first.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                                             intermediate_size=64, image_size=8, patch_size=4))
        >>> config = PlasticityConfig(target_data=torch.rand(10, 3, 8, 8), max_samples=16, top_k=2)
        >>> model = get_peft_model(model, config)
        >>> len(config.selection.units)
        2
    """

    target_data: Any = field(default=None, repr=False, compare=False, metadata=_described("target_data"))
    source_data: Any = field(default=None, repr=False, compare=False, metadata=_described("source_data"))
    report: PlasticityReport | Mapping[str, Any] | str | os.PathLike[str] | None = field(
        default=None, repr=False, metadata=_described("report")
    )
    fit_head: bool = field(default=False, metadata=_described("fit_head"))
    criterion: str | None = field(default=None, metadata=_described("criterion"))
    inputs: str | None = field(default=None, metadata=_described("inputs"))
    granularity: str = field(default="kind", metadata=_described("granularity"))
    candidates: tuple[str, ...] = field(default=KINDS, metadata=_described("candidates"))
    top_k: int | None = field(default=None, metadata=_described("top_k"))
    budget: float | str | None = field(default=None, metadata=_described("budget"))
    training: str | None = field(default=None, metadata=_described("training"))
    max_samples: int = field(default=1024, metadata=_described("max_samples"))
    batch_size: int = field(default=32, metadata=_described("batch_size"))
    seed: int = field(default=0, metadata=_described("seed"))
    settle: float | None = field(default=0.95, metadata=_described("settle"))
    dtype: str | None = field(default=None, metadata=_described("dtype"))
    backbone: str | None = field(default=None, metadata=_described("backbone"))
    forward_kwargs: dict[str, Any] | None = field(default=None, metadata=_described("forward_kwargs"))

    chosen: Chosen | None = field(
        default=None, repr=False, metadata={"help": "What was selected, and for which model. Set by `choose`."}
    )

    def __post_init__(self) -> None:
        self.task_type = None if self.task_type == PEFT_TYPE else self.task_type
        names = [each.name for each in fields(self) if each.name in ARGUMENTS]
        for name, value in check_arguments({name: getattr(self, name) for name in names}).items():
            setattr(self, name, value)
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"PEFT refuses the options of LoRA: {error}") from error
        self.task_type = self.task_type or PEFT_TYPE
        self.training = self.training or "full"
        if self.report is None or (self.criterion, self.inputs) != (None, None):
            self.criterion, self.inputs = resolve(self.criterion, self.inputs)
        if not isinstance(self.chosen, (Chosen, type(None))):
            raise ConfigError(f"chosen is set by PlasticityConfig.choose. Got {shown(self.chosen)}.")
        if self.chosen is None:
            self.check_modules_are_not_named()
            self._check_data()
        else:
            self._check_unchanged(self.chosen)

    @property
    def selection(self) -> Selection | None:
        """The selected units; None before the selection."""
        return None if self.chosen is None else self.chosen.selection

    @property
    def head_fit(self) -> HeadFit | None:
        """What fitting the head found; None without `fit_head`, and before that."""
        return None if self.chosen is None else self.chosen.head_fit

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the labels of the model that was adapted, from its config."""
        return None if self.chosen is None else self.chosen.id2label

    def check_modules_are_not_named(self) -> None:
        """Raises ConfigError if an option of LoRA names the modules that the ranking selects.

        Some functions of PEFT, such as LoRA-GA's, set `target_modules` to PEFT's defaults if it is None.
        """
        for name in CHOSEN_FOR_THE_USER:
            value = getattr(self, name, None)
            if value is not None and not (isinstance(value, Sized) and len(value) == 0):
                raise ConfigError(
                    f"{name} is chosen by the ranking. Restrict it with candidates, granularity, top_k or budget, "
                    "use LoraConfig to choose modules by name, or call config.choose(model) before other functions of "
                    f"PEFT need the modules. Got {name}={shown(value)}."
                )

    def _check_data(self) -> None:
        """Raises ConfigError if both a report and data are given, or source data without target data."""
        if not isinstance(self.report, (PlasticityReport, Mapping, str, os.PathLike, type(None))):
            raise ConfigError(f"report must be a PlasticityReport or the path of one. Got {shown(self.report)}.")
        if self.report is not None and self.target_data is not None and not self.fit_head:
            raise ConfigError("Give report (to select from scores) or target_data (to measure), not both. Got both.")
        if self.source_data is not None and self.target_data is None:
            raise ConfigError("source_data is the other half of each pair. Give target_data too.")

    def load_report(self) -> PlasticityReport | None:
        """Returns the report given as `report`, which is loaded if it is a path; None if there is none."""
        if self.report is None or isinstance(self.report, PlasticityReport):
            return self.report
        if isinstance(self.report, Mapping):
            return PlasticityReport.from_dict(self.report)
        return PlasticityReport.load(self.report)

    def select(self, report: PlasticityReport) -> Selection:
        """Returns what this config selects from the scores of `report`.

        Raises:
            ConfigError: the report has another criterion or protocol than this config, or too few units.
        """
        if self.criterion is not None and (self.criterion, self.inputs) != (report.criterion, report.inputs):
            raise ConfigError(
                f"The report contains scores of criterion={report.criterion!r} with inputs={report.inputs!r}, and the "
                f"config asks for criterion={self.criterion!r} with inputs={self.inputs!r}. Leave both out to use "
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
            max_samples=self.max_samples,
            batch_size=self.batch_size,
            seed=self.seed,
            settle=self.settle,
            dtype=self.dtype,
            backbone=self.backbone,
            forward_kwargs=self.forward_kwargs,
        )

    @property
    def rule(self) -> SelectionRule:
        """Which components to select."""
        return SelectionRule(**{each.name: getattr(self, each.name) for each in fields(SelectionRule)})

    def choose(self, model: nn.Module) -> PlasticityConfig:
        """Measures a model and selects its components. Returns this config, which is then their LoRA config.

        `get_peft_model` and `add_adapter` do this themselves. Call `choose` before functions of PEFT that take a base
        model and a config with target modules, such as `preprocess_loraga` and `get_eva_state_dict`.

        Args:
            model: a vision transformer as in `find_components`, or a PeftModel, whose base model is measured. It is
                not changed, except that `fit_head` sets the weights of its head.

        Raises:
            ConfigError: this config has selected for another model, or an option was changed since it selected.
            ModelError: see `find_components`.

        Examples:
            >>> from transformers import ViTConfig, ViTForImageClassification
            >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            ...                                             intermediate_size=64, image_size=8, patch_size=4))
            >>> config = PlasticityConfig(criterion="bound", candidates=("FC1", "FC2"), r=4).choose(model)
            >>> (len(config.target_modules), config.modules_to_save)
            (2, ['classifier'])
        """
        return CHOOSERS[-1](model, self)

    def check_is_for(self, model: nn.Module) -> None:
        """Raises ConfigError if the components were selected for another model, or if options were changed since."""
        if self.chosen is None:
            return
        self._check_unchanged(self.chosen)
        if not self.chosen.is_for(model, self._measured_modules()):
            raise ConfigError(
                "This PlasticityConfig has selected components of another model: the weights or the labels differ. "
                "Make a new one to measure this model. To adapt the same modules here without measuring, use "
                "config.to_lora()."
            )
        # PiSSA and others change the weights that were measured. Later adapters are still for the same model.
        self.chosen = replace(self.chosen, model=weakref.ref(model))

    def _measured_modules(self) -> list[str]:
        scores = self.report.scores if isinstance(self.report, PlasticityReport) else ()
        return [path for row in scores for path in row.modules]

    def _check_unchanged(self, chosen: Chosen) -> None:
        """Raises ConfigError if an option on which the selection depends was changed since."""
        options = self._options()
        changed = [name for name, value in chosen.options.items() if options[name] != value]
        changed += ["target_data"] if self.target_data is not None or self.source_data is not None else []
        if changed:
            raise ConfigError(
                f"{changed[0]} was changed after the components were selected, which has no effect. Make a new "
                "PlasticityConfig: with target_data to measure, or with report=config.report to select from the same "
                f"scores. Got {changed[0]}={shown(getattr(self, changed[0]))}."
            )

    def _options(self) -> dict[str, Any]:
        """Returns the options on which the selection depends, without those of LoRA."""
        of_lora = {each.name for each in fields(LoraConfig)}
        others = {*of_lora, "target_data", "source_data", "report", "chosen"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in others}

    def resolve(
        self,
        model: nn.Module,
        report: PlasticityReport,
        selection: Selection,
        *,
        target_modules: Iterable[str] | str,
        modules_to_save: list[str] | None,
        id2label: dict[int, str] | None,
        head_fit: HeadFit | None = None,
    ) -> None:
        """Turns this into the LoRA config of the components selected for `model`, and releases the data."""
        self.report = report
        # PEFT combines adapters only if their target_modules are sets.
        self.target_modules = target_modules if isinstance(target_modules, str) else set(target_modules)  # type: ignore[assignment]
        self.modules_to_save = modules_to_save
        self.target_data = self.source_data = None
        self.chosen = Chosen(
            selection=selection,
            linears=() if isinstance(target_modules, str) else tuple(sorted(target_modules)),
            id2label=id2label,
            head_fit=head_fit,
            options=self._options(),
            fingerprint=fingerprint(model, self._measured_modules()),
            model=weakref.ref(model),
        )

    @property
    def is_as_chosen(self) -> bool:
        """Whether the adapter trains the selected components. PEFT's EVA, for example, may drop modules later."""
        if self.chosen is None or isinstance(self.target_modules, str) or not self.target_modules:
            return self.chosen is not None
        ends = tuple(f".{name}" for name in self.target_modules)
        return all(f".{path}".endswith(ends) for path in self.chosen.linears)

    def to_lora(self) -> LoraConfig:
        """Returns a `peft.LoraConfig` with the same options, without the report and the selection.

        Raises:
            ConfigError: no components are selected yet.
        """
        if self.chosen is None:
            raise ConfigError("The components are not selected yet. Call config.choose(model) first.")
        options = {each.name: copy.copy(getattr(self, each.name)) for each in fields(LoraConfig) if each.init}
        task = None if self.task_type == PEFT_TYPE else self.task_type
        return LoraConfig(**{**options, "task_type": task})

    def to_dict(self) -> dict[str, Any]:
        """Returns the options without the data. Once the components are selected, these are only options of LoRA."""
        plain = copy.copy(self)
        plain.target_data = plain.source_data = plain.report = plain.chosen = None
        values: dict[str, Any] = super(PlasticityConfig, plain).to_dict()  # type: ignore[no-untyped-call]
        own = {f.name for f in fields(self)} - {f.name for f in fields(LoraConfig)}
        hidden = own if self.chosen is not None else {"target_data", "source_data", "chosen"}
        values = {key: sorted(v) if isinstance(v, set) else v for key, v in values.items() if key not in hidden}
        if values["task_type"] == PEFT_TYPE:
            values["task_type"] = None
        if self.chosen is None:
            # PEFT reads the config back as an instance of this class.
            values["peft_type"] = PEFT_TYPE
            report = os.fspath(self.report) if isinstance(self.report, os.PathLike) else self.report
            values["report"] = report.to_dict() if isinstance(report, PlasticityReport) else report
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json with the options of LoRA, and plasticity.json with the report and the selection.

        adapter_config.json is written last: without it, a folder is not an adapter.

        Args:
            save_directory: folder of the adapter.
            kwargs: arguments of `peft.PeftConfig.save_pretrained`.

        Raises:
            FileError: a file cannot be written.
        """
        with replaced_when_whole(save_directory, last=CONFIG_NAME) as folder:
            super().save_pretrained(str(folder), **kwargs)
            if isinstance(self.report, PlasticityReport) and self.selection is not None and self.is_as_chosen:
                adapter = AdapterDescription.of(self.selection, str(self.training), self.id2label, self.head_fit)
                AdapterRecord(self.report, adapter, present_results(save_directory)).write(folder)
