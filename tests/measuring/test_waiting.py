"""Processes that do not answer, or do not know of each other: what a user reads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.forking import STOCK, Parent, run_script
from tests.support.models import REPOSITORY

CPUS = Parent("", STOCK, variables=(("ACCELERATE_USE_CPU", "1"),))
STOPPING = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from accelerate import PartialState
from plasticity_peft import measure_plasticity
from plasticity_peft.errors import PlasticityError
from tests.support.models import random_images, tiny_model

folder, images = Path(sys.argv[1]), random_images(16)
rank = PartialState(cpu=True, timeout=timedelta(seconds=2)).process_index
(folder / f"pid-{rank}").write_text(str(os.getpid()))

class Stopping(torch.utils.data.Dataset):
    read = 0
    def __len__(self):
        return 16
    def __getitem__(self, index):
        self.read += 1
        if rank == 1 and self.read == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return images[index]

start = time.monotonic()
try:
    measure_plasticity(tiny_model(), Stopping(), settle=None, batch_size=2)
except PlasticityError as error:
    (folder / f"error-{rank}").write_text(str(error))
    (folder / f"cause-{rank}").write_text(str(error.__cause__))
    (folder / f"seconds-{rank}").write_text(str(time.monotonic() - start))
if rank == 0:
    os.kill(int((folder / "pid-1").read_text()), signal.SIGCONT)
os._exit(0)  # the group of processes is broken
"""
UNCONNECTED = """
import os, sys
from pathlib import Path
from plasticity_peft import measure_plasticity
from plasticity_peft.errors import ConfigError
from plasticity_peft.measuring.processes import this_process
from tests.support.models import random_images, tiny_model
try:
    measure_plasticity(tiny_model(), random_images(4))
    said = f"process of {this_process().world_size}"
except ConfigError as error:
    said = str(error)
Path(sys.argv[1], os.environ["RANK"]).write_text(said)
os._exit(0)
"""
LEFT_OVER = """
import os
from plasticity_peft.measuring.processes import this_process
assert os.environ["WORLD_SIZE"] == "2"
assert this_process() == (0, 1), this_process()
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which two processes wrote, of which the second stopped for a while (SIGSTOP)."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "script.py").write_text(STOPPING)
    result = run_script(folder / "script.py", folder, cwd=folder, processes=2, parent=CPUS, timeout=60)
    assert result.returncode == 0, result.stderr
    return folder


def test_measuring_ends_if_a_process_stops(stopped: Path) -> None:
    """The other one says so after the time that it was given, and what to do."""
    message = (stopped / "error-0").read_text()
    assert message.startswith(
        "Process 0 of 2 waited in vain for the results of the others. One has ended, has stopped"
    )
    assert "--ddp_timeout" in message
    assert "InitProcessGroupKwargs" in message
    assert (stopped / "cause-0").read_text() in message
    assert 1 < float((stopped / "seconds-0").read_text()) < 30


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Returns examples/train.py as a module."""
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    spec = importlib.util.spec_from_file_location("train_for_waiting", REPOSITORY / "examples" / "train.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_training_says_so_too(stopped: Path, train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of torch is the real one, of two processes."""
    said = (stopped / "cause-0").read_text()

    def main() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(train, "main", main)
    with pytest.raises(SystemExit, match=r"A process waited in vain for the others\..*--ddp_timeout") as end:
        train.run()
    assert said in str(end.value)
    said = "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train.run()


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path) -> None:
    """A launcher started them on a machine without a GPU, and ACCELERATE_USE_CPU is not set.

    Some releases of Accelerate connect them nevertheless.
    """
    (tmp_path / "script.py").write_text(UNCONNECTED)
    result = run_script(tmp_path / "script.py", tmp_path, cwd=tmp_path, processes=2, parent=STOCK)
    assert result.returncode == 0, result.stderr
    first, second = ((tmp_path / rank).read_text() for rank in ("0", "1"))
    assert first == second
    if first != "process of 2":
        assert first.startswith("A launcher started 2 processes, and Accelerate found no accelerator")
        assert "ACCELERATE_USE_CPU=1" in first


def test_a_world_size_without_a_launcher_is_one_process(tmp_path: Path) -> None:
    """Schedulers of clusters set it for programs that start no processes."""
    (tmp_path / "script.py").write_text(LEFT_OVER)
    parent = Parent("", CPUS, variables=(("WORLD_SIZE", "2"),))
    result = run_script(tmp_path / "script.py", cwd=tmp_path, parent=parent)
    assert result.returncode == 0, result.stderr
