"""`plasticity-peft select`: a report cut at some number or budget, as a LoraConfig for stock PEFT."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import yaml

from plasticity_peft.adapters.model import lora_arguments
from plasticity_peft.adapters.what_trains import peft_names
from plasticity_peft.cli import options
from plasticity_peft.cli.models import blank_model
from plasticity_peft.cli.reports import print_json, read_report
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import Component

EXAMPLES = """\b
Examples:
  plasticity-peft select beans.json --top_k 2 --model google/vit-base-patch16-224-in21k > lora.yaml
  plasticity-peft select beans.json --budget 0.01 --granularity component --head classifier
  plasticity-peft select user/repo --training full --head classifier --format json
\b
In a script that does not know this package:
  LoraConfig(**yaml.safe_load(open("lora.yaml")))
"""


def select(
    report: options.Report,
    top_k: options.TopK = None,
    budget: options.Budget = None,
    granularity: options.Granularity = "kind",
    candidates: options.Candidates = options.ALL_KINDS,
    training: options.Training = "lora",
    r: options.Rank = 8,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Hub name or folder of the model that is to train: modules and head are named as the installed "
            "transformers names them. Without it, names are those of the model that was measured. Only its config "
            "is read.",
        ),
    ] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help=options.HELP["backbone"])] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            help="Modules that train in full beside the selected ones, such as classifier, with commas between. A "
            "report does not name the head: give this or --model.",
        ),
    ] = None,
    format: Annotated[str, options.one_of("--format", ("yaml", "json"), "How the config is printed.")] = "yaml",
    model_revision: options.ModelRevision = None,
    revision: options.Revision = None,
) -> None:
    """Prints the LoraConfig of the best components of a report, for a script that needs only PEFT.

    Norms in lora mode, all that is selected in full mode, and the head are in modules_to_save.
    """
    found = read_report(report, revision)
    kinds = options.several(candidates)
    selection = found.select(top_k, budget, granularity=granularity, candidates=kinds, training=training, r=r)
    components: tuple[Component, ...] = found.scores
    heads = options.several(head)
    if model is not None:
        built = blank_model(model, model_revision)
        architecture = find_architecture(built, backbone)
        found.check_matches(architecture.model_type, architecture.components)
        components, heads = architecture.components, (*peft_names(built, architecture.heads), *heads)
    if not heads:
        typer.echo("Warning: no head will train. Name it with --head, or give --model to find it.", err=True)
    config = {"r": r, **lora_arguments(components, selection.components, training, heads=heads)}
    _print(config, format, ", ".join(selection.units), selection.parameters[training])


def _print(config: dict[str, Any], format: str, units: str, parameters: int) -> None:
    if format == "json":
        print_json(config)
    else:
        typer.echo(f"# {units}: {parameters:,} parameters, the head not counted")
        typer.echo(yaml.safe_dump(config, sort_keys=False), nl=False)
