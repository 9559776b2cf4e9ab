"""What processes exchange, and how long that takes: 2 to 16 processes of this machine, and by formula 1,024 GPUs.

    python examples/benchmarks/scale.py                              five minutes on two cores
    python examples/benchmarks/scale.py --processes 2 4 --rounds 1   about a minute

Processes with gloo measure a tiny model, fit its head and forecast. Each collective operation is counted, and timed
from the moment at which all processes have come to it, so that the work between is left out. The bytes are those that
a ring moves: a process receives what the n - 1 others give (all-gather), or 2 (n - 1) / n times what is added up
(all-reduce). Formulas for bytes and for times are fitted to these numbers by least squares, and applied to larger
models and to many GPUs, whose network is an assumption: `--network`, `--latency` and `--bandwidth`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import as_markdown, write_sections
from scipy.optimize import nnls
from torch import distributed
from torch.distributed import distributed_c10d
from torch.multiprocessing import start_processes
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

from plasticity_peft import fit_head, forecast_finetuning, measure_plasticity
from plasticity_peft.components.component import KINDS
from plasticity_peft.images.pairs import draw_pairs
from plasticity_peft.measuring.forecast import DIRECTIONS
from plasticity_peft.measuring.tangents import WIDTH

Row = dict[str, Any]
DOUBLE, SINGLE = 8, 4
MEGABYTE = 1e6
ENVELOPES = {"start of measuring": 40, "look, images": 95, "look, pairs": 95, "fitted head": 40, "forecast": 400}
"""About how many bytes an object has beside its numbers: the fitted ones."""
SCALARS = 55
"""About how many more numbers are added up to fit a head: errors of 28 penalties, and of one temperature at a time."""


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    processes: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Numbers of processes."})
    rounds: int = field(default=3, metadata={"help": "Number of timed rounds, of which the median counts."})
    gpus: int = field(default=1024, metadata={"help": "Number of GPUs to say something about."})
    network: str = field(
        default="InfiniBand at 200 Gb/s per GPU", metadata={"help": "Name of the network between them."}
    )
    latency: float = field(default=10.0, metadata={"help": "Microseconds of a step between two GPUs."})
    bandwidth: float = field(default=20.0, metadata={"help": "Gigabytes a second that a GPU receives."})
    unpacking: float = field(
        default=100.0, metadata={"help": "Microseconds to copy one process's object to the CPU and to unpickle it."}
    )
    output: str = field(default="outputs/benchmarks/scale.json", metadata={"help": "JSON file to write."})


@dataclass(frozen=True)
class Work:
    """Something that processes do together."""

    name: str
    call: Callable[[torch.nn.Module, Sequence[Row]], object]
    """Called with a model and labeled images."""
    phase: str
    """Name of the function of the package to whose exchanges the numbers belong."""
    images: int
    """Number of labeled images."""
    width: int = 16
    blocks: int = 2
    classes: int = 10
    pairs: bool = False

    @property
    def columns(self) -> int:
        """The components and the kinds."""
        return len(KINDS) * (self.blocks + 1)

    @property
    def groups(self) -> int:
        """Number of different images in pairs; 0 if no image is in several samples."""
        if not self.pairs:
            return 0
        return len(np.unique(draw_pairs(self.images, target=self.images, source=None, seed=0)))


def measured(model: torch.nn.Module, images: Sequence[Row], criterion: str) -> None:
    """Measures with a single look: on 32 samples at most."""
    measure_plasticity(model, images, criterion=criterion, max_samples=len(images), settle=None, batch_size=4)


def works() -> list[Work]:
    """Returns all that is counted."""
    gradients = partial(measured, criterion="parameter_plasticity")
    pairs = partial(measured, criterion="rate_of_change")
    forecast = partial(forecast_finetuning, max_samples=1024, batch_size=8, pilot=False)
    return [
        Work("start of measuring", gradients, "images", 16),
        *(Work("look, images", gradients, "observe_until_settled", n, blocks=b) for n, b in ((16, 2), (32, 6))),
        *(Work("look, pairs", pairs, "observe_until_settled", n, blocks=b, pairs=True) for n, b in ((16, 2), (32, 6))),
        *(Work("fitted head", fit_head, "fitted_head", 32, width, classes=classes)
          for width, classes in ((16, 10), (64, 100), (128, 1000))),
        *(Work("forecast", forecast, "forecast_finetuning", count, blocks=blocks)
          for count, blocks in ((32, 2), (64, 4))),
    ]  # fmt: skip


def bytes_added(work: Work) -> int:
    """Returns how many bytes of sums the processes add up, by the formula."""
    k, d, outputs = work.columns, work.width, work.classes
    if work.name.startswith("look"):
        return DOUBLE * (k + 1 + 2 * k * k + work.groups * k + 2)
    if work.name == "fitted head":
        return DOUBLE * (d + outputs + 1 + d * d + d * outputs + SCALARS)
    return 0


def bytes_gathered(work: Work) -> int:
    """Returns how many bytes of single samples all processes together give to each other, by the formula."""
    if work.name == "look, pairs":
        return 2 * DOUBLE * work.images
    if work.name == "forecast":
        return work.images * (DOUBLE + SINGLE * (work.width + work.classes) + SINGLE * numbers_of_sketches(work))
    return 0


def numbers_of_sketches(work: Work) -> int:
    """Returns how many numbers the sketches of one image have."""
    norm, square, wide = 2 * work.width, (work.width, work.width), (work.width, 4 * work.width)
    linear = [min(out, WIDTH) * min(into + 1, WIDTH) for into, out in (*[square] * 4, wide, wide[::-1])]
    return DIRECTIONS * work.blocks * (2 * min(norm, WIDTH**2) + sum(linear))


OTHERS = (
    "all_gather_into_tensor", "all_to_all", "all_to_all_single", "broadcast", "gather", "irecv", "isend", "recv",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
"""Operations that the package does not use. They are refused, so that none remains uncounted."""


@dataclass
class Counter:
    """Counts and times collective operations of this process while it is active."""

    found: list[Row] = field(default_factory=list)

    def __enter__(self) -> Counter:
        self._kept = {name: getattr(distributed_c10d, name) for name in ("all_gather", "all_reduce", *OTHERS)}
        for name, kept in self._kept.items():
            self._set(name, partial(self._counted, name, kept))
        return self

    def __exit__(self, *_: object) -> None:
        for name, kept in self._kept.items():
            self._set(name, kept)

    def _set(self, name: str, function: Callable[..., Any]) -> None:
        for module in (distributed, distributed_c10d):
            setattr(module, name, function)

    def _counted(self, name: str, kept: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if name in OTHERS:
            raise RuntimeError(f"{name} is not counted.")
        tensor = arguments[1] if name == "all_gather" else arguments[0]
        distributed.barrier()
        start = time.perf_counter()
        result = kept(*arguments, **options)
        seconds = time.perf_counter() - start
        given = tensor.numel() * tensor.element_size()
        self.found.append({"operation": name, "phase": phase(), "given": given, "seconds": seconds})
        return result


def phase() -> str | None:
    """Returns the innermost function of `works` that is being executed."""
    known = {work.phase for work in works()}
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if Path(code.co_filename).parent.name == "measuring" and code.co_name in known:
            return str(code.co_name)
        frame = frame.f_back
    return None


def moved(operation: str, given: float, processes: int) -> float:
    """Returns how many bytes a process receives, and sends, in a ring."""
    return given * (processes - 1) * (1 if operation == "all_gather" else 2 / processes)


def run(rank: int, processes: int, folder: str, rounds: int) -> None:
    """Does all works in one of the processes. The first process writes what it counted."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(number) for name, number in numbers.items()}, ACCELERATE_USE_CPU="1")
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = [done(work, rounds) for work in works()]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def done(work: Work, rounds: int) -> list[list[Row]]:
    """Returns the operations of a work in each round, after one that warms up."""
    model, images, found = model_of(work), images_of(work), []
    for _ in range(rounds + 1):
        with Counter() as counter:
            work.call(model, images)
        found.append([row for row in counter.found if row.pop("phase") == work.phase])
    return found[1:]


def model_of(work: Work) -> torch.nn.Module:
    """Returns a tiny model, the same in each process."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=work.width, num_hidden_layers=work.blocks, num_attention_heads=2, num_labels=work.classes,
        intermediate_size=4 * work.width, image_size=8, patch_size=4,
    )  # fmt: skip
    return ViTForImageClassification(config)


def images_of(work: Work) -> list[Row]:
    """Returns labeled images, the same in each process."""
    pixels = torch.randn(work.images, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": number % work.classes} for number, image in enumerate(pixels)]


def counted(arguments: BenchmarkArguments) -> dict[int, list[list[list[Row]]]]:
    """Returns the operations by the number of processes: of each work, in each round."""
    found = {}
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(run, (processes, folder, arguments.rounds), nprocs=processes, start_method="fork")
            found[processes] = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
    return found


def exchanged(found: Mapping[int, list[list[list[Row]]]]) -> list[Row]:
    """Returns what each work exchanged, and how long the operations took."""
    rows = []
    for number, work in enumerate(works()):
        for processes, of_works in found.items():
            first = of_works[number][0]
            received = sum(moved(row["operation"], row["given"], processes) for row in first)
            times = [sum(row["seconds"] for row in operations) for operations in of_works[number]]
            rows.append(
                {
                    "work": work.name,
                    "columns": work.columns,
                    "features x classes": f"{work.width} x {work.classes}",
                    "samples": work.images,
                    "processes": processes,
                    "all-gathers": sum(row["operation"] == "all_gather" for row in first),
                    "all-reduces": sum(row["operation"] == "all_reduce" for row in first),
                    "bytes received": round(received),
                    "by formula": round(formula(work, processes, objects_of(first))),
                    "ms": 1000 * statistics.median(times),
                }
            )
    return rows


def objects_of(operations: Sequence[Row]) -> int:
    """Returns how many times objects were gathered: their sizes, and then the objects."""
    return sum(row["operation"] == "all_gather" for row in operations) // 2


def parts(work: Work, processes: int, objects: int) -> list[float]:
    """Returns the terms of the formula for the bytes that a process receives."""
    others = processes - 1
    return [
        moved("all_reduce", bytes_added(work), processes),
        # Messages are as long as the longest one.
        bytes_gathered(work) / work.images * math.ceil(work.images / processes) * others,
        float(objects * others),
    ]


def formula(work: Work, processes: int, objects: int) -> float:
    """Returns the bytes that a process receives."""
    return float(np.dot(parts(work, processes, objects), (1, 1, ENVELOPES[work.name])))


def fitted_bytes(found: Mapping[int, list[list[list[Row]]]]) -> list[Row]:
    """Returns the factors of the terms that fit the counted bytes best."""
    rows = []
    for name in dict.fromkeys(work.name for work in works()):
        terms, received = [], []
        for number, work in enumerate(works()):
            for processes, of_works in found.items():
                if work.name == name:
                    first = of_works[number][0]
                    terms.append(parts(work, processes, objects_of(first)))
                    received.append(sum(moved(row["operation"], row["given"], processes) for row in first))
        factors, r2, largest = least_squares(np.array(terms), np.array(received))
        labels = ("x sums added", "x samples gathered", "bytes an object and process")
        rows.append({"work": name, **dict(zip(labels, factors, strict=True)), "R2": r2, "largest error": largest})
    return rows


def least_squares(terms: np.ndarray, values: np.ndarray) -> tuple[list[float | None], float, float]:
    """Returns the factors of the terms, R2 of the logarithms, and the largest relative error.

    No factor is negative, and the squares of relative errors are minimized, as values differ by orders of magnitude.
    """
    used = terms.any(axis=0)
    factors = iter(nnls(terms[:, used] / values[:, None], np.ones(len(values)))[0].tolist())
    found = [next(factors) if each else None for each in used]
    ratios = terms @ [factor or 0.0 for factor in found] / values
    return found, float(1 - (np.log(ratios) ** 2).mean() / np.log(values).var()), float(np.abs(ratios - 1).max())


STEPS: dict[str, Callable[[int], float]] = {
    "log2 n": lambda processes: math.log2(processes),
    "n - 1": lambda processes: processes - 1,
    "n (n - 1)": lambda processes: processes * (processes - 1),
}
"""What the latency of an operation may be proportional to; the last one if processes share the same few cores."""


def fitted_times(found: Mapping[int, list[list[list[Row]]]]) -> list[Row]:
    """Returns how well formulas for the time of an operation fit: a start, steps, and the bytes of all processes."""
    rows = []
    for operation in ("all_gather", "all_reduce"):
        points: dict[tuple[int, int], list[float]] = {}
        for processes, of_works in found.items():
            for row in (row for rounds in of_works for operations in rounds for row in operations):
                if row["operation"] == operation:
                    points.setdefault((processes, row["given"]), []).append(row["seconds"])
        times = np.array([statistics.median(each) for each in points.values()])
        for name, steps in STEPS.items():
            terms = [[1.0, steps(n), n * moved(operation, given, n)] for n, given in points]
            (start, latency, inverse), r2, _ = least_squares(np.array(terms), times)
            fit = np.array(terms) @ np.array([start or 0.0, latency or 0.0, inverse or 0.0])
            rows.append(
                {
                    "operation": operation,
                    "steps": name,
                    "start, us": 1e6 * (start or 0.0),
                    "a step, us": 1e6 * (latency or 0.0),
                    "all together, MB/s": 1 / (inverse or math.nan) / MEGABYTE,
                    "points": len(points),
                    "R2": r2,
                    "median error": float(np.median(np.abs(fit / times - 1))),
                }
            )
    return rows


LARGE = {
    "ViT-B": {"width": 768, "blocks": 12},
    "ViT-L": {"width": 1024, "blocks": 24},
    "ViT-g": {"width": 1536, "blocks": 40},
}
"""ViT-g is that of DINOv2."""


def on_gpus(arguments: BenchmarkArguments, found: Mapping[int, list[list[list[Row]]]]) -> list[Row]:
    """Returns what the formulas say of many GPUs, for 1,000 classes and 1,024 samples."""
    rows = []
    few, many = 8, arguments.gpus
    operations = {work.name: of_work[0] for work, of_work in zip(works(), next(iter(found.values())), strict=True)}
    for size, shape in LARGE.items():
        for work in large_works(**shape):
            objects = objects_of(operations[work.name])
            if work.name == "forecast":  # that of the small model gathered one for each of its blocks
                objects += work.blocks - next(each.blocks for each in works()[::-1] if each.name == "forecast")
            reduces = sum(row["operation"] == "all_reduce" for row in operations[work.name])
            fast, slow = (seconds(arguments, work, objects, reduces, steps) for steps in (math.log2(many), many - 1.0))
            rows.append(
                {
                    "model": size,
                    "work": work.name,
                    f"MB received, {few} GPUs": formula(work, few, objects) / MEGABYTE,
                    f"{many:,} GPUs": formula(work, many, objects) / MEGABYTE,
                    "if sums were gathered": bytes_added(work) * (many - 1) / MEGABYTE or None,
                    "s, log2 n steps": fast,
                    "s, n - 1 steps": slow,
                }
            )
    return rows


def large_works(width: int, blocks: int) -> list[Work]:
    """Returns the works of a large model. The last look of 1,024 samples is at 512."""
    shape: Row = {"width": width, "blocks": blocks, "classes": 1000}
    kinds = {work.name: work for work in works()}
    return [
        Work(
            name, kinds[name].call, kinds[name].phase, 512 if "look" in name else 1024, pairs="pairs" in name, **shape
        )
        for name in kinds
    ]


def seconds(arguments: BenchmarkArguments, work: Work, objects: int, reduces: int, steps: float) -> float:
    """Returns how long a work exchanges on many GPUs, if an operation takes so many steps, and an all-reduce twice."""
    waiting = 1e-6 * arguments.latency * steps * (2 * objects + 2 * reduces)
    unpacking = 1e-6 * arguments.unpacking * objects * arguments.gpus
    return waiting + unpacking + formula(work, arguments.gpus, objects) / (1e9 * arguments.bandwidth)


def main() -> None:
    """Counts, fits, and writes the tables."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    found = counted(arguments)
    network = f"{arguments.network}: {arguments.latency:g} us a step, {arguments.bandwidth:g} GB/s"
    sections = {
        "exchanged": exchanged(found),
        "bytes": fitted_bytes(found),
        "times": fitted_times(found),
        "gpus": on_gpus(arguments, found),
    }
    titles = {
        "exchanged": "What each process receives, and how long the operations take",
        "bytes": "Factors of the formula for the bytes",
        "times": "Formulas for the time of an operation on this machine",
        "gpus": f"By formula on {arguments.gpus:,} GPUs, 1,000 classes, 1,024 samples ({network})",
    }
    machine = {"torch": torch.__version__, "cpus": os.cpu_count()}
    for name, rows in sections.items():
        print(as_markdown(titles[name], rows), end="\n\n")
    where = f"{machine['cpus']} CPU cores, gloo, torch {machine['torch']}"
    write_sections(
        Path(arguments.output), where, {"machine": machine, "arguments": asdict(arguments)}, sections, titles
    )


if __name__ == "__main__":
    main()
