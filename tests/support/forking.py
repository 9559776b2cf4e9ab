"""Scripts in processes that are forked from one that has imported what they import: each starts at once.

A script that imports torch, transformers and PEFT takes up to ten seconds to start, and the examples more.
Run as a script, this is the process that they are forked from. It reads requests from its standard input. One that
imports more is itself forked from one that imports less, so that nothing is imported twice.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
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
from typing import IO, Any, NamedTuple

TIMEOUT = 480
"""Seconds after which a process is ended by default."""


KNOWN = "`is_gradient_checkpointing` is deprecated"
"""The warning of pyproject.toml that is nobody's here."""


class Parent(NamedTuple):
    """A process that others are forked from."""

    imports: str
    """What it does first: Python."""
    base: Parent | None = None
    """What it is forked from itself; a new process if this is None."""
    strict: bool = False
    """Whether every warning but a known one is an error, while it imports and in what is forked from it."""
    variables: tuple[tuple[str, str], ...] = ()
    """Of the environment."""


TRANSFORMERS = Parent("import accelerate, torch, transformers\nfrom transformers import PreTrainedModel", strict=True)
"""Has imported what PEFT imports."""
STOCK = Parent(
    """
import peft, safetensors.torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification, ViTModel
""",
    TRANSFORMERS,
    strict=True,
)
"""Has imported what users of stock PEFT import; this package is not among it."""
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
    STOCK,
    variables=(("ACCELERATE_USE_CPU", "1"),),
)
"""Has imported what the examples do."""


@cache
def hub_cache() -> Path:
    """Returns the folder in which the processes find what they once got from the Hub; nothing, unless it is put there.

    It ends with this process.
    """
    folder = tempfile.TemporaryDirectory(prefix="hub-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


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
        codes = _started(parent).ask(requests)
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


class Server(NamedTuple):
    """A process that others are forked from, while it runs."""

    requests: IO[str]
    answers: IO[str]

    def ask(self, request: Any) -> Any:
        """Returns what it answers."""
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        answer = self.answers.readline()
        assert answer, "the process that scripts are forked from has ended; it wrote why"
        return json.loads(answer)


@cache
def _started(parent: Parent | None) -> Server:
    """Returns the process that others are forked from, which ends with this one; one without imports for None."""
    return _launched() if parent is None else _forked(parent)


def _launched() -> Server:
    """Returns a new process that has imported nothing."""
    from tests.support.processes import environment

    process = subprocess.Popen(
        [sys.executable, __file__],
        env=environment(HF_HUB_CACHE=str(hub_cache())),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    @atexit.register
    def end() -> None:
        process.stdin.close()
        process.wait()
        process.stdout.close()

    return Server(process.stdin, process.stdout)


def _forked(parent: Parent) -> Server:
    """Returns a process that is forked from its base, and has imported more."""
    base = _started(parent.base)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [f"{folder}/{name}" for name in ("requests", "answers")]
        for pipe in pipes:
            os.mkfifo(pipe)
        base.ask({"imports": parent.imports, "strict": parent.strict, "env": dict(parent.variables), "pipes": pipes})
        server = Server(open(pipes[0], "w"), open(pipes[1]))  # noqa: SIM115 - closed when this process ends
    assert server.answers.readline() == "ready\n", f"cannot do: {parent.imports}"

    @atexit.register
    def end() -> None:
        server.requests.close()
        server.answers.close()

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
    while not codes.keys() >= set(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[pid] for pid in pids]


def _fork() -> int:
    """Returns the process id of a child, or 0 in the child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads, and none of these holds a lock
        return os.fork()


def _be_strict(strict: bool) -> None:
    """Makes every warning but a known one an error, or takes back what that changed."""
    ours = [("error", None, Warning, None, 0), ("ignore", re.compile(KNOWN, re.IGNORECASE), FutureWarning, None, 0)]
    with warnings.catch_warnings():
        pass  # Python forgets which warnings it has shown
    warnings.filters[:] = [each for each in warnings.filters if each not in ours]
    if strict:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", KNOWN, FutureWarning)
        assert warnings.filters[:2] == ours[::-1]


def _serve_as(request: dict[str, Any]) -> None:
    """Becomes a process that others are forked from, until nobody asks it any more."""
    try:
        with open(request["pipes"][0]) as requests, open(request["pipes"][1], "w") as answers:
            os.environ.update(request["env"])
            _be_strict(request["strict"])
            exec(request["imports"], {"sys": sys})
            gc.collect()
            gc.freeze()  # or each process goes through all that was imported whenever garbage is collected
            print("ready", file=answers, flush=True)
            serve(requests, answers)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Runs what is asked for until there are no more requests: scripts, or to become another such process."""
    for line in requests:
        asked = json.loads(line)
        if isinstance(asked, dict):
            if _fork() == 0:
                _serve_as(asked)
            codes = []
        else:
            pids = []
            for request in asked:
                if (pid := _fork()) == 0:
                    _child(request)
                pids.append(pid)
            codes = _wait(pids)
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    to_parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    serve(sys.stdin, to_parent)
