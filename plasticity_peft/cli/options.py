"""Options that several commands share, each in the words of the field of `PlasticityConfig` that it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from plasticity_peft.adapters.config import PlasticityConfig
from plasticity_peft.checks import GRANULARITIES, TRAINING_MODES
from plasticity_peft.components.component import KINDS

HELP = {field.name: str(field.metadata.get("help")) for field in fields(PlasticityConfig)}


def one_of(name: str, allowed: Iterable[str], help: str) -> Any:
    """Returns an option whose value is one of `allowed`: another is wrong usage, and the shell completes it."""
    allowed = tuple(allowed)

    def check(value: str | None) -> str | None:
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}.")
        return value

    def complete(incomplete: str) -> list[str]:
        return [value for value in allowed if value.startswith(incomplete)]

    metavar = "|".join(allowed) if len(allowed) < 4 else name.strip("-").upper()
    return typer.Option(name, callback=check, autocompletion=complete, metavar=metavar, help=help)


def json_object(value: str) -> dict[str, Any]:
    """Returns a JSON object; what is none is wrong usage.

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
    """Returns the parts of a value with commas.

    Examples:
        >>> several("MHA, FC1")
        ('MHA', 'FC1')
    """
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


Report = Annotated[
    str, typer.Argument(help="A report file, the folder of an adapter, or an adapter on the Hub (user/repo).")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
ModelRevision = Annotated[
    str | None, typer.Option("--model_revision", help="Branch, tag or commit of --model on the Hub.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on the standard output.")]
Picture = Annotated[
    Path | None, typer.Option("--plot", help="Write a picture of the scores (.png, .pdf, .svg); needs matplotlib.")
]
TopK = Annotated[int | None, typer.Option("--top_k", help=HELP["top_k"])]
Budget = Annotated[float | None, typer.Option("--budget", help=HELP["budget"])]
Granularity = Annotated[str, one_of("--granularity", GRANULARITIES, HELP["granularity"])]
Candidates = Annotated[str, typer.Option("--candidates", help=f"{HELP['candidates']} With commas between.")]
Training = Annotated[str, one_of("--training", TRAINING_MODES, HELP["training"])]
Rank = Annotated[int, typer.Option("--r", help="Rank of LoRA.", min=1)]

ALL_KINDS = ",".join(KINDS)
"""The default of `Candidates`."""
