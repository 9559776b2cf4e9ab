"""Image datasets by name: from the Hub, a folder or a parquet file, with a model's image processor.

datasets and pillow belong to the extra `datasets`, and are imported when they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plasticity_peft.errors import DataError
from plasticity_peft.extras import require


def load_image_dataset(name: str, config_name: str | None = None) -> Any:
    """Returns the splits of a dataset as a datasets.DatasetDict.

    Args:
        name: a parquet file, a folder of images (one subfolder per class, if they have labels) or of parquet files, or
            a name on the Hub.
        config_name: configuration of a dataset on the Hub.

    Raises:
        DataError: there is no such dataset, or it cannot be read.
        MissingExtraError: datasets or pillow is not installed.
    """
    datasets = require("datasets", extra="datasets", purpose="Reading images")
    require("PIL", extra="datasets", purpose="Reading images")
    try:
        if Path(name).suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=name)
        if Path(name).is_dir() and not any(Path(name).rglob("*.parquet")):
            return datasets.load_dataset("imagefolder", data_dir=name)
        return datasets.load_dataset(name, config_name)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"Cannot read the dataset {name}: {cause} Expected a dataset on the Hub, a folder of images or a parquet "
            "file."
        ) from error


def choose_split(splits: Any, split: str, name: str) -> Any:
    """Returns one split of the dataset `name`. Raises DataError if it has no such split."""
    if split not in splits:
        raise DataError(f"The dataset {name} has no split {split!r}. It has: {', '.join(map(repr, splits))}.")
    return splits[split]


def label_names(dataset: Any, label_column: str = "label") -> list[str] | None:
    """Returns the names of the labels of a dataset; None if it has no column of named labels."""
    return getattr(dataset.features.get(label_column), "names", None)


def with_pixel_values(
    dataset: Any, processor: Any, *, name: str, image_column: str = "image", label_column: str = "label"
) -> Any:
    """Returns the dataset with `pixel_values`, which `processor` makes of its images, and with its labels, if any.

    Raises:
        DataError: the dataset `name` has no such column of images.
    """
    if image_column not in dataset.features:
        raise DataError(
            f"The dataset {name} has no column {image_column!r}. It has: {', '.join(map(repr, dataset.features))}. "
            "Name the column of the images."
        )

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[image_column]]
        processed = dict(processor(images=images, return_tensors="pt"))
        if label_column in batch:
            processed["labels"] = batch[label_column]
        return processed

    return dataset.with_transform(transform)
