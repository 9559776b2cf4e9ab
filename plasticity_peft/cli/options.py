"""Options that several commands share. Their help texts are those of `plasticity_peft.arguments`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plasticity_peft.arguments import ARGUMENTS
from plasticity_peft.checks import GRANULARITIES, TRAINING_MODES
from plasticity_peft.cli.plugins import load_plugins
from plasticity_peft.components.component import KINDS
from plasticity_peft.deprecation import warn_renamed
from plasticity_peft.report.plotting import VIEWS

HELP = {name: argument.help for name, argument in ARGUMENTS.items()}
WIDEST_CHOICES = 40
"""Largest number of characters of the choices of an option in the help. Longer lists must be in the help text."""


def mode(training: str | None, *of_lora: int | None) -> str:
    """Returns the mode that is given, or else LoRA if one of its options is.

    Examples:
        >>> mode(None, None), mode(None, 8), mode("full", 16)
        ('full', 'lora', 'full')
    """
    return training or ("full" if all(option is None for option in of_lora) else "lora")


def one_of(name: str, allowed: Iterable[str], help: str, former: Mapping[str, str] | None = None) -> Any:
    """Returns an option with a fixed set of values, which the shell completes.

    Args:
        name: the option, such as "--view".
        allowed: the values. They are looked up when the option is used: a plugin may add some.
        help: what the option does.
        former: new values, by the former ones, which are accepted with a warning.
    """

    def check(value: str | None) -> str | None:
        if value is not None and value in (former or {}):
            new = (former or {})[value]
            warn_renamed(f"{name} {value}", f"{name} {new}", stacklevel=2)
            return new
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}.")
        return value

    def complete(incomplete: str) -> list[str]:
        return [value for value in allowed if value.startswith(incomplete)]

    choices = "|".join(allowed)
    metavar = choices if len(choices) <= WIDEST_CHOICES else name.strip("-").upper()
    return typer.Option(name, callback=check, autocompletion=complete, metavar=metavar, help=help)


def json_object(value: str) -> dict[str, Any]:
    """Returns a JSON object. Any other text is a usage error.

    Examples:
        >>> json_object('{"interpolate_pos_encoding": true}')
        {'interpolate_pos_encoding': True}
    """
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f'{value!r} is not a JSON object, such as {{"interpolate_pos_encoding": true}}.')
    return found


def several(value: str | None) -> tuple[str, ...]:
    """Returns the parts of a comma-separated value.

    Examples:
        >>> several("MHA, FC1")
        ('MHA', 'FC1')
    """
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _set_verbosity(verbose: bool) -> None:
    """Sets transformers' verbosity to "info", which the loggers of this package follow."""
    if verbose:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(logging.INFO)


Report = Annotated[
    str, typer.Argument(help="A report file, the folder of an adapter, or an adapter on the Hub (user/repo).")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
ModelRevision = Annotated[
    str | None, typer.Option("--model_revision", help="Branch, tag or commit of --model on the Hub.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on the standard output.")]
Picture = Annotated[
    Path | None, typer.Option("--plot", help="Write a picture of the scores (.png, .pdf, .svg). Needs matplotlib.")
]
View = Annotated[str, one_of("--view", VIEWS, "What the picture of --plot shows.")]
Page = Annotated[
    Path | None,
    typer.Option(
        "--html",
        help="Write a page (.html) on which the cut can be moved: by number, or by a budget of parameters, time or "
        'memory. Needs the extra "html".',
    ),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        callback=load_plugins,
        is_eager=True,
        metavar="MODULE",
        help="Name of an importable module, or path of a .py file, that calls register_criterion or "
        "register_architecture. Its code is executed. May be given several times.",
    ),
]
TopK = Annotated[int | None, typer.Option("--top_k", help=HELP["top_k"])]
Budget = Annotated[str | None, typer.Option("--budget", help=HELP["budget"])]
USUAL_RANK, USUAL_ALPHA = 8, 8
"""Those of `peft.LoraConfig`."""
FORMER_GRANULARITIES = {"block": "component"}
Granularity = Annotated[str, one_of("--granularity", GRANULARITIES, HELP["granularity"], FORMER_GRANULARITIES)]
Candidates = Annotated[str, typer.Option("--candidates", help=f"{HELP['candidates']} Separated by commas.")]
Training = Annotated[str | None, one_of("--training", TRAINING_MODES, HELP["training"])]
Rank = Annotated[int | None, typer.Option("--r", help=f"{HELP['r']} By default {USUAL_RANK}.", min=1)]
Alpha = Annotated[
    int | None, typer.Option("--lora_alpha", help=f"{HELP['lora_alpha']} By default {USUAL_ALPHA}.", min=1)
]
Backbone = Annotated[str | None, typer.Option("--backbone", help=HELP["backbone"])]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", callback=_set_verbosity, is_eager=True, help="Also print what the libraries say of their work."
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--ddp_timeout",
        min=1,
        help="Under accelerate launch: seconds that a process waits for the others before it ends with an error.",
    ),
]
ForwardKwargs = Annotated[
    dict[str, Any] | None,
    typer.Option("--forward_kwargs", parser=json_object, metavar="JSON", help=f"{HELP['forward_kwargs']} As JSON."),
]

ALL_KINDS = ",".join(KINDS)
"""The default of `Candidates`."""
