"""`plasticity-peft measure`: a model and images in, a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed

from plasticity_peft.checks import PROTOCOLS
from plasticity_peft.cli import options
from plasticity_peft.cli.models import load_model, load_processor
from plasticity_peft.cli.reports import check_file, check_picture, print_json, save_picture
from plasticity_peft.criteria import CRITERIA
from plasticity_peft.criteria.precision import DTYPES
from plasticity_peft.images.datasets import choose_split, label_names, load_image_dataset, with_pixel_values
from plasticity_peft.measuring.measure import measure_plasticity
from plasticity_peft.report.report import PlasticityReport

EXAMPLES = """\b
Examples:
  plasticity-peft measure google/vit-base-patch16-224-in21k beans --output beans.json --plot beans.png
  plasticity-peft measure facebook/dinov2-small path/to/images --image_size 224 --json > report.json
  plasticity-peft measure path/to/model target.parquet --source source.parquet --criterion rate_of_change
  plasticity-peft measure path/to/model --criterion bound
  accelerate launch -m plasticity_peft measure path/to/model path/to/images --pairs 12800
"""


def measure(
    model: Annotated[str, typer.Argument(help="Hub name or folder of a vision transformer.")],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Hub name of an image dataset, a folder of images, or a parquet file. A criterion that reads only "
            "weights needs none."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Pretraining-like images for the other half of each pair.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of both datasets.")] = "train",
    dataset_config_name: Annotated[
        str | None, typer.Option("--dataset_config_name", help="Configuration of the dataset on the Hub.")
    ] = None,
    image_column: Annotated[str, typer.Option("--image_column", help="Column of the images.")] = "image",
    label_column: Annotated[str, typer.Option("--label_column", help="Column of the labels, if any.")] = "label",
    image_size: Annotated[
        int | None,
        typer.Option("--image_size", help="Side of the images in pixels; what the model was made for by default."),
    ] = None,
    revision: options.Revision = None,
    criterion: Annotated[str | None, options.one_of("--criterion", CRITERIA, options.HELP["criterion"])] = None,
    inputs: Annotated[str | None, options.one_of("--inputs", PROTOCOLS, options.HELP["inputs"])] = None,
    pairs: Annotated[int, typer.Option("--pairs", help=options.HELP["pairs"])] = 1024,
    batch_size: Annotated[int, typer.Option("--batch_size", help=options.HELP["batch_size"])] = 32,
    seed: Annotated[int, typer.Option("--seed", help=options.HELP["seed"])] = 0,
    settle: Annotated[
        float,
        typer.Option("--settle", help="End when the choice is settled at this confidence; 0 looks at all pairs."),
    ] = 0.95,
    top_k: options.TopK = None,
    budget: options.Budget = None,
    granularity: options.Granularity = "kind",
    candidates: options.Candidates = options.ALL_KINDS,
    training: options.Training = "lora",
    r: options.Rank = 8,
    dtype: Annotated[str | None, options.one_of("--dtype", DTYPES, options.HELP["dtype"])] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help=options.HELP["backbone"])] = None,
    forward_kwargs: Annotated[
        dict[str, Any] | None,
        typer.Option(
            "--forward_kwargs",
            parser=options.json_object,
            metavar="JSON",
            help="Arguments of each forward pass as JSON, such as '{\"interpolate_pos_encoding\": true}' for images "
            "of another size than the model was made for.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the report to this JSON file.")] = None,
    plot: options.Picture = None,
    as_json: options.AsJson = False,
) -> None:
    """Measures which components of a model are worth training, on your images, and prints the ranking."""
    check_file(output, "--output")
    check_picture(plot)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with state.main_process_first():
        target = None if data is None else choose_split(load_image_dataset(data, dataset_config_name), split, data)
        others = None if source is None else choose_split(load_image_dataset(source), split, source)
    set_seed(seed)  # of a head that the model does not have yet
    labels = None if target is None else label_names(target, label_column)
    device = "cpu" if state.device.type == "mps" else state.device  # which has no float64
    loaded = load_model(model, labels, revision=revision).to(device)
    if target is not None or others is not None:
        columns = {"image_column": image_column, "label_column": label_column}
        processor = load_processor(model, image_size, revision)
        target, others = (
            None if images is None else with_pixel_values(images, processor, name=str(name), **columns)
            for images, name in ((target, data), (others, source))
        )
    report = measure_plasticity(
        loaded,
        target,
        others,
        criterion=criterion,
        inputs=inputs,
        max_samples=pairs,
        batch_size=batch_size,
        seed=seed,
        settle=settle or None,
        top_k=top_k,
        budget=budget,
        granularity=granularity,
        candidates=options.several(candidates),
        training=training,
        dtype=dtype,
        backbone=backbone,
        forward_kwargs=forward_kwargs,
        r=r,
    )
    if state.is_main_process:
        _hand_out(report, output, plot, as_json)
    state.destroy_process_group()


def _hand_out(report: PlasticityReport, output: Path | None, plot: Path | None, as_json: bool) -> None:
    if output is not None:
        report.save(output)
    if plot is not None:
        save_picture(report, plot)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))
