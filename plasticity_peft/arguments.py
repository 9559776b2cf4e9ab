"""The arguments that users give: one row per argument, with its help text and its constraint.

`PlasticityConfig`, `measure_plasticity` and the command line share these rows. Nothing here imports torch, so that the
command line starts quickly.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from textwrap import fill, indent
from typing import Any, TypeVar

from plasticity_peft.checks import (
    DTYPES,
    HIGHEST_SEED,
    MOST_SAMPLES,
    TRAINING_MODES,
    canonical_granularity,
    check_choice,
    check_count,
    check_flag,
    check_forward_kwargs,
    check_number,
    check_path,
    check_patterns,
    is_number,
    shown,
)
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ConfigError

UNIT = re.compile(rf"([0-9]+\.){{0,2}}({'|'.join(KINDS)})")
"""A kind, "MHA", or the canonical id of a component, "3.MHA", or "2.3.MHA" in a model with stages."""

Check = Callable[[str, Any], Any]
"""Takes the name of an argument and its value. Returns the value in its canonical form, or raises ConfigError."""


def _not_checked(name: str, value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Argument:
    """One argument."""

    help: str = ""
    """Empty for options that `peft.LoraConfig` documents."""
    check: Check = _not_checked
    """The constraint. Omitted if the argument cannot be checked on its own."""


def _or_none(check: Check) -> Check:
    """Returns a check that accepts None as well."""
    return lambda name, value: None if value is None else check(name, value)


def _check_granularity(name: str, value: Any) -> str:
    return canonical_granularity(value)


def check_candidates(candidates: Iterable[str], granularity: str) -> tuple[str, ...]:
    """Returns the kinds and canonical ids as a tuple.

    Raises:
        ConfigError: there is none, one is neither a kind nor an id or is named twice, or there are ids and
            `granularity` is "kind".

    Examples:
        >>> check_candidates("MHA", "kind")
        ('MHA',)
        >>> check_candidates({"FC1", "10.MHA", "2.MHA"}, "component")
        ('FC1', '2.MHA', '10.MHA')
    """
    found = _check_candidates("candidates", candidates)
    _check_go_together(found, granularity)
    return found


def _check_go_together(candidates: tuple[str, ...], granularity: str) -> None:
    """Raises ConfigError if candidates name components where kinds are selected."""
    if granularity == "kind" and name_components(candidates):
        raise ConfigError(
            f"candidates={shown(candidates)} names components, and granularity='kind' selects kinds. Give "
            "granularity='component', or name kinds."
        )


def name_components(candidates: Iterable[str]) -> bool:
    """Returns whether some candidates are components, such as "3.MHA", and not kinds."""
    return any("." in name for name in candidates)


def _check_candidates(name: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    found: list[str] = []
    if isinstance(names, Iterable) and not isinstance(names, (bytes, Mapping)):
        for each in names:
            if not isinstance(each, str) or each in found or not UNIT.fullmatch(each):
                found = []
                break
            found.append(each)
    if not found:
        raise ConfigError(
            f"{name} must be one or more of {', '.join(KINDS)}, or canonical ids of components such as 3.MHA, each "
            f"once. Got {shown(value)}."
        )
    # A set has no order that is the same in every run.
    return tuple(sorted(found, key=_in_order) if isinstance(value, (set, frozenset)) else found)


def _in_order(unit: str) -> tuple[list[int], int]:
    """Returns what sorts kinds, then components, in the order of the blocks."""
    *block, kind = unit.split(".")
    return [int(number) for number in block], KINDS.index(kind)


UNITS = ("parameters", "time", "memory")
"""What a budget may limit."""


def parse_budget(name: str, value: Any) -> tuple[float, str]:
    """Returns the share of a budget, and of what it is one: of `UNITS`.

    Raises:
        ConfigError: the budget has another form, or the share is not above 0 and at most 1.

    Examples:
        >>> parse_budget("budget", 0.01)
        (0.01, 'parameters')
        >>> parse_budget("budget", "60% time")
        (0.6, 'time')
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%?)\s*([a-z]*)\s*", value) if isinstance(value, str) else None
    share, unit = value, "parameters"
    if match:
        unit = match[3] or unit
        with suppress(ValueError):
            share = float(match[1]) / (100 if match[2] else 1)
    if not is_number(share) or not 0 < share <= 1 or unit not in UNITS:
        raise ConfigError(
            f"{name} must be a share of the model's parameters, above 0 and at most 1 (0.01 is one percent), or a "
            "share of the time or memory of a training step, as a text such as '0.6 time' or '50% memory'. "
            f"Got {shown(value)}."
        )
    return share, unit


def _check_budget(name: str, value: Any) -> float | str:
    share, unit = parse_budget(name, value)
    return share if unit == "parameters" else f"{share:g} {unit}"


def _check_settle(name: str, value: Any) -> float:
    if not is_number(value) or not 0 < value < 1:
        raise ConfigError(
            f"{name} must be a confidence above 0 and below 1 (0.95: a wrong selection is called settled in at most "
            f"5 % of cases), or None to use all samples. Got {shown(value)}."
        )
    return value  # type: ignore[no-any-return]


def _check_dtype(name: str, value: Any) -> str:
    torch = sys.modules.get("torch")  # a torch.dtype can only come from a torch that is imported
    text = str(value).removeprefix("torch.") if torch and isinstance(value, torch.dtype) else value
    if not isinstance(text, str) or text not in DTYPES:
        allowed = ", ".join(map(repr, DTYPES))
        raise ConfigError(f"{name} must be one of {allowed}, or None for the model's own. Got {shown(value)}.")
    return text


def _check_rank_pattern(name: str, value: Any) -> Any:
    for key, rank in check_patterns(name, value).items():
        check_count(f"{name}[{key!r}]", rank, 1)
    return value


def _check_alpha_pattern(name: str, value: Any) -> Any:
    for key, alpha in check_patterns(name, value).items():
        check_number(f"{name}[{key!r}]", alpha)
    return value


def _check_dropout(name: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{name} must be a number from 0 to below 1. Got {shown(value)}.")
    return value  # type: ignore[no-any-return]


def _check_module_names(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{name} must be a list of module names, or None. Got {shown(value)}.")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


ARGUMENTS: Mapping[str, Argument] = {
    "target_data": Argument(
        "Downstream images, without labels: a datasets.Dataset or torch Dataset with pixel_values, a DataLoader of "
        "them, or a tensor of shape (images, channels, height, width). They are released after measuring and are "
        "never saved.",
    ),
    "source_data": Argument(
        "Pretraining-like images in the same forms. With them a pair is one source and one target image, as in the "
        "paper. Without them it is two different target images.",
    ),
    "report": Argument(
        "Scores to select from instead of measuring: a PlasticityReport, or the path of a saved one.",
    ),
    "fit_head": Argument(
        "Fits the classification head to target_data in closed form before anything is measured, see fit_head. The "
        "images need labels. With report, target_data is used for the head alone.",
        check_flag,
    ),
    "criterion": Argument(
        "Name of the criterion that ranks. 'parameter_plasticity', the default, measures how far the model's features "
        "move with the component's parameters. 'rate_of_change' is the paper's measure. The others are "
        "'relative_rate_of_change', 'token_sensitivity', 'bound', 'gradient_norm', 'relative_gradient_norm', "
        "'condition_number', 'feature_norm', 'inverse' and 'random', and those that register_criterion added.",
    ),
    "inputs": Argument(
        "What the paper's measure and its relatives feed to the components. 'embedding', the paper's protocol, feeds "
        "each component the tokens that enter block 0. 'activation' feeds it what it receives in the running network. "
        "If criterion is not given, this selects the paper's measure.",
    ),
    "granularity": Argument(
        "What is ranked: 'kind' (MHA, FC1, ... over all blocks, as in the paper) or 'component' (3.MHA).",
        _check_granularity,
    ),
    "candidates": Argument(
        "What may be selected: kinds (LN1, MHA, LN2, FC1, FC2), all by default; with granularity='component' also "
        "single components (3.MHA). The others are still measured and reported.",
        _check_candidates,
    ),
    "top_k": Argument(
        "Number of units to train, the best ones. Without top_k and budget it is 1.",
        _or_none(partial(check_count, lowest=1)),
    ),
    "budget": Argument(
        "How much to train, instead of top_k. A number is a share of the model's parameters, such as 0.01: the best "
        "units are taken in order while they fit. A text is a share of what a training step takes if everything is "
        "finetuned, '0.6 time' or '0.5 memory': units that do not fit are passed over, and those of late blocks cost "
        "less, because the backward pass ends there. Parameters are counted as they train; the head is not counted.",
        _or_none(_check_budget),
    ),
    "training": Argument(
        "How the selected components train: 'full' (all of their weights) or 'lora' (LoRA on their linear layers; a "
        "layer norm, which LoRA cannot adapt, trains in full). By default 'lora' if an option of LoRA, such as r "
        "or lora_alpha, is given, else 'full'.",
        _or_none(partial(check_choice, allowed=TRAINING_MODES)),
    ),
    "max_samples": Argument(
        "Largest number of samples to measure on. A sample is a pair of images, an image or a batch of images, "
        "depending on the criterion.",
        partial(check_count, lowest=2, highest=MOST_SAMPLES),
    ),
    "batch_size": Argument(
        "Number of pairs or images in one pass while measuring.",
        partial(check_count, lowest=1),
    ),
    "seed": Argument(
        "Seed of the drawing of images and of the criterion's random numbers.",
        partial(check_count, lowest=0, highest=HIGHEST_SEED),
    ),
    "settle": Argument(
        "Confidence for early stopping. Measuring stops once the selected units are statistically separated from the "
        "others. None uses all samples.",
        _or_none(_check_settle),
    ),
    "dtype": Argument(
        "'bfloat16' or 'float16' measures in that precision (autocast). None uses the model's own.",
        _or_none(_check_dtype),
    ),
    "backbone": Argument(
        "Path of the vision transformer in a model that contains several, such as 'model.vision_tower'.",
        check_path,
    ),
    "forward_kwargs": Argument(
        "Arguments of each forward pass while measuring, such as {'interpolate_pos_encoding': True} for images of "
        "another size than the model was made for.",
        check_forward_kwargs,
    ),
    # The options of peft.LoraConfig whose values PEFT itself would not refuse, or not by name.
    "r": Argument("Rank of LoRA.", partial(check_count, lowest=1)),
    "lora_alpha": Argument("Scale of LoRA: its update is multiplied by lora_alpha / r.", check_number),
    "lora_dropout": Argument(check=_check_dropout),
    "lora_bias": Argument(check=check_flag),
    "use_dora": Argument(check=check_flag),
    "use_rslora": Argument(check=check_flag),
    "fan_in_fan_out": Argument(check=check_flag),
    "rank_pattern": Argument(check=_check_rank_pattern),
    "alpha_pattern": Argument(check=_check_alpha_pattern),
    "bias": Argument(check=partial(check_choice, allowed=("none", "all", "lora_only"))),
    "modules_to_save": Argument(check=_or_none(_check_module_names)),
}
"""Every argument, by its name."""


def check_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments in their canonical form, such as `candidates` as a tuple and `dtype` as a name.

    Args:
        values: some of the arguments in `ARGUMENTS`, by name.

    Raises:
        ConfigError: a value is not allowed, both `top_k` and `budget` are given, or `candidates` does not go with
            `granularity`.

    Examples:
        >>> check_arguments({"candidates": ["MHA", "FC1"], "seed": 0})
        {'candidates': ('MHA', 'FC1'), 'seed': 0}
        >>> check_arguments({"top_k": 0})
        Traceback (most recent call last):
        plasticity_peft.errors.ConfigError: top_k must be a whole number of at least 1. Got 0.
    """
    top_k, budget = values.get("top_k"), values.get("budget")
    if top_k is not None and budget is not None:
        raise ConfigError(f"Give top_k or budget, not both. Got top_k={shown(top_k)} and budget={shown(budget)}.")
    found = {name: ARGUMENTS[name].check(name, value) for name, value in values.items()}
    if "candidates" in found and "granularity" in found:
        _check_go_together(found["candidates"], found["granularity"])
    return found


T = TypeVar("T")


def with_documented_fields(cls: type[T]) -> type[T]:
    """Returns a dataclass whose docstring has an `Args:` section, from the help texts of its own fields.

    The section comes before `Examples:`. Inherited fields are left to the documentation of the parent class.

    Examples:
        >>> from dataclasses import dataclass, field
        >>> @with_documented_fields
        ... @dataclass
        ... class Config:
        ...     '''Two numbers.'''
        ...
        ...     width: int = field(default=1, metadata={"help": "Number of columns."})
        >>> print(Config.__doc__)
        Two numbers.
        <BLANKLINE>
            Args:
                width: Number of columns.
        <BLANKLINE>
    """
    if not cls.__doc__:  # python -OO
        return cls
    own = [each for each in fields(cls) if each.name in cls.__annotations__ and each.init]  # type: ignore[arg-type]
    rows = [fill(f"{each.name}: {each.metadata['help']}", 107, subsequent_indent="    ") for each in own]
    section = indent("\n".join(["Args:", *(indent(row, "    ") for row in rows)]), "    ")
    before, examples, after = cls.__doc__.rstrip().partition("    Examples:\n")
    cls.__doc__ = f"{before.rstrip()}\n\n{section}\n" + (f"\n{examples}{after}\n    " if examples else "    ")
    return cls
