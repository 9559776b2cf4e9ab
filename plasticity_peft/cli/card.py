"""`plasticity-peft card`: the model card of a saved adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from plasticity_peft.card import update_card

EXAMPLES = """\b
Examples:
  plasticity-peft card path/to/adapter
  plasticity-peft card path/to/adapter --metric accuracy=0.94 --dataset beans --split test
"""


def card(
    adapter: Annotated[str, typer.Argument(help="The folder of an adapter that was trained with this package.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help="What was measured, as name=value; may be given several times.", metavar="NAME=VALUE"
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Name of the dataset of the metrics.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of that dataset.")] = None,
) -> None:
    """Writes the model card of an adapter anew, with what was measured, chosen and trained, and prints its path.

    What PEFT, the Trainer or a person wrote beside that stays.
    """
    metrics = dict(map(_parsed, metric)) if metric else None
    typer.echo(update_card(adapter, metrics=metrics, dataset=dataset, split=split))


def _parsed(metric: str) -> tuple[str, float]:
    name, _, value = metric.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise typer.BadParameter(f"--metric must be name=value, such as accuracy=0.94. Got {metric!r}.") from None
