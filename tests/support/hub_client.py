"""Processes that use a Hub: their own environment, an empty cache, and the libraries already imported.

pytest's own process is offline for good, for huggingface_hub reads its environment when it is imported. Here one
process imports torch, transformers and peft with the environment of the Hub, and every script runs in a fork of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.deprecations import IN_OTHER_PROCESSES
from tests.support.hub_server import TOKEN, HubServer
from tests.support.models import REPOSITORY

WARM = """
import gc, json, os, sys, time, traceback, warnings
import torch, transformers, peft, huggingface_hub
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification, pipeline
with warnings.catch_warnings():
    warnings.simplefilter("default")
    import datasets, evaluate, matplotlib.backends.backend_agg, matplotlib.figure, pydantic, scipy.stats  # used later
    import sklearn.datasets, sklearn.metrics, transformers.models.vit.modeling_vit
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # or each script goes through all that was imported whenever garbage is collected, and copies it
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(job["folder"])
            os.environ.update(job["environment"])
            if job["stock"]:
                sys.modules["plasticity_peft"] = None
            time.sleep = lambda seconds: print("slept", seconds, file=sys.stderr)
            exec(compile(job["script"], "script", "exec"), {**globals(), **job["names"]})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


CONTENT = "Use 'content=<:DeprecationWarning"
"""huggingface_hub gives httpx files in a way that httpx warns of."""


class Result(NamedTuple):
    """How a script ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def values(self) -> Any:
        """What the last line of a script that ended well holds."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """The exception that ended a script, without where."""
        assert self.code == 1, self.out + self.err
        lines = self.err.splitlines()
        last = max(index for index, line in enumerate(lines) if line.startswith("Traceback"))
        return "\n".join(line for line in lines[last + 1 :] if not line.startswith("  "))


class Client:
    """Runs scripts on one machine that knows a Hub."""

    def __init__(self, process: subprocess.Popen[str], home: Path, folder: Path) -> None:
        self.process, self.home, self.folder = process, home, folder

    def run(self, script: str, *, stock: bool = False, token: str = TOKEN, keep: bool = False, **names: Any) -> Result:
        """Returns how the script ended; `names` are its variables.

        Args:
            script: Python; what it prints last can be read as `values`.
            stock: whether plasticity_peft cannot be imported.
            token: what the machine is logged in with.
            keep: whether the cache is what the script before left there; empty otherwise.
            names: what JSON holds.
        """
        if not keep:
            shutil.rmtree(self.home, ignore_errors=True)
        files = {name: str(self.folder / name) for name in ("out", "err")}
        environment = {"HF_TOKEN": token}
        job = {"script": script, "stock": stock, "environment": environment, "names": names, **files}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({**job, "folder": str(self.folder)}) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return Result(code, *(Path(path).read_text() for path in files.values()))


def environment(hub: HubServer, home: Path, token: str = TOKEN) -> dict[str, str]:
    """Returns the environment of a process on a machine that knows the Hub, has an empty cache and is logged in."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": ",".join([IN_OTHER_PROCESSES, f"ignore:{CONTENT}"]),
    }


@contextmanager
def machine(hub: HubServer, folder: Path) -> Iterator[Client]:
    """Inside, a client runs scripts."""
    known = ("`is_gradient_checkpointing` is deprecated:FutureWarning", "Use 'content=<..:DeprecationWarning")
    ignored = [option for warning in known for option in ("-W", f"ignore:{warning}")]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *ignored, "-c", WARM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(hub, folder / "home"),
        cwd=folder,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield Client(process, folder / "home", folder)
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait(timeout=20)
        process.stdout.close()
