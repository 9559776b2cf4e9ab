"""Runs examples/train.py again and again in children of one process, and kills them (SIGKILL) at chosen moments.

    python tests/support/killing.py train.py plan.json

The plan is a list of {"arguments", "log", "at", "seconds"}: `at` is [place, how many times to let it pass]; the child
kills itself there, with a file half-written. `seconds` is when the parent kills it. Prints how each child ended.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from transformers import TrainerState


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def halve(path: Any) -> None:
    """Cuts a file in the middle, or deletes half of a folder, and dies."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.iterdir())
        for file in files[: len(files) // 2]:
            file.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    die()


def after(owner: Any, name: str, matches: Callable[..., Any], passes: int) -> None:
    """Lets a function work, and then halves the file that `matches` finds in its arguments."""
    original = getattr(owner, name)
    seen = []

    def patched(*args: Any, **kwargs: Any) -> Any:
        found = matches(*args)
        if found is None:
            return original(*args, **kwargs)
        seen.append(found)
        if len(seen) <= passes:
            return original(*args, **kwargs)
        if name == "rmtree":
            halve(found)
        if name == "replace":
            die()
        original(*args, **kwargs)
        return halve(found)

    setattr(owner, name, patched)


def named(place: int, end: str) -> Callable[..., Any]:
    """Returns a function that finds the argument at this place, where it is a path that ends so."""
    return lambda *args: args[place] if str(args[place]).endswith(end) else None


PLACES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "weights": (peft.peft_model, "safe_save_file", named(1, "adapter_model.safetensors")),
    "optimizer": (torch, "save", named(1, "optimizer.pt")),
    "random state": (torch, "save", named(1, "rng_state.pth")),
    "state": (TrainerState, "save_to_json", named(1, "trainer_state.json")),
    "report": (os, "replace", named(1, "plasticity.json")),
    "config": (os, "replace", named(1, "adapter_config.json")),
    "deleting": (shutil, "rmtree", lambda path, *_: path if Path(path).name.startswith("checkpoint-") else None),
}


def child(train: Any, step: dict[str, Any]) -> None:
    log = os.open(step["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        if step.get("limit"):
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (step["limit"], step["limit"]))
        if step.get("user"):
            os.setgid(step["user"])
            os.setuid(step["user"])
        if step.get("at"):
            place, passes = step["at"]
            after(*PLACES[place], passes)
        sys.argv = ["train.py", *step["arguments"]]
        train.run()
        code = 0
    except SystemExit as end:
        print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    sys.path.insert(0, str(Path(sys.argv[1]).parent))  # as Python does for a script
    specification = importlib.util.spec_from_file_location("train", sys.argv[1])
    assert specification is not None
    assert specification.loader is not None
    train = importlib.util.module_from_spec(specification)
    sys.modules["train"] = train
    specification.loader.exec_module(train)
    ends = []
    for step in json.loads(Path(sys.argv[2]).read_text()):
        pid = os.fork()
        if pid == 0:
            child(train, step)
        timer = threading.Timer(step.get("seconds") or 1e6, os.kill, (pid, signal.SIGKILL))
        timer.start()
        _, status = os.waitpid(pid, 0)
        timer.cancel()
        ends.append(os.waitstatus_to_exitcode(status))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
