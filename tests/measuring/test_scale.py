"""What processes exchange is what the formulas of the benchmark say, which are applied to many GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forking import run_script

SCRIPT = """
import json, sys
from pathlib import Path
import tests
sys.path.insert(0, str(Path(tests.__file__).parents[1] / "examples" / "benchmarks"))
import torch
from plasticity_peft.measuring.processes import this_process
from scale import Counter, formula, images_of, model_of, moved, objects_of, works

rank, processes = this_process()
found = []
for work in works()[:-1]:
    model, images = model_of(work), images_of(work)
    with Counter() as counter:
        work.call(model, images)
    operations = [row for row in counter.found if row["phase"] == work.phase]
    received = sum(moved(row["operation"], row["given"], processes) for row in operations)
    found.append([work.name, received, formula(work, processes, objects_of(operations)), len(operations)])
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def test_processes_exchange_what_the_formulas_say(tmp_path: Path) -> None:
    """With three processes, twice the sums would be received if they were gathered, and 4/3 if they are added up."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = run_script(script, tmp_path, cwd=tmp_path, processes=3)
    assert result.returncode == 0, result.stderr
    for rank in range(3):
        rows = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {name for name, *_ in rows} >= {"look, images", "look, pairs", "fitted head", "forecast"}
        for name, received, by_formula, operations in rows:
            assert received == pytest.approx(by_formula, rel=0.05, abs=100), name
            assert 0 < operations <= 45, name
