"""What is believed of an adapter_config.json that others wrote.

Its options go to PEFT, and some of them make PEFT do things: import modules, copy layers, decompose weights, match
regular expressions. So what is passed on is a short list, each value of a checked type. What only says how an adapter
was made or where it is from is left out, and what would change the model in another way is refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

from peft import LoraConfig

from plasticity_peft.checks import check_number, shown
from plasticity_peft.errors import AdapterError, ConfigError

LEFT_OUT = (
    # where it is from, and for what task: says nothing of what it computes
    "peft_type", "peft_version", "auto_mapping", "task_type", "inference_mode", "runtime_config",
    # how its weights began
    "init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
    # which modules it is on, by old names: the weights say it too
    "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "rank_pattern",
    # without effect on a linear layer, or by themselves
    "fan_in_fan_out", "megatron_core", "qalora_group_size",
)  # fmt: skip
HARMLESS_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model alone."""

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")


@dataclass(frozen=True)
class AdapterOptions:
    """The options that an adapter may bring along."""

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: int | float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    target_modules: list[str] | str | None = None
    """Ends of module paths. A single string is a regular expression, and is not looked at."""
    modules_to_save: list[str] = field(default_factory=list)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None

    __pydantic_config__: ClassVar[dict[str, bool]] = {"strict": True, "allow_inf_nan": False}

    def alpha(self, path: str) -> float:
        """Returns `lora_alpha` of a module."""
        return next((value for key, value in self.alpha_pattern.items() if _names(key, path)), self.lora_alpha)

    def targets(self, path: str) -> bool:
        """Returns whether LoRA may be on a module."""
        names = self.target_modules
        return not isinstance(names, list) or any(path == name or path.endswith(f".{name}") for name in names)

    def saved(self, path: str) -> str | None:
        """Returns the path of the module saved as a whole that holds the module `path`; None where there is none."""
        parts = path.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return next((name for name in above if any(name.endswith(each) for each in self.modules_to_save)), None)


def read_options(config: Mapping[str, Any], source: str) -> AdapterOptions:
    """Returns what is believed of the adapter_config.json of the adapter `source`.

    Raises:
        AdapterError: an option has a value of the wrong type, or would change the model in a way that is not known
            here; the message names it.
    """
    from pydantic import ValidationError

    known = {each.name for each in fields(AdapterOptions)}
    given = {name: value for name, value in config.items() if name in known and value is not None}
    _check_rest({name: value for name, value in config.items() if name not in (*known, *LEFT_OUT)}, source)
    beginning = config.get("init_lora_weights")
    if not isinstance(beginning, (bool, str, type(None))) or beginning not in HARMLESS_BEGINNINGS:
        raise AdapterError(
            f"{source}: init_lora_weights={shown(beginning)} changes the weights of the base model when the adapter "
            "is put on it. Save it with path_initial_model_for_weight_conversion=..., which makes it plain LoRA."
        )
    try:
        options: AdapterOptions = _reader().validate_json(json.dumps(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AdapterError(f"{source}: adapter_config.json: {place}: {first['msg']}.") from None
    _check_values(options, source)
    return options


def readable(config: Mapping[str, Any]) -> bool:
    """Returns whether `load_adapter` reads an adapter with this config: what PEFT can train, it does not read all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_options(config, "the adapter")
    except AdapterError:
        return False
    return True


def _check_rest(rest: Mapping[str, Any], source: str) -> None:
    """Raises AdapterError for options of LoRA that change what it computes; warns of what LoRA does not know."""
    off = (None, False, "none")  # "none" is that of `bias`
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
            f"{source}: adapter_config.json holds options that this release of PEFT does not know, and that are "
            f"ignored: {', '.join(sorted(map(shown, on)))[:500]}.",
            stacklevel=4,
        )


def _check_values(options: AdapterOptions, source: str) -> None:
    try:
        check_number("lora_alpha", options.lora_alpha)
        for key, alpha in options.alpha_pattern.items():
            check_number(f"alpha_pattern[{shown(key)}]", alpha)
    except ConfigError as error:
        raise AdapterError(f"{source}: adapter_config.json: {error}") from None
    if not 1 <= options.r < 2**31 or not 0 <= options.lora_dropout < 1:
        raise AdapterError(
            f"{source}: adapter_config.json: r must be at least 1, and lora_dropout at least 0 and below 1. Got "
            f"r={shown(options.r)}, lora_dropout={options.lora_dropout}."
        )
    wild = [key for key in options.alpha_pattern if not _PLAIN.fullmatch(key)]
    if wild:
        raise AdapterError(
            f"{source}: adapter_config.json: alpha_pattern has the key {shown(wild[0])}. Regular expressions of "
            "others are not run, as some never end: only paths of modules, or their ends, are read."
        )
    _check_names("modules_to_save", options.modules_to_save, source)
    _check_names("target_modules", options.target_modules or (), source)


def _check_names(option: str, names: Iterable[str], source: str) -> None:
    if not isinstance(names, str) and not all(names):
        raise AdapterError(f"{source}: adapter_config.json: {option} holds an empty name, which fits every module.")


def _names(key: str, path: str) -> bool:
    """Returns whether the key of a pattern, a path or its end, names a module. "^" is for whole paths, as in PEFT."""
    name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return path == name or (not key.startswith("^") and path.endswith(f".{name}"))


@cache
def _reader() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(AdapterOptions)
