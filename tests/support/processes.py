"""Python in processes of their own: one, or several that `accelerate launch` starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.models import REPOSITORY

KNOWN = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""The warning of pyproject.toml that is nobody's here, as an option of `-W`."""
STRICT = ("-W", "error", "-W", KNOWN)
"""Options of Python by which every other warning is an error."""


def environment(**options: str) -> dict[str, str]:
    """Returns the environment of a process: one thread, and this package from wherever it is started."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **options}


def python(*arguments: object, timeout: float = 240, **options: Any) -> subprocess.CompletedProcess[str]:
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
        outputs = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(running, outputs, strict=True)
    ]


def free_port() -> int:
    """Returns the number of a port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
