"""`plasticity-peft measure`: measures a model on images and writes a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plasticity_peft.checks import DTYPES, PROTOCOLS
from plasticity_peft.cli import options
from plasticity_peft.criteria.registry import CRITERIA
from plasticity_peft.deprecation import warn_renamed

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
        typer.Option("--image_size", help="Side of the images in pixels. By default the size in the model's config."),
    ] = None,
    revision: options.Revision = None,
    plugin: options.Plugin = None,
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
    training: options.Training = "lora",
    r: options.Rank = 8,
    dtype: Annotated[str | None, options.one_of("--dtype", DTYPES, options.HELP["dtype"])] = None,
    backbone: options.Backbone = None,
    forward_kwargs: options.ForwardKwargs = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the report to this JSON file.")] = None,
    plot: options.Picture = None,
    view: options.View = "overview",
    as_json: options.AsJson = False,
) -> None:
    """Measures which components of a model are worth training, on your images, and prints the ranking."""
    from plasticity_peft.cli.models import load_processor
    from plasticity_peft.cli.reports import check_file, check_picture
    from plasticity_peft.measuring.measure import measure_plasticity

    if pairs is not None:
        warn_renamed("--pairs", "--max_samples", stacklevel=1)
        max_samples = pairs
    check_file(output, "--output")
    check_picture(plot)
    state = _state()
    target = _Images(data, split, image_column, label_column, dataset_config_name)
    others = _Images(source, split, image_column, label_column)
    with state.main_process_first():
        target.load()
        others.load()
    loaded = _load_model(model, target, seed, revision).to("cpu" if state.device.type == "mps" else state.device)
    processor = None if data is None and source is None else load_processor(model, image_size, revision)
    report = measure_plasticity(
        loaded,
        target.prepared(processor),
        others.prepared(processor),
        criterion=criterion,
        inputs=inputs,
        max_samples=max_samples,
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
        _hand_out(report, output, plot, view, as_json)
    state.destroy_process_group()


def _state() -> PartialState:
    """Returns the processes that `accelerate launch` started, or this one."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


class _Images:
    """The dataset of an option, if the option is given."""

    def __init__(
        self, name: str | None, split: str, image_column: str, label_column: str, configuration: str | None = None
    ) -> None:
        self.name, self.split, self.configuration = name, split, configuration
        self.columns = {"image_column": image_column, "label_column": label_column}
        self.rows: Any = None

    def load(self) -> None:
        """Reads the dataset, or downloads it."""
        from plasticity_peft.images.datasets import choose_split, load_image_dataset

        if self.name is not None:
            self.rows = choose_split(load_image_dataset(self.name, self.configuration), self.split, self.name)

    def labels(self) -> list[str] | None:
        """Returns the names of the labels; None if the dataset has none."""
        from plasticity_peft.images.datasets import label_names

        return None if self.rows is None else label_names(self.rows, self.columns["label_column"])

    def prepared(self, processor: Any) -> Any:
        """Returns the images in the form that the model takes; None without a dataset."""
        from plasticity_peft.images.datasets import with_pixel_values

        if self.rows is None:
            return None
        return with_pixel_values(self.rows, processor, name=str(self.name), **self.columns)


def _load_model(name: str, target: _Images, seed: int, revision: str | None) -> Any:
    """Returns the model. A new head gets random weights from `seed`."""
    from accelerate.utils import set_seed

    from plasticity_peft.cli.models import load_model

    set_seed(seed)
    return load_model(name, target.labels(), revision=revision)


def _hand_out(report: PlasticityReport, output: Path | None, plot: Path | None, view: str, as_json: bool) -> None:
    from plasticity_peft.cli.reports import print_json, save_picture

    if output is not None:
        report.save(output)
    if plot is not None:
        save_picture(report, plot, view)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))
