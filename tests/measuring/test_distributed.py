"""Several real processes, started by `accelerate launch`: one report, one selection, and nobody left waiting."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plasticity_peft import PlasticityReport, measure_plasticity
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
from plasticity_peft import measure_plasticity
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
PartialState().destroy_process_group()
"""
UNCAUGHT = """
import sys
from plasticity_peft import PlasticityConfig
from plasticity_peft.measuring.processes import this_process
from peft import get_peft_model
from tests.support.models import tiny_model
from tests.measuring.test_distributed import IMAGES

rank, found = this_process()
assert found == 2
get_peft_model(tiny_model(), PlasticityConfig(target_data=IMAGES * (float("nan") if rank == 1 else 1)))
"""


@pytest.mark.parametrize(("processes", "machines"), [(2, 1), (3, 1), (2, 2)])
def test_all_processes_have_the_report_of_one(processes: int, machines: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for result in launch(script, tmp_path, processes, processes=processes, machines=machines):
        assert result.returncode == 0, result.stderr

    for number, case in enumerate(CASES):
        texts = [(tmp_path / f"{number}-{rank}.json").read_text() for rank in range(processes)]
        assert len(set(texts)) == 1, case
        found, alone = PlasticityReport.from_dict(json.loads(texts[0])), measured(case)
        assert (found.samples, found.skipped, found.ending) == (alone.samples, alone.skipped, alone.ending), case
        for row, expected in zip([*found.scores, *found.kinds], [*alone.scores, *alone.kinds], strict=True):
            assert row.mean == pytest.approx(expected.mean, rel=1e-6), case
            assert row.std == pytest.approx(expected.std, rel=1e-4, abs=1e-9), case

    errors = {
        "bad": "OSError: the image cannot be read",
        "nan": r"NonFiniteError: target_data\[.*\] contains NaN",
        "uneven": "DataError: The processes must measure the same model on the same data.* They differ in",
        "no": "ConfigError: criterion='parameter_plasticity' needs images to measure on",
    }
    for name, own in errors.items():
        for rank in range(processes):
            message = (tmp_path / f"{name}-{rank}").read_text()
            told = own if rank == 1 or name in ("uneven", "no") else f"PlasticityError: .*process 1 of .: {own}"
            assert re.search(told, message), (name, rank, message)


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNCAUGHT)
    (result,) = launch(script, processes=2)
    assert result.returncode != 0
    assert "NonFiniteError: target_data[" in result.stderr
    assert "Measuring failed in another process. process 1 of 2: NonFiniteError: target_data[" in result.stderr
