"""`plasticity-peft measure`: measures a model on images and writes a report."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plasticity_peft.checks import DTYPES, PROTOCOLS
from plasticity_peft.cli import images as named
from plasticity_peft.cli import options
from plasticity_peft.criteria.registry import CRITERIA
from plasticity_peft.deprecation import warn_renamed
from plasticity_peft.errors import SelectionError

if TYPE_CHECKING:
    from accelerate import PartialState

    from plasticity_peft.report.report import PlasticityReport

EXAMPLES = """\b
Examples:
  plasticity-peft measure google/vit-base-patch16-224-in21k beans --output beans.json --plot beans.png
  plasticity-peft measure facebook/dinov2-small path/to/images --image_size 224 --json > report.json
  plasticity-peft measure path/to/model target.parquet --source source.parquet --criterion rate_of_change
  plasticity-peft measure path/to/model --criterion bound
  accelerate launch -m plasticity_peft measure path/to/model path/to/images --max_samples 12800
"""


def measure(
    model: Annotated[str, typer.Argument(help="Hub name or folder of a vision transformer.")],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Hub name of an image dataset, a folder of images, or parquet or tar files. A criterion that reads "
            "only weights needs none."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Pretraining-like images for the other half of each pair.")
    ] = None,
    split: named.Split = "train",
    dataset_config_name: named.Configuration = None,
    image_column: named.ImageColumn = "image",
    label_column: named.LabelColumn = "label",
    image_size: named.ImageSize = None,
    streaming: named.Streaming = False,
    revision: options.Revision = None,
    plugin: options.Plugin = None,
    fit_head: Annotated[
        bool,
        typer.Option(
            "--fit_head",
            help="Fit the classification head to the labels of the images in closed form first, for criteria with "
            "gradients. The leave-one-out accuracy is printed.",
        ),
    ] = False,
    criterion: Annotated[str | None, options.one_of("--criterion", CRITERIA, options.HELP["criterion"])] = None,
    inputs: Annotated[str | None, options.one_of("--inputs", PROTOCOLS, options.HELP["inputs"])] = None,
    max_samples: Annotated[int, typer.Option("--max_samples", help=options.HELP["max_samples"])] = 1024,
    pairs: Annotated[int | None, typer.Option("--pairs", hidden=True)] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help=options.HELP["batch_size"])] = 32,
    seed: Annotated[int, typer.Option("--seed", help=options.HELP["seed"])] = 0,
    settle: Annotated[
        float, typer.Option("--settle", help=f"{options.HELP['settle']} On the command line, 0 stands for None.")
    ] = 0.95,
    top_k: options.TopK = None,
    budget: options.Budget = None,
    granularity: options.Granularity = "kind",
    candidates: options.Candidates = options.ALL_KINDS,
    training: options.Training = None,
    r: options.Rank = None,
    dtype: Annotated[str | None, options.one_of("--dtype", DTYPES, options.HELP["dtype"])] = None,
    backbone: options.Backbone = None,
    forward_kwargs: options.ForwardKwargs = None,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels/--no-labels",
            help="Use the labels of the images, too: forecast the accuracy that finetuning will give, by kind, for "
            "pairs of kinds and everything, and recommend one.",
        ),
    ] = False,
    ddp_timeout: options.Timeout = 1800,
    output: Annotated[Path | None, typer.Option("--output", help="Write the report to this JSON file.")] = None,
    plot: options.Picture = None,
    view: options.View = "overview",
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Measures which components of a model are worth training, on your images, and prints the ranking."""
    from plasticity_peft.cli.models import load_processor
    from plasticity_peft.cli.reports import check_file, check_picture
    from plasticity_peft.measuring.measure import measure_plasticity

    check_file(output, "--output")
    check_picture(plot)
    state = named.processes(ddp_timeout)
    target = named.NamedImages(data, split, image_column, label_column, dataset_config_name, streaming)
    others = named.NamedImages(source, split, image_column, label_column, streaming=streaming)
    with state.main_process_first():
        target.load()
        others.load()
    loaded = named.load_for(target, model, state, seed, revision)
    processor = None if data is None and source is None else load_processor(model, image_size, revision)
    images = target.prepared(processor)
    rule: dict[str, Any] = {"top_k": top_k, "budget": budget, "granularity": granularity}
    rule["r"] = r or options.USUAL_RANK
    rule["training"] = options.mode(training, r)
    rule["candidates"] = options.several(candidates)
    shared: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "dtype": dtype, "backbone": backbone}
    if fit_head:
        _fit_head(loaded, images, state, **shared, forward_kwargs=forward_kwargs)
    report = measure_plasticity(
        loaded,
        images,
        others.prepared(processor),
        **shared,
        criterion=criterion,
        inputs=inputs,
        max_samples=_max_samples(max_samples, pairs),
        settle=settle or None,
        **rule,
        forward_kwargs=forward_kwargs,
        forecast=labels,
    )
    if state.is_main_process:
        _hand_out(report, rule, output, plot, view, as_json)
    state.destroy_process_group()


def _max_samples(max_samples: int, pairs: int | None) -> int:
    """Returns `max_samples`, or the value of its former name if that is given."""
    if pairs is None:
        return max_samples
    warn_renamed("--pairs", "--max_samples", stacklevel=2)
    return pairs


def _fit_head(model: Any, images: Any, state: PartialState, **options: Any) -> None:
    """Fits the head of the model, and prints what was found to standard error."""
    from plasticity_peft.errors import ConfigError
    from plasticity_peft.measuring.head import fit_head

    if images is None:
        raise ConfigError("--fit_head needs labeled images. Name a dataset after the model.")
    found = fit_head(model, images, **options)
    if state.is_main_process:
        typer.echo(str(found), err=True)


def _hand_out(
    report: PlasticityReport, rule: dict[str, Any], output: Path | None, plot: Path | None, view: str, as_json: bool
) -> None:
    from plasticity_peft.cli.reports import print_json, save_picture
    from plasticity_peft.report.selecting import selected_by
    from plasticity_peft.report.selection import SelectionRule

    if output is not None:
        report.save(output)
    if plot is not None:
        selection = None
        with suppress(SelectionError):  # the best unit does not fit into the budget
            selection = selected_by(report, SelectionRule(**rule))
        save_picture(report, plot, view, selection)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))
