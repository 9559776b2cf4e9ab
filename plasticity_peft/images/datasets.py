"""Image datasets by name: from the Hub, a folder or a parquet file, with a model's image processor.

datasets and pillow belong to the extra `datasets`, and are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from plasticity_peft.errors import DataError
from plasticity_peft.extras import require

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
"""Loaders of the datasets library for files that contain many images, by the ends of their names."""


def load_image_dataset(
    name: str | Mapping[str, Sequence[str]], config_name: str | None = None, *, streaming: bool = False
) -> Any:
    """Returns the splits of a dataset as a datasets.DatasetDict, or as a datasets.IterableDatasetDict.

    Args:
        name: a parquet or webdataset tar file, a pattern such as "data/*.tar", a folder of such files or of images
            (one subfolder per class, if they have labels), or a name on the Hub. Or files by the names of splits.
        config_name: configuration of a dataset on the Hub.
        streaming: True reads images only when they are used, and keeps nothing on the disk.

    Raises:
        DataError: there is no such dataset, or it cannot be read.
        MissingExtraError: datasets or pillow is not installed.
    """
    datasets = require("datasets", extra="datasets", purpose="Reading images")
    require("PIL", extra="datasets", purpose="Reading images")
    files = dict(name) if isinstance(name, Mapping) else {"train": files_of(name)}
    try:
        if not isinstance(name, Mapping) and Path(name).is_dir() and files["train"]:
            return datasets.load_dataset(name, streaming=streaming)  # which finds the splits by the names of the files
        if any(files.values()):
            builder = BUILDERS[Path(next(path for paths in files.values() for path in paths)).suffix]
            return datasets.load_dataset(builder, data_files=files, streaming=streaming)
        if Path(str(name)).is_dir():
            return datasets.load_dataset("imagefolder", data_dir=name, streaming=streaming)
        return datasets.load_dataset(name, config_name, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"Cannot read the dataset {name}: {cause} Expected a dataset on the Hub, a folder of images, or parquet "
            "or tar files."
        ) from error


def files_of(name: str) -> list[str]:
    """Returns the parquet or tar files that a name, a pattern or a folder stands for; none for other datasets."""
    if Path(name).suffix in BUILDERS and not has_magic(name):
        return [name]
    found = (
        sorted(glob(name) if has_magic(name) else map(str, Path(name).glob("*"))) if not Path(name).is_file() else []
    )
    return next((some for end in BUILDERS if (some := [path for path in found if path.endswith(end)])), [])


def columns_of(dataset: Any) -> tuple[str, ...]:
    """Returns the names of the columns. Of a stream without known columns, the first item is read."""
    known = dataset.column_names
    return tuple(next(iter(dataset), {})) if known is None else tuple(known)


def choose_split(splits: Any, split: str, name: str) -> Any:
    """Returns one split of the dataset `name`. Raises DataError if it has no such split."""
    if split not in splits:
        raise DataError(f"The dataset {name} has no split {split!r}. It has: {', '.join(map(repr, splits))}.")
    return splits[split]


def label_names(dataset: Any, label_column: str = "label") -> list[str] | None:
    """Returns the names of the labels of a dataset; None if it has no column of named labels."""
    return getattr((dataset.features or {}).get(label_column), "names", None)


def with_pixel_values(
    dataset: Any, processor: Any, *, name: str, image_column: str = "image", label_column: str = "label"
) -> Any:
    """Returns the dataset with `pixel_values`, which `processor` makes of its images, and with its labels, if any.

    Raises:
        DataError: the dataset `name` has no such column of images.
    """
    columns = columns_of(dataset)
    if image_column not in columns:
        raise DataError(
            f"The dataset {name} has no column {image_column!r}. It has: {', '.join(map(repr, columns))}. "
            "Name the column of the images."
        )

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[image_column]]
        processed = dict(processor(images=images, return_tensors="pt"))
        if label_column in batch:
            processed["labels"] = batch[label_column]
        return processed

    if hasattr(dataset, "with_transform"):
        return dataset.with_transform(transform)
    return dataset.map(transform, batched=True, batch_size=32, remove_columns=list(columns))
