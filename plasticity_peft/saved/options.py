"""The options in an adapter_config.json, validated before they are passed on to PEFT.

Some options make PEFT import modules, copy layers, decompose weights or match regular expressions. So only a short
list of options is passed on, each with a constraint. Options that only describe the origin of an adapter are dropped.
Options that would change the model in another way are refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

from annotated_types import Interval, Len
from peft import LoraConfig

from plasticity_peft.checks import shown
from plasticity_peft.constraints import HIGHEST_COUNT, STRICT, allowed, read_as
from plasticity_peft.errors import AdapterError
from plasticity_peft.report.selection import SelectionRule

LEFT_OUT = (
    # origin and task of the adapter, which do not change its output
    "peft_type", "peft_version", "auto_mapping", "task_type", "inference_mode", "runtime_config",
    # initialization of its weights
    "init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
    # its modules, by old names: the keys of the weights contain them too
    "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "rank_pattern",
    # no effect on a linear layer, or no effect alone
    "fan_in_fan_out", "megatron_core", "qalora_group_size",
)  # fmt: skip
HARMLESS_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that do not change the base model."""

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")

Positive = Annotated[int, Interval(gt=0, le=HIGHEST_COUNT)] | Annotated[float, Interval(gt=0)]
ModuleName = Annotated[str, Len(1)]
"""An empty name would match every module."""
PlainPath = Annotated[
    str, allowed("must be the path of a module or its end; regular expressions are not run", _PLAIN.fullmatch)
]
"""Regular expressions are refused, as matching some of them never ends."""


@dataclass(frozen=True)
class AdapterOptions:
    """The options that are passed on to PEFT."""

    r: Annotated[int, Interval(ge=1, lt=2**31)] = 8
    lora_alpha: Positive = 8
    lora_dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    target_modules: list[ModuleName] | str | None = None
    """Ends of module paths. A single string is a regular expression, and is ignored."""
    modules_to_save: list[ModuleName] = field(default_factory=list)
    alpha_pattern: dict[PlainPath, Positive] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT

    def alpha(self, path: str) -> float:
        """Returns `lora_alpha` of a module."""
        return next((value for key, value in self.alpha_pattern.items() if _names(key, path)), self.lora_alpha)

    def targets(self, path: str) -> bool:
        """Returns whether `target_modules` match a module."""
        names = self.target_modules
        return not isinstance(names, list) or any(path == name or path.endswith(f".{name}") for name in names)

    def saved(self, path: str) -> str | None:
        """Returns the path of the module saved as a whole that contains the module `path`; None if there is none."""
        parts = path.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return next((name for name in above if any(name.endswith(each) for each in self.modules_to_save)), None)


def read_options(config: Mapping[str, Any], source: str) -> AdapterOptions:
    """Returns the options in the adapter_config.json of the adapter `source`.

    Raises:
        AdapterError: the value of an option is not allowed, or an option would change the model in a way that is not
            supported. The message names the option.
    """
    known = {each.name for each in fields(AdapterOptions)}
    given = {name: value for name, value in config.items() if name in known and value is not None}
    _check_rest({name: value for name, value in config.items() if name not in (*known, *LEFT_OUT)}, source)
    beginning = config.get("init_lora_weights")
    if not isinstance(beginning, (bool, str, type(None))) or beginning not in HARMLESS_BEGINNINGS:
        raise AdapterError(
            f"{source}: init_lora_weights={shown(beginning)} changes the weights of the base model when the adapter "
            "is loaded. Save it with path_initial_model_for_weight_conversion=..., which makes it plain LoRA."
        )
    try:
        options: AdapterOptions = read_as(AdapterOptions, given, AdapterError)
    except AdapterError as error:
        raise AdapterError(f"{source}: adapter_config.json: {error}.") from None
    return options


def readable(config: Mapping[str, Any]) -> bool:
    """Returns whether `load_adapter` can load an adapter with this config. It supports a part of PEFT's options."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_options(config, "the adapter")
    except AdapterError:
        return False
    return True


@dataclass(frozen=True)
class _Sizes:
    """The options that determine how many parameters LoRA trains."""

    r: Annotated[int, Interval(ge=1, lt=2**31)] = 8
    rank_pattern: dict[PlainPath, Annotated[int, Interval(ge=1, lt=2**31)]] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT


def rule_of(config: Mapping[str, Any], granularity: str, training: str) -> SelectionRule:
    """Returns the rule by which the units of an adapter with this config are selected and counted.

    Raises:
        AdapterError: the value of an option is not allowed.

    Examples:
        >>> rule_of({"r": 4, "lora_alpha": 16}, "kind", "lora").r
        4
    """
    known = {each.name for each in fields(_Sizes)}
    given = {name: value for name, value in config.items() if name in known and value is not None}
    sizes: _Sizes = read_as(_Sizes, given, AdapterError)
    return SelectionRule(granularity=granularity, training=training, **vars(sizes))


def _check_rest(rest: Mapping[str, Any], source: str) -> None:
    """Raises AdapterError for options that change what LoRA computes; warns about options that LoRA does not have."""
    off = (None, False, "none")  # "none" is the default of `bias`
    defaults = {each.name for each in fields(LoraConfig)}
    on = [name for name, value in rest.items() if value not in off and value not in ([], {})]
    refused = sorted(name for name in on if name in defaults)
    if refused:
        name = refused[0]
        raise AdapterError(
            f"{source}: {name}={shown(rest[name])} is not supported by load_adapter, which reads LoRA, rsLoRA and "
            "DoRA on linear layers, and modules_to_save. If you trust it, PeftModel.from_pretrained may load it."
        )
    if on:
        warnings.warn(
            f"{source}: adapter_config.json contains options that this release of PEFT does not know, and that are "
            f"ignored: {', '.join(sorted(map(shown, on)))[:500]}.",
            stacklevel=4,
        )


def _names(key: str, path: str) -> bool:
    """Returns whether the key of a pattern, a path or its end, matches a module. "^" marks a whole path, as in
    PEFT."""
    name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return path == name or (not key.startswith("^") and path.endswith(f".{name}"))
