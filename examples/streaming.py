"""Images that do not fit on the disk: train.py --streaming reads them from files or the Hub as it needs them.

The training images are shuffled through a buffer, and spread over the processes by whole files if their number allows.
The images for validation and testing are kept in memory, up to a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import TrainingArguments

from plasticity_peft.errors import DataError
from plasticity_peft.images.datasets import choose_split, columns_of, files_of, load_image_dataset

HELD_OUT = ("validation", "test")


def stream_splits(
    name: str,
    config_name: str | None,
    columns: tuple[str, str],
    num_labels: int | None,
    most_held: int,
) -> tuple[dict[str, Any], ClassLabel]:
    """Returns the training images as a stream, those for validation and testing in memory, and the labels.

    Without splits for validation and testing, these are the last two files.

    Args:
        name: as in `load_image_dataset`.
        config_name: as in `load_image_dataset`.
        columns: the columns of the images and of the labels.
        num_labels: number of labels, if their column has no names.
        most_held: largest number of images that are kept in memory for each split.

    Raises:
        DataError: there is no split for training, only one of the other two, there are fewer than three files, or the
            labels have no names.
    """
    splits = load_image_dataset(name, config_name, streaming=True)
    train = choose_split(splits, "train", name)
    labels = _labels(train, name, columns[1], num_labels)
    if not set(HELD_OUT) <= set(splits):
        if set(splits) != {"train"}:
            raise DataError(
                f"The stream {name} has the splits {', '.join(map(repr, splits))}. Give one with the splits 'train', "
                "'validation' and 'test', or with 'train' alone, whose last two files are then held out."
            )
        splits = _by_files(name)
    held = {part: _in_memory(splits[part], name, columns, labels, most_held) for part in HELD_OUT}
    return {"train": splits["train"], **held}, labels


def _labels(train: IterableDataset, name: str, column: str, count: int | None) -> ClassLabel:
    found = (train.features or {}).get(column)
    if isinstance(found, ClassLabel):
        return found
    if column not in columns_of(train):
        raise DataError(f"The dataset {name} has no column {column!r}. It has: {', '.join(columns_of(train))}.")
    if count is None:
        raise DataError(f"The labels in {column!r} of the stream {name} have no names. Give --num_labels.")
    return ClassLabel(num_classes=count)


def _by_files(name: str) -> Any:
    """Returns the splits of files, of which the last two are for validation and testing."""
    files = files_of(name)
    if len(files) < 3:
        raise DataError(
            f"The stream {name} has no validation and test splits, and {len(files)} files. Give a dataset with these "
            "splits, or at least three parquet or tar files, of which two are not trained on."
        )
    return load_image_dataset({"train": files[:-2], "validation": files[-2:-1], "test": files[-1:]}, streaming=True)


def _in_memory(stream: IterableDataset, name: str, columns: tuple[str, str], labels: ClassLabel, most: int) -> Dataset:
    rows = [{column: row[column] for column in columns} for row in stream.take(most)]
    features = Features({columns[0]: Image(), columns[1]: labels})
    info = DatasetInfo(features=features, dataset_name=name.rstrip("/").rpartition("/")[2])
    return Dataset.from_list(rows, features=features, info=info)


def for_training(
    stream: IterableDataset,
    transform: Callable[[dict[str, list]], dict[str, list]],
    arguments: TrainingArguments,
    buffer: int,
) -> IterableDataset:
    """Returns the part of a stream for this process: shuffled through a buffer, augmented, and without an end."""
    shuffled = stream.shuffle(seed=arguments.seed, buffer_size=buffer)
    own = split_dataset_by_node(shuffled, rank=arguments.process_index, world_size=arguments.world_size)
    return _transformed(own.repeat(None), transform)


def for_measuring(
    stream: IterableDataset,
    transform: Callable[[dict[str, list]], dict[str, list]],
    seed: int,
    buffer: int,
    most: int,
) -> IterableDataset:
    """Returns up to `most` images of a shuffled stream, the same in all processes, which share them themselves."""
    return _transformed(stream.shuffle(seed=seed, buffer_size=buffer).take(most), transform)


def _transformed(stream: IterableDataset, transform: Callable[[dict[str, list]], dict[str, list]]) -> IterableDataset:
    return stream.map(transform, batched=True, batch_size=32, remove_columns=list(columns_of(stream)))
