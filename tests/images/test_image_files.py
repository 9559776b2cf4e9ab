"""Folders of parquet files: the splits are those that the names of the files say."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from plasticity_peft.images.datasets import load_image_dataset
from tests.support.models import REPOSITORY

IMAGES = REPOSITORY / "examples" / "data" / "fashion_mnist.parquet"


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_folder_are_not_mixed_over_its_splits(streaming: bool, tmp_path: Path) -> None:
    table = parquet.read_table(IMAGES)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, start, count in (("train-0", 0, 5), ("train-1", 5, 4), ("test", 9, 3)):
        parquet.write_table(table.slice(start, count), folder / f"{name}.parquet")
    found = load_image_dataset(str(folder), streaming=streaming)
    assert {split: [row["label"] for row in rows] for split, rows in found.items()} == {
        "train": table["label"].to_pylist()[:9],
        "test": table["label"].to_pylist()[9:12],
    }
