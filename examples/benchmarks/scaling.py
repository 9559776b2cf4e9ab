"""The speed-up by a second process: the same pairs on 1 and on 2 processes, with one thread each.

    python examples/benchmarks/scaling.py        ViT-S at 224 px, about twenty minutes on two cores

`accelerate launch` starts the processes, in turns. The whole of `measure_plasticity` is timed between two barriers,
without the start of Python.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from harness import MEASURES, SIZES, report, vit_config
from transformers import HfArgumentParser, ViTForImageClassification

from plasticity_peft import measure_plasticity

COLUMNS = {"measure": "measure", "one": "1 process, s", "two": "2 processes, s", "speed_up": "times as fast"}


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    size: str = field(default="ViT-S", metadata={"help": "ViT-S, ViT-B or ViT-L.", "choices": list(SIZES)})
    image_size: int = field(default=224, metadata={"help": "Pixels; patches are 16 wide."})
    pairs: int = field(default=384, metadata={"help": "Total number of pairs or images."})
    measures: list[str] = field(default_factory=lambda: list(MEASURES), metadata={"help": "What is measured."})
    batch_size: int = field(default=8, metadata={"help": "Pairs per pass."})
    rounds: int = field(default=3, metadata={"help": "Number of timed rounds."})
    output: str = field(default="outputs/benchmarks/scaling.json", metadata={"help": "JSON file to write."})
    worker: str | None = field(default=None, metadata={"help": "Where a started process writes; not for hand use."})


def work(arguments: BenchmarkArguments) -> None:
    """Times each measure in this process, together with the other processes of the launcher."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(arguments.size, arguments.image_size)).eval()
    images = torch.randn(2 * arguments.pairs, 3, arguments.image_size, arguments.image_size)
    options: dict[str, Any] = {"batch_size": arguments.batch_size, "settle": None}
    seconds = {}
    for measure in arguments.measures:
        which = MEASURES[measure]
        measure_plasticity(model, images[:8], max_samples=4, **options, **which)  # warms up
        state.wait_for_everyone()
        start = time.perf_counter()
        measure_plasticity(model, images, max_samples=arguments.pairs, **options, **which)
        state.wait_for_everyone()
        seconds[measure] = time.perf_counter() - start
    if state.is_main_process:
        found = {"processes": state.num_processes, "seconds": seconds}
        Path(str(arguments.worker)).write_text(json.dumps(found), encoding="utf-8")
    state.destroy_process_group()


def launch(arguments: BenchmarkArguments, processes: int) -> dict[str, float]:
    """Returns the seconds of each measure on a number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seconds.json")
        own = {key: value for key, value in asdict(arguments).items() if key != "worker"}
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1,
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0,
            *(["--multi_gpu"] if processes > 1 else []), __file__, "--worker", path,
            *(part for key, value in own.items() for part in (f"--{key}", *(value if key == "measures" else [value]))),
        ]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([str(part) for part in command], env=environment, check=True)
        found = json.loads(path.read_text(encoding="utf-8"))
    if found["processes"] != processes:
        raise RuntimeError(f"The launcher started {found['processes']} processes instead of {processes}.")
    seconds: dict[str, float] = found["seconds"]
    return seconds


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    if arguments.worker:
        work(arguments)
        return
    runs = [[launch(arguments, processes) for processes in (1, 2)] for _ in range(arguments.rounds)]
    rows = []
    for measure in arguments.measures:
        one, two = (statistics.median(run[number][measure] for run in runs) for number in (0, 1))
        rows.append({"measure": measure, "one": one, "two": two, "speed_up": one / two})
    title = f"{arguments.size}, {arguments.image_size} px: {arguments.pairs} pairs (images for the first), "
    report(f"{title}one thread a process", COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
