"""`plasticity-peft select`: the selection from a report, as a LoraConfig for stock PEFT."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from plasticity_peft.cli import options

EXAMPLES = """\b
Examples:
  plasticity-peft select beans.json --top_k 2 --model google/vit-base-patch16-224-in21k > lora.yaml
  plasticity-peft select beans.json --budget 0.01 --granularity component --head classifier
  plasticity-peft select beans.json --budget "0.6 time" --granularity component --training full --head classifier
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
    training: options.Training = None,
    r: options.Rank = None,
    lora_alpha: options.Alpha = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Hub name or folder of the model to train. Modules and head then have the names in the installed "
            "transformers. Without it, they have the names in the measured model. Only the model's config is read.",
        ),
    ] = None,
    backbone: options.Backbone = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            help="Modules that train in full in addition to the selected ones, such as classifier, separated by "
            "commas. A report does not contain the head, so give this or --model.",
        ),
    ] = None,
    format: Annotated[str, options.one_of("--format", ("yaml", "json"), "How the config is printed.")] = "yaml",
    plugin: options.Plugin = None,
    model_revision: options.ModelRevision = None,
    revision: options.Revision = None,
) -> None:
    """Prints the LoraConfig of the best components of a report, for a script that needs only PEFT.

    modules_to_save contains the head and, in lora mode, the selected norms, or, in full mode, all selected modules.
    """
    from plasticity_peft.adapters.model import lora_arguments
    from plasticity_peft.cli.reports import read_report
    from plasticity_peft.report.text import sure_in_words

    found = read_report(report, revision)
    kinds = options.several(candidates)
    training = options.mode(training, r, lora_alpha)
    r, lora_alpha = r or options.USUAL_RANK, lora_alpha or options.USUAL_ALPHA
    selection = found.select(top_k, budget, granularity=granularity, candidates=kinds, training=training, r=r)
    components: Any = found.scores
    heads = options.several(head)
    if model is not None:
        components, found_heads = _in_model(model, model_revision, backbone, found, selection, training)
        heads = (*found_heads, *heads)
    if not heads:
        typer.echo("Warning: no head will train. Give --head to name it, or --model to find it.", err=True)
    modules = lora_arguments(components, selection.components, training, heads=heads)
    config = {"r": r, "lora_alpha": lora_alpha, **modules}
    heading = f"{', '.join(selection.units)}: {selection.parameters[training]:,} parameters, without the head"
    cost = "" if selection.cost is None else f"; {selection.cost}"
    _print(config, format, f"{heading}{cost}; confidence {sure_in_words(found, selection)}")


def _in_model(
    name: str, revision: str | None, backbone: str | None, report: Any, selection: Any, training: str
) -> tuple[Any, list[str]]:
    """Returns the components of a model, and the names by which PEFT finds its heads.

    Raises:
        ModelError: LoRA on a selected component would have no effect in this model.
    """
    from plasticity_peft.adapters.preconditions import check_lora_takes_part
    from plasticity_peft.adapters.what_trains import peft_names
    from plasticity_peft.cli.models import blank_model
    from plasticity_peft.components.architecture import find_architecture

    built = blank_model(name, revision)
    architecture = find_architecture(built, backbone)
    report.check_matches(architecture.model_type, architecture.components)
    if training == "lora":
        chosen = [part for part in architecture.components if part.id in selection.components]
        check_lora_takes_part(built, architecture, [path for part in chosen for path in part.modules])
    return architecture.components, peft_names(built, architecture.heads)


def _print(config: dict[str, Any], format: str, heading: str) -> None:
    import yaml

    from plasticity_peft.cli.reports import print_json

    if format == "json":
        print_json(config)
    else:
        typer.echo(f"# {heading}")
        typer.echo(yaml.safe_dump(config, sort_keys=False), nl=False)
