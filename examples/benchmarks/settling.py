"""How many pairs it takes to settle a selection, and whether it agrees with the authors' 12,800 pairs.

    python examples/benchmarks/settling.py                           the model of the demo python
    examples/benchmarks/settling.py --models path/to/dinov2   other models, in the same form

A pair is one image of Fashion-MNIST and one of scikit-learn's digits, as in the demo. For a criterion that looks at
single images, the number of samples is limited by the number of digits.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import MEASURES, report
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

from plasticity_peft import measure_plasticity

sys.path.insert(0, str(Path(__file__).parents[1]))
from train import DEMO_MODEL, DEMO_SOURCE, DataArguments, Transform, load_images

COLUMNS = {
    "model": "model",
    "measure": "measure",
    "top_k": "top_k",
    "settled": "settled",
    "pairs": "after",
    "most": "of",
    "seconds": "seconds",
    "units": "chosen",
    "same": "as all",
}


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    models: list[str] = field(default_factory=lambda: [str(DEMO_MODEL)], metadata={"help": "Folders or Hub names."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels (default: as in the model's config)."})
    pairs: int = field(default=12_800, metadata={"help": "Largest number of pairs: the authors' number."})
    batch_size: int = field(default=64, metadata={"help": "Pairs per pass."})
    top_k: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "How many of five kinds to select."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/benchmarks/settling.json", metadata={"help": "JSON file to write."})


def images_for(model: str, image_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the digits and the source images for the model: float32 (images, channels, height, width)."""
    size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    try:
        processor = AutoImageProcessor.from_pretrained(model, **size)
    except OSError:  # a checkpoint without one
        processor = AutoImageProcessor.from_pretrained(DEMO_MODEL, **size)
    transform = Transform(processor, DataArguments(), augment=False)
    digits, source = (load_images(name)["train"] for name in (None, str(DEMO_SOURCE)))
    return transform(digits[:])["pixel_values"], transform(source[:])["pixel_values"]


def rows_of(name: str, arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """Returns the results for a model: one row per measure and selection."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(name, num_labels=10, dtype=torch.float32)
    digits, source = images_for(name, arguments.image_size)
    options = {"max_samples": arguments.pairs, "batch_size": arguments.batch_size}
    rows = []
    for measure, which in MEASURES.items():
        everything = measure_plasticity(model, digits, source, settle=None, **options, **which)
        for top_k in arguments.top_k:
            start = time.perf_counter()
            found = measure_plasticity(model, digits, source, top_k=top_k, **options, **which)
            seconds = time.perf_counter() - start
            best = {row.unit for row in everything.ranking()[:top_k]}
            rows.append(
                {
                    "model": Path(name).name,
                    "measure": measure,
                    "top_k": top_k,
                    "settled": "yes" if found.ending.settled else "no",
                    "pairs": found.samples,
                    "most": everything.samples,
                    "seconds": seconds,
                    "units": " ".join(found.ending.units),
                    "same": "yes" if set(found.ending.units) == best else "no",
                }
            )
    return rows


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.num_threads)
    rows = [row for name in arguments.models for row in rows_of(name, arguments)]
    report("Observations until a choice is settled at 95 % confidence", COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
