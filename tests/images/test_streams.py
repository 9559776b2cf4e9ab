"""Streams by name: parquet and webdataset tar files, read as they are used."""

from __future__ import annotations

import importlib
import io
import tarfile
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from plasticity_peft import measure_plasticity
from plasticity_peft.errors import DataError
from plasticity_peft.images.datasets import columns_of, files_of, load_image_dataset, with_pixel_values
from tests.support.models import REPOSITORY, tiny_model

FILES, EACH = 4, 10


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it has read parquet files, datasets sleeps for seconds."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the same images in parquet and in tar files. The brightness of an image is its number."""
    folder = tmp_path_factory.mktemp("streams")
    for form in ("parquet", "tar"):
        (folder / form).mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    for number in range(FILES):
        images = [picture(number * EACH + n) for n in range(EACH)]
        labels = [n % 3 for n in range(EACH)]
        table = Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(folder / "parquet" / f"{number}.parquet")
        with tarfile.open(folder / "tar" / f"{number}.tar", "w") as file:
            for n, (image, label) in enumerate(zip(images, labels, strict=True)):
                content = io.BytesIO()
                image.save(content, "png")
                for end, data in (("png", content.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number}-{n}.{end}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    return folder


def picture(number: int) -> PILImage.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels[0, 0] = number
    return PILImage.fromarray(pixels)


NAMES = {"parquet": ("image", "label"), "tar": ("png", "cls")}


def test_streams_of_both_forms_have_one_report(folder: Path) -> None:
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    reports = []
    for form, names in NAMES.items():
        stream = load_image_dataset(str(folder / form), streaming=True)["train"]
        assert set(names) <= set(columns_of(stream))
        images = with_pixel_values(stream, processor, name=form, image_column=names[0], label_column=names[1])
        reports.append(measure_plasticity(tiny_model(), images, settle=None))
    whole = with_pixel_values(load_image_dataset(str(folder / "parquet"))["train"], processor, name="whole")
    reports.append(measure_plasticity(tiny_model(), whole, settle=None))
    assert [report.samples for report in reports] == [FILES * EACH] * 3
    for one, other, expected in zip(*(report.scores for report in reports), strict=True):
        assert one.mean == pytest.approx(other.mean, rel=1e-6)
        assert one.mean == pytest.approx(expected.mean, abs=4 * expected.standard_error)


def test_names_of_files(folder: Path) -> None:
    assert files_of(str(folder / "tar" / "0.tar")) == [str(folder / "tar" / "0.tar")]
    pattern = files_of(str(folder / "parquet" / "[01].parquet"))
    assert pattern == [str(folder / "parquet" / f"{n}.parquet") for n in (0, 1)]
    assert files_of(str(folder / "tar")) == files_of(str(folder / "tar" / "*.tar"))
    assert files_of("user/dataset") == files_of(str(folder)) == []
    with pytest.raises(DataError, match=r"Cannot read the dataset .*missing"):
        load_image_dataset(str(folder / "missing.tar"), streaming=True)


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    return importlib.import_module("streaming")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_train_on_different_images_and_hold_none_out(processes: int, folder: Path, streaming: Any) -> None:
    """With 2 files for training: 2 processes read a file each, and 3 read both and use every third image."""
    name = str(folder / "parquet")
    splits, labels = streaming.stream_splits(name, None, ("image", "label"), None, 1000)
    assert labels.names == ["a", "b", "c"]
    held = {number_of(row["image"]) for part in ("validation", "test") for row in splits[part]}
    assert held == set(range(2 * EACH, FILES * EACH))
    count, seen = 2 * EACH // processes, []
    for rank in range(processes):
        arguments = SimpleNamespace(seed=0, process_index=rank, world_size=processes)
        own = streaming.for_training(splits["train"], numbered, arguments, buffer=5)
        numbers = [row["number"] for row in islice(own, count)]
        assert sorted(numbers) != numbers, "not shuffled"
        seen += numbers
    assert len(seen) == len(set(seen)) == count * processes
    assert set(seen) <= set(range(2 * EACH))


def number_of(image: PILImage.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def numbered(batch: dict[str, list]) -> dict[str, list]:
    return {"number": [number_of(image) for image in batch["image"]]}


def test_streams_that_cannot_be_split_are_refused(folder: Path, streaming: Any) -> None:
    with pytest.raises(DataError, match="no validation and test splits, and 1 files"):
        streaming.stream_splits(str(folder / "parquet" / "0.parquet"), None, ("image", "label"), None, 10)
    with pytest.raises(DataError, match=r"have no names\. Give --num_labels"):
        streaming.stream_splits(str(folder / "tar"), None, ("png", "cls"), None, 10)
    with pytest.raises(DataError, match="has no column 'label'"):
        streaming.stream_splits(str(folder / "tar"), None, ("png", "label"), None, 10)
