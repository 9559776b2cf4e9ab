"""What the commands that run a model share: the dataset that is named, the model with a head for it, the processes."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from accelerate import PartialState

Split = Annotated[str, typer.Option("--split", help="Split of the dataset.")]
Configuration = Annotated[
    str | None, typer.Option("--dataset_config_name", help="Configuration of the dataset on the Hub.")
]
ImageColumn = Annotated[str, typer.Option("--image_column", help="Column of the images.")]
LabelColumn = Annotated[str, typer.Option("--label_column", help="Column of the labels, if any.")]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Read images only when they are used, and keep nothing on the disk.")
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image_size", help="Side of the images in pixels. By default the size in the model's config."),
]


class NamedImages:
    """The dataset of an option, if the option is given."""

    def __init__(
        self,
        name: str | None,
        split: str,
        image_column: str,
        label_column: str,
        configuration: str | None = None,
        streaming: bool = False,
    ) -> None:
        self.name, self.split, self.configuration, self.streaming = name, split, configuration, streaming
        self.columns = {"image_column": image_column, "label_column": label_column}
        self.rows: Any = None

    def load(self) -> None:
        """Reads the dataset, or downloads it."""
        from plasticity_peft.images.datasets import choose_split, load_image_dataset

        if self.name is not None:
            found = load_image_dataset(self.name, self.configuration, streaming=self.streaming)
            self.rows = choose_split(found, self.split, self.name)

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


def processes(ddp_timeout: float) -> PartialState:
    """Returns the processes that `accelerate launch` started, or this one. They wait this many seconds for others."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(seconds=ddp_timeout))


def load_for(images: NamedImages, name: str, state: PartialState, seed: int, revision: str | None) -> Any:
    """Returns the model with a head for the labels of the images, on the device. New weights follow from `seed`."""
    from accelerate.utils import set_seed

    from plasticity_peft.cli.models import load_model

    set_seed(seed)
    model = load_model(name, images.labels(), revision=revision)
    return model.to("cpu" if state.device.type == "mps" else state.device)
