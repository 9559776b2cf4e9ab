"""The notebook is what it claims to be: executed, clean, and runnable with the extras that it names."""

from __future__ import annotations

import ast
import base64
import os
import re
import subprocess
import sys
import sysconfig
import venv
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from tests.support.deprecations import IN_OTHER_PROCESSES
from tests.support.forking import run_script
from tests.support.models import REPOSITORY

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    """Returns all that the cells printed on the standard output."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def pictures(notebook: Any) -> list[bytes]:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [base64.b64decode(found) for output in outputs if (found := output.get("data", {}).get("image/png"))]


@cache
def executed() -> Any:
    """Returns the notebook after all of its cells ran in a kernel of this Python."""
    notebook = read()
    for cell in code_cells(notebook):
        cell.outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        # The kernel itself does so, under Python 3.13.
        patch.setenv(
            "PYTHONWARNINGS", f"{IN_OTHER_PROCESSES},ignore:There is no current event loop:DeprecationWarning"
        )
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    return notebook


FACTS = r"trainable params: [\d,]+|Selected: \S+|\|    1 \| MHA  \|"
"""What does not depend on how long the notebook trains."""


def facts(text: str) -> list[str]:
    found = re.findall(FACTS, text)
    assert len(found) == 3
    return found


def accuracy(text: str) -> float:
    return float(re.search(r"Test accuracy: ([\d.]+)%", text)[1])


def test_its_cells_run_and_print_what_is_committed(tmp_path: Path) -> None:
    """As a script, with one of the epochs, and without the forecast, which trains for 80 steps."""
    code = in_one_epoch(cells_of(read()))
    for part, less in (("forecast=True", "forecast=False"), ('report.plot(view="forecast").figure', "")):
        assert code.count(part) == 1
        code = code.replace(part, less)
    script = tmp_path / "quickstart.py"
    script.write_text(code)
    done = run_script(script, cwd=NOTEBOOK.parent)
    assert done.returncode == 0, done.stderr
    assert facts(done.stdout) == facts(printed(read()))
    assert accuracy(done.stdout) > 40


@pytest.mark.slow
def test_it_runs_in_a_kernel_with_its_pictures() -> None:
    assert accuracy(printed(executed())) > 80
    assert len(pictures(executed())) == len(pictures(read())) == 4
    assert facts(printed(executed())) == facts(printed(read()))


def in_one_epoch(code: str) -> str:
    assert code.count("num_train_epochs=6") == 1
    return code.replace("num_train_epochs=6", "num_train_epochs=1")


def cells_of(notebook: Any) -> str:
    return "\n".join(cell.source for cell in code_cells(notebook))


def test_it_names_the_repository_of_the_project() -> None:
    setting = re.search(r'^repository = "(.*?)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.findall(r'repository = "(.*?)"', cells_of(read())) == [setting]


@pytest.mark.slow
def test_away_from_its_folder_it_fetches_and_installs_what_is_missing(tmp_path: Path) -> None:
    """A fresh environment has the dependencies, but not the package; the repository lies on this machine."""
    environment, clone = tmp_path / "environment", tmp_path / "repository"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    subprocess.run([python, "-c", "import torch, importlib.util as u; assert not u.find_spec('plasticity_peft')"],
                   check=True, cwd=tmp_path)  # fmt: skip
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    away = tmp_path / "away"
    away.mkdir()
    script = in_one_epoch(cells_of(read()))
    script = re.sub(r'(?<=repository = ")[^"]*', f"file://{clone}", script)
    (away / "quickstart.py").write_text(script)
    done = subprocess.run([python, "quickstart.py"], cwd=away, capture_output=True, text=True,
                          env={**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": "", "PYTHONWARNINGS": ""})  # fmt: skip
    if "Could not find a version that satisfies the requirement hatchling" in done.stderr:
        pytest.skip("the package index cannot be reached, and pip takes hatchling from there")
    assert done.returncode == 0, done.stderr[-3000:]
    assert accuracy(done.stdout) > 40
    assert (away / "repository" / "examples" / "quickstart.ipynb").is_file()
    assert list(packages.glob("plasticity_peft/report/page.html"))


def test_it_is_a_valid_executed_notebook_without_traces_of_a_machine() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = NOTEBOOK.read_text(encoding="utf-8")
    for trace in ("/root", "/home", "/work", "/tmp", "site-packages", "Warning", "Traceback"):
        assert trace not in text
    assert len(text) < 250_000
    assert all(picture.startswith(b"\x89PNG") and len(picture) < 100_000 for picture in pictures(notebook))


def test_it_imports_only_what_the_extras_bring() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["examples"], project["name"]]
    names = {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in declared}
    distributions = packages_distributions()
    for module in imported():
        if module not in sys.stdlib_module_names:
            found = {normal(name) for name in distributions.get(module, [module])}
            assert found & names, f"{module} is not declared"
    assert imported() > {"plasticity_peft", "datasets"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Returns the top-level packages that the cells import."""
    found = set()
    for cell in code_cells(read()):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    return found
