"""Python in processes of their own: one, or several that `accelerate launch` starts."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tests.support.forking import KNOWN
from tests.support.models import REPOSITORY

T = TypeVar("T")

STRICT = ("-W", "error", "-W", f"ignore:{KNOWN}:FutureWarning")
"""Options of Python by which every other warning is an error."""


def environment(**options: str) -> dict[str, str]:
    """Returns the environment of a process: one thread, and this package from wherever it is started."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **options}


def python(*arguments: object, timeout: float = 480, **options: Any) -> subprocess.CompletedProcess[str]:
    """Returns a process of this Python that has ended, and what it wrote; `options` are those of subprocess.run."""
    defaults = {"capture_output": True, "text": True, "check": False, "env": environment()}
    return subprocess.run([sys.executable, *map(str, arguments)], timeout=timeout, **{**defaults, **options})


def launch(
    *arguments: object, processes: int = 2, machines: int = 1, cwd: Path | None = None, **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """Starts a script, or `-m` and a module, by `accelerate launch`, and returns what each machine's launcher said.

    Args:
        arguments: of the launcher, after its options: the script, and the script's own.
        processes: how many in all.
        machines: how many launchers there are, each with its part of the processes.
        cwd: the folder in which they run.
        variables: of the environment.
    """
    port = 0 if machines == 1 else free_port()
    running = []
    for machine in range(machines):
        options = [
            "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", processes,
            "--num_machines", machines, "--machine_rank", machine, "--main_process_port", port,
        ]  # fmt: skip
        options += ["--main_process_ip", "127.0.0.1", "--rdzv_backend", "static"] if machines > 1 else []
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, *arguments]
        running.append(
            subprocess.Popen(
                [str(part) for part in command],
                env=environment(ACCELERATE_USE_CPU="1", **variables),
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=480) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(running, outputs, strict=True)
    ]


def in_threads(world_size: int, work: Callable[[int], T]) -> list[T]:
    """Returns what `work(rank)` returns in each of so many threads, which the package takes for launched processes.

    They may not depend on random numbers of the whole process, which they share. What one raises is raised here.
    """
    here, meeting, boxes = threading.local(), threading.Barrier(world_size, timeout=60), [None] * world_size

    class State:
        _shared_state: ClassVar = {"there": "is one"}

        def __init__(self, *_: object, **__: object) -> None:
            self.process_index, self.num_processes, self.device = here.rank, world_size, torch.device("cpu")

    def gather(values: list[Any]) -> list[Any]:
        boxes[here.rank] = values
        meeting.wait()
        found = [value for box in boxes for value in box]
        meeting.wait()  # nobody writes again before all have read
        return found

    def reduce(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return torch.stack(gather([tensor])).sum(dim=0)

    def one(rank: int) -> T:
        here.rank = rank
        return work(rank)

    random_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(world_size) as pool:
        patch.setattr("accelerate.PartialState", State)
        patch.setattr("accelerate.utils.gather_object", gather)
        patch.setattr("accelerate.utils.reduce", reduce)
        # Processes do not wait for one another to measure; threads do.
        patch.setattr("plasticity_peft.measuring.left_as_found._ONE_AT_A_TIME", Mock())
        found = list(pool.map(one, range(world_size)))
    torch.set_rng_state(random_state[0])
    np.random.set_state(random_state[1])
    random.setstate(random_state[2])
    return found


def free_port() -> int:
    """Returns the number of a port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
