"""The command line, `plasticity-peft` or `python -m plasticity_peft`.

Exit codes: 0 for success; 1 for an error, which is one line on the standard error; 2 for wrong usage. Any other
exception than one of this library or an OSError is a bug, and keeps its traceback.

The modules of the commands import torch, and packages that need it, inside functions, so that help and shell
completion are quick.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from plasticity_peft import __version__
from plasticity_peft.cli import card, compare, forecast, measure, select, show
from plasticity_peft.errors import PlasticityError


class Commands(TyperGroup):
    """The commands, with errors in one line."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that the user gave."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of the output has closed it: typer ends without a message
        except (PlasticityError, OSError) as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # Options are spelled as in transformers; --batch-size is accepted too.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("-", "_"),
        "max_content_width": 100,
    },
)
for module, command in (
    (measure, measure.measure),
    (forecast, forecast.forecast),
    (show, show.show),
    (select, select.select),
    (compare, compare.compare),
    (card, card.card),
):
    app.command(epilog=module.EXAMPLES)(command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measures, ranks and selects the components of vision transformers that finetune best."""


def main() -> None:
    """Runs the command line of this process."""
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    app()
