"""Memory of a process that trains on, and measures on, a stream of a few and of very many images.

    python examples/benchmarks/streaming.py                         about half an hour
    python examples/benchmarks/streaming.py --images 2000 20000     about a minute

The images are small, and few of them differ, but all are read, decoded and transformed. Each row is a process of its
own, whose largest resident memory is measured. The stream is that of `train.py --streaming`.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Image as Encoded
from harness import report
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, HfArgumentParser

from plasticity_peft import measure_plasticity
from plasticity_peft.images.datasets import load_image_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from streaming import for_measuring, for_training
from train import DEMO_MODEL, DataArguments, FinetuningArguments, ModelArguments, Transform, load_processor

TITLE = "Peak memory of one process on a stream"
FILES = 20
COLUMNS = {"work": "work", "images": "images", "seconds": "s", "memory": "peak memory, MiB"}


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    images: list[int] = field(
        default_factory=lambda: [10_000, 1_000_000], metadata={"help": "Numbers of images of the streams."}
    )
    work: str | None = field(default=None, metadata={"help": "Do this on --folder: read or measure."})
    folder: str | None = field(default=None, metadata={"help": "Folder of the files, for --work."})
    output: str = field(default="outputs/benchmarks/streaming.json", metadata={"help": "JSON file to write."})


def write(folder: Path, images: int) -> None:
    """Writes parquet files with so many images in all, of which a thousand differ."""
    generator, pictures = np.random.default_rng(0), []
    for _ in range(1000):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "png")
        pictures.append(buffer.getvalue())
    for number in range(FILES):
        rows = [{"bytes": pictures[n % 1000], "path": None} for n in range(number, images, FILES)]
        labels = [n % 10 for n in range(number, images, FILES)]
        table = pa.table({"image": pa.array(rows), "label": pa.array(labels)})
        parquet.write_table(table, folder / f"{number:03d}.parquet", row_group_size=1000)


def work(kind: str, folder: str, images: int) -> dict[str, Any]:
    """Reads all images of a stream once as training does, or measures on it, and returns what that took."""
    data, model = DataArguments(dataset_name=folder), ModelArguments()
    transform = Transform(load_processor(model), data, augment=kind == "read")
    stream = load_image_dataset(folder, streaming=True)["train"].cast_column("image", Encoded())
    start = time.perf_counter()
    if kind == "read":
        arguments = FinetuningArguments(output_dir=f"{folder}/out", use_cpu=True)
        endless, read = for_training(stream, transform, arguments, data.shuffle_buffer), 0
        for batch in DataLoader(endless, batch_size=100):
            read += len(batch["labels"])
            if read >= images:
                break
    else:
        target = for_measuring(stream, transform, 0, data.shuffle_buffer, most=2048)
        measure_plasticity(AutoModelForImageClassification.from_pretrained(DEMO_MODEL), target, settle=None)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"work": kind, "images": images, "seconds": time.perf_counter() - start, "memory": memory}


def main() -> None:
    """Does each work in a process of its own, and prints and writes the table."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    if arguments.work is not None:
        report(TITLE, COLUMNS, [work(arguments.work, arguments.folder, arguments.images[0])], arguments)
        return
    rows = []
    for images in arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), images)
            for kind in ("read", "measure"):
                options = ["--images", str(images), "--work", kind, "--folder", folder]
                path = Path(folder, "row.json")
                subprocess.run([sys.executable, __file__, *options, "--output", str(path)], check=True)
                rows += json.loads(path.read_text())["rows"]
    report(TITLE, COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
