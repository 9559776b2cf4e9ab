"""Scripts in processes that are forked from one that has imported what they import: each starts at once.

A script that imports torch, transformers and PEFT takes up to ten seconds to start, and the examples more.
Run as a script, this is the process that they are forked from. It reads requests from its standard input.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

TIMEOUT = 480
"""Seconds after which a process is ended by default."""


class Parent(NamedTuple):
    """A process that others are forked from."""

    imports: str
    """What it does first: Python."""
    options: tuple[str, ...] = ()
    """Of Python."""
    variables: tuple[tuple[str, str], ...] = ()
    """Of the environment, for what libraries read when they are imported."""


EXAMPLES = Parent(
    """
import pathlib, runpy, tests
import matplotlib.backends.backend_agg, matplotlib.figure, pydantic, scipy.stats  # what is imported on use otherwise
import sklearn.datasets, transformers.models.vit.modeling_vit
examples = pathlib.Path(tests.__file__).parents[1] / "examples"
sys.path.insert(0, str(examples))
for name in ("train.py", "compare_components.py"):
    runpy.run_path(str(examples / name), run_name="imported")
transformers.AutoModelForImageClassification.from_pretrained(examples / "fashion-mnist-vit")  # fills caches
""",
    variables=(("ACCELERATE_USE_CPU", "1"),),
)
"""Has imported what the examples do."""
PEFT = """
import peft, safetensors.torch, torch, transformers
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification, ViTModel
"""
"""What users of stock PEFT import; this package is not among it."""


def run_script(
    script: Path, *arguments: object, cwd: Path, processes: int = 1, parent: Parent = EXAMPLES, timeout: int = TIMEOUT
) -> CompletedProcess[str]:
    """Returns how a script ended, and what it wrote; the first error, if several processes ran it.

    They are given the variables by which `torchrun` and `accelerate launch` tell processes of each other.
    """
    from tests.support.processes import free_port

    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            {
                "argv": [str(script), *map(str, arguments)],
                "cwd": str(cwd),
                "timeout": timeout,
                "env": {**group, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
                if processes > 1
                else {},
                "outputs": [f"{folder}/{rank}-{stream}" for stream in ("out", "err")],
            }
            for rank in range(processes)
        ]
        server = _started(parent)
        server.stdin.write(json.dumps(requests) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        texts = [[Path(path).read_text() for path in request["outputs"]] for request in requests]
    out, err = ("".join(parts) for parts in zip(*texts, strict=True))
    return CompletedProcess([str(script)], next((code for code in codes if code), 0), out, err)


def run_code(
    code: str, *arguments: object, folder: Path, parent: Parent = EXAMPLES, timeout: int = TIMEOUT
) -> CompletedProcess[str]:
    """Returns how Python ended that was given as text, in a folder, and what it wrote."""
    script = folder / "code.py"
    script.write_text(code)
    return run_script(script, *arguments, cwd=folder, parent=parent, timeout=timeout)


@cache
def _started(parent: Parent) -> subprocess.Popen[str]:
    """Returns the process that others are forked from, which ends with this one."""
    from tests.support.processes import environment

    server = subprocess.Popen(
        [sys.executable, *parent.options, __file__, parent.imports],
        env=environment(**dict(parent.variables)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    @atexit.register
    def end() -> None:
        server.stdin.close()
        server.wait()
        server.stdout.close()

    return server


def _child(request: dict[str, Any]) -> None:
    """Runs a script as Python would, and ends this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(request["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    signal.alarm(request["timeout"])
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> list[int]:
    """Returns how processes ended; once one fails, the others are ended, as `torchrun` does."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[pid] for pid in pids]


def serve(imports: str) -> None:
    """Imports, and runs what is asked for until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    exec(imports, {"sys": sys})
    gc.collect()
    gc.freeze()  # or each process goes through all that was imported whenever garbage is collected, and copies it
    for line in sys.stdin:
        pids = []
        for request in json.loads(line):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of threads, and none of these holds a lock
                pid = os.fork()
            if pid == 0:
                _child(request)
            pids.append(pid)
        print(json.dumps(_wait(pids)), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
