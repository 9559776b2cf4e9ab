"""Several real processes: one report, one selection, and nobody left waiting."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from plasticity_peft import PlasticityReport, measure_plasticity
from tests.support.forking import run_script
from tests.support.models import random_images, tiny_model
from tests.support.processes import launch

IMAGES = random_images(40)


def stream() -> Iterator[torch.Tensor]:
    """Yields the images, and never ends."""
    while True:
        yield from IMAGES


CASES: dict[str, dict[str, Any]] = {
    "the default": {},
    "all images": {"settle": None},
    "embedding, uneven": {"inputs": "embedding", "settle": None, "max_samples": 47},
    "activation, settled": {"inputs": "activation", "max_samples": 200},
    "batches": {"criterion": "feature_norm", "batch_size": 3},
    "two pairs for three": {"inputs": "activation", "max_samples": 2},
    "a stream": {"inputs": "embedding", "max_samples": 70, "settle": None},
    "a stream of single images": {"max_samples": 64},
    "source and target": {"inputs": "embedding", "max_samples": 33},
    "weights": {"criterion": "condition_number"},
    "random transforms": {"settle": None},
}


class Shaded(torch.utils.data.Dataset):
    """The images, each as bright as chance will have it."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> torch.Tensor:
        return IMAGES[index] * (0.5 + torch.rand(()))


def measured(case: str) -> PlasticityReport:
    """Returns the report of a case, in a process or in one of many."""
    source = IMAGES.flip(0) if case == "source and target" else None
    target = stream() if "stream" in case else Shaded() if case == "random transforms" else IMAGES
    return measure_plasticity(tiny_model(), target, source, **{"batch_size": 5, **CASES[case]})


SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from peft import get_peft_model
from plasticity_peft import PlasticityConfig, measure_plasticity
from plasticity_peft.measuring.processes import this_process
from tests.support.models import tiny_model
from tests.measuring.test_distributed import CASES, IMAGES, measured

folder, world_size = Path(sys.argv[1]), int(sys.argv[2])
rank, found = this_process()
assert found == world_size == torch.distributed.get_world_size(), (found, world_size)
for number, case in enumerate(CASES):
    measured(case).save(folder / f"{number}-{rank}.json")

class Bad(torch.utils.data.Dataset):
    read = 0
    def __len__(self):
        return 40
    def __getitem__(self, index):
        self.read += 1
        if rank == 1 and self.read == 7:
            raise OSError("the image cannot be read")
        return IMAGES[index]

nan = IMAGES * (torch.nan if rank == 1 else 1)
for name, data in (("bad", Bad()), ("nan", nan), ("uneven", IMAGES[: 40 - rank]), ("no", None)):
    try:
        measure_plasticity(tiny_model(), data, settle=None, batch_size=2)
    except Exception as error:
        (folder / f"{name}-{rank}").write_text(f"{type(error).__name__}: {error}")
PartialState().wait_for_everyone()
(folder / f"caught-{rank}").touch()
if sys.argv[3:] == ["and end with an error"]:
    get_peft_model(tiny_model(), PlasticityConfig(target_data=nan))
PartialState().destroy_process_group()
"""
ERRORS = {
    "bad": "OSError: the image cannot be read",
    "nan": r"NonFiniteError: target_data\[.*\] contains NaN",
    "uneven": "DataError: The processes must measure the same model on the same data.* They differ in",
    "no": "ConfigError: criterion='parameter_plasticity' needs images to measure on",
}


def launched(folder: Path, processes: int, machines: int, *end: str) -> list[CompletedProcess[str]]:
    """Returns how the launchers of `accelerate launch` ended, one on each machine."""
    return launch(written(folder), folder, processes, *end, processes=processes, machines=machines)


def written(folder: Path) -> Path:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return script


@cache
def alone(case: str) -> PlasticityReport:
    """Returns the report of a case that one process measured: this one."""
    return measured(case)


def check_reports(folder: Path, processes: int, case: str) -> None:
    """Fails unless all processes have one report, and it is that of one process alone."""
    number = list(CASES).index(case)
    texts = [(folder / f"{number}-{rank}.json").read_text() for rank in range(processes)]
    assert len(set(texts)) == 1, case
    found, own = PlasticityReport.from_dict(json.loads(texts[0])), alone(case)
    assert (found.samples, found.skipped, found.ending) == (own.samples, own.skipped, own.ending), case
    for row, expected in zip([*found.scores, *found.kinds], [*own.scores, *own.kinds], strict=True):
        assert row.mean == pytest.approx(expected.mean, rel=1e-6), case
        assert row.std == pytest.approx(expected.std, rel=1e-4, abs=1e-9), case
        assert row.standard_error == pytest.approx(expected.standard_error, rel=1e-6, abs=1e-12), case
    for value, expected in zip(found.separation.components, own.separation.components, strict=True):
        assert value == pytest.approx(expected, rel=1e-6, abs=2e-6), case


def check_errors(folder: Path, processes: int, name: str) -> None:
    """Fails unless all processes raised: the one with its own error, the others with what happened there."""
    own = ERRORS[name]
    for rank in range(processes):
        message = (folder / f"{name}-{rank}").read_text()
        told = own if rank == 1 or name in ("uneven", "no") else f"PlasticityError: .*process 1 of .: {own}"
        assert re.search(told, message), (name, rank, message)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder into which two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    result = run_script(written(folder), folder, 2, cwd=folder, processes=2)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_report_of_one(case: str, two: Path) -> None:
    check_reports(two, 2, case)


@pytest.mark.parametrize("name", ERRORS)
def test_all_processes_raise_what_one_does(name: str, two: Path) -> None:
    check_errors(two, 2, name)


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    """Nobody catches it, after all the rest."""
    (result,) = launched(tmp_path, 2, 1, "and end with an error")
    assert all((tmp_path / f"caught-{rank}").exists() for rank in range(2)), result.stderr
    assert result.returncode != 0
    assert "NonFiniteError: target_data[" in result.stderr
    assert "Measuring failed in another process. process 1 of 2: NonFiniteError: target_data[" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "machines"), [(2, 1), (3, 1), (2, 2)])
def test_all_processes_have_the_report_of_one(processes: int, machines: int, tmp_path: Path) -> None:
    for result in launched(tmp_path, processes, machines):
        assert result.returncode == 0, result.stderr
    for case in CASES:
        check_reports(tmp_path, processes, case)
    for name in ERRORS:
        check_errors(tmp_path, processes, name)
