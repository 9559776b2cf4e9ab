"""`plasticity-peft card`: the model card of a saved adapter."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = """\b
Examples:
  plasticity-peft card path/to/adapter
  plasticity-peft card path/to/adapter --metric accuracy=0.94 --dataset beans --split test
"""


def card(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter that was trained with this package.")],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="A result, as name=value. May be given several times.", metavar="NAME=VALUE"),
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Name of the dataset of the metrics.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of that dataset.")] = None,
) -> None:
    """Writes the model card of an adapter again and prints its path.

    The card describes what was measured, selected and trained. All other text in it is unchanged.
    """
    from plasticity_peft.card import update_card

    metrics = dict(map(_parsed, metric)) if metric else None
    typer.echo(update_card(adapter, metrics=metrics, dataset=dataset, split=split))


def _parsed(metric: str) -> tuple[str, float]:
    name, _, value = metric.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise typer.BadParameter(f"--metric must be name=value, such as accuracy=0.94. Got {metric!r}.") from None
