"""`plasticity-peft forecast`: says what finetuning sets of components will give, before anything trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plasticity_peft.checks import DTYPES
from plasticity_peft.cli import images as named
from plasticity_peft.cli import options

if TYPE_CHECKING:
    from plasticity_peft.report.forecast import Forecast

EXAMPLES = """\b
Examples:
  plasticity-peft forecast google/vit-base-patch16-224-in21k beans
  plasticity-peft forecast facebook/dinov2-small path/to/images --image_size 98 --set MHA --set MHA,FC1
  plasticity-peft forecast facebook/dinov2-small path/to/images --budget "0.5 time" --budget "0.7 time"
  accelerate launch -m plasticity_peft forecast path/to/model path/to/images --output forecast.json
"""


def forecast(
    model: Annotated[str, typer.Argument(help="Hub name or folder of a vision transformer.")],
    data: Annotated[
        str, typer.Argument(help="Hub name of an image dataset with labels, a folder of images, or a parquet file.")
    ],
    split: named.Split = "train",
    dataset_config_name: named.Configuration = None,
    image_column: named.ImageColumn = "image",
    label_column: named.LabelColumn = "label",
    image_size: named.ImageSize = None,
    revision: options.Revision = None,
    plugin: options.Plugin = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Kinds and components that train together, separated by commas. May be given several times. By "
            "default each kind, pairs of kinds, and everything.",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            help="Also find the components that promise most within a budget: a share of the parameters, such as 0.1, "
            "or of a training step, '0.6 time' or '0.5 memory'. May be given several times.",
        ),
    ] = None,
    candidates: Annotated[
        str,
        typer.Option(
            "--candidates",
            help="Kinds and components, separated by commas, of which the components within a budget are chosen.",
        ),
    ] = options.ALL_KINDS,
    max_samples: Annotated[int, typer.Option("--max_samples", help="Largest number of images to use.")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch_size", help=options.HELP["batch_size"])] = 32,
    seed: Annotated[int, typer.Option("--seed", help=options.HELP["seed"])] = 0,
    dtype: Annotated[str | None, options.one_of("--dtype", DTYPES, options.HELP["dtype"])] = None,
    backbone: options.Backbone = None,
    forward_kwargs: options.ForwardKwargs = None,
    ddp_timeout: options.Timeout = 1800,
    pilot: Annotated[
        bool,
        typer.Option(
            "--pilot/--no-pilot",
            help="Train copies of the model for 16 steps, at the recommended rates and at a quarter of them, and one "
            "for 64 if that gains more than expected. Then the forecast is raised.",
        ),
    ] = True,
    output: Annotated[Path | None, typer.Option("--output", help="Write the forecast to this JSON file.")] = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Forecasts the accuracy of finetuning sets of components, with intervals and costs, and recommends one."""
    from plasticity_peft.cli.models import load_processor
    from plasticity_peft.cli.reports import check_file
    from plasticity_peft.measuring.forecast import forecast_finetuning

    check_file(output, "--output")
    state = named.processes(ddp_timeout)
    target = named.NamedImages(data, split, image_column, label_column, dataset_config_name)
    with state.main_process_first():
        target.load()
    found = forecast_finetuning(
        named.load_for(target, model, state, seed, revision),
        target.prepared(load_processor(model, image_size, revision)),
        sets=[options.several(each) for each in sets] if sets else None,
        budget=budget,
        candidates=options.several(candidates),
        max_samples=max_samples,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        backbone=backbone,
        forward_kwargs=forward_kwargs,
        pilot=pilot,
    )
    if state.is_main_process:
        _hand_out(found, output, as_json)
    state.destroy_process_group()


def _hand_out(found: Forecast, output: Path | None, as_json: bool) -> None:
    from plasticity_peft.cli.reports import print_json
    from plasticity_peft.files import write_text

    values: dict[str, Any] = found.to_dict()
    if output is not None:
        write_text(output, json.dumps(values, indent=2) + "\n")
    if as_json:
        print_json(values)
    else:
        typer.echo(str(found))
