"""`--plugin`: criteria and architectures of the user's own on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plasticity_peft.cli.app import app
from plasticity_peft.components.layouts import LAYOUTS
from plasticity_peft.criteria.registry import CRITERIA
from tests.support.models import tiny_model

SIZE = """
import torch
from plasticity_peft import register_criterion
from plasticity_peft.criteria import WeightCriterion

@register_criterion
class Size(WeightCriterion):
    name = "{name}"
    title = "number of parameters"

    def score(self, model, architecture, *, image, seed):
        return torch.tensor([float(part.parameters) for part in architecture.components]).double()

with open({log!r}, "a") as file:
    file.write("{name} ")
"""


@pytest.fixture(autouse=True)
def registries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves the registries as they were, and moves into an empty folder."""
    monkeypatch.chdir(tmp_path)
    yield
    CRITERIA.maps[0].clear()
    LAYOUTS.maps[0].clear()


def plugin(path: Path, name: str) -> Path:
    """Writes a module that registers a criterion, and notes in a file that it was executed."""
    path.write_text(SIZE.format(name=name, log=str(path.parent / "log")))
    return path


def run(*arguments: object, **environment: str) -> object:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], prog_name="plasticity-peft", **environment
    )


def test_a_criterion_from_a_file_is_measured_saved_and_shown_without_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained("model")
    path = plugin(tmp_path / "own.py", "size")
    result = run("measure", "model", "--plugin", path, "--criterion", "size", "--output", "size.json")
    assert result.exit_code == 0, result.output
    values = json.loads(Path("size.json").read_text())
    assert (values["criterion"], values["title"]) == ("size", "number of parameters")
    assert [row["mean"] for row in values["scores"]] == [float(row["parameters"]) for row in values["scores"]]
    del CRITERIA["size"]
    assert "number of parameters" in run("show", "size.json").stdout
    assert json.loads(run("compare", "size.json", "size.json", "--json").stdout)["first"]["criterion"] == "size"
    assert run("select", "size.json", "--head", "classifier").stdout.startswith("# MHA: ")


def test_several_plugins_by_name_and_by_file_are_executed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(tmp_path / "own_module_of_this_test.py", "by_name")
    plugin(tmp_path / "own.py", "by_file")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--plugin", "own_module_of_this_test", "--plugin", "own.py", "--plugin", tmp_path / "own.py"]
    result = run("measure", "nowhere", *arguments, "--criterion", "by_file")
    assert (result.exit_code, "Cannot load the model nowhere" in result.stderr) == (1, True)
    assert {"by_name", "by_file"} <= set(CRITERIA)
    assert (tmp_path / "log").read_text() == "by_name by_file "


def test_an_architecture_from_a_file_names_the_modules(tmp_path: Path) -> None:
    tiny_model().save_pretrained("model")
    code = (
        "from dataclasses import replace\n"
        "from plasticity_peft import register_architecture\n"
        "from plasticity_peft.components.layouts import LAYOUTS\n"
        "register_architecture('vit', *(replace(row, LN1='nowhere') for row in LAYOUTS['vit']), replace=True)\n"
    )
    assert run("measure", "model", "--criterion", "bound", "--output", "a.json").exit_code == 0
    for number, arguments in enumerate(
        (["measure", "model", "--criterion", "bound"], ["select", "a.json", "--model", "model"])
    ):
        Path(f"own{number}.py").write_text(code)
        result = run(*arguments, "--plugin", f"own{number}.py")
        assert (result.exit_code, "were expected to have the layers nowhere, " in result.stderr) == (1, True)
        LAYOUTS.maps[0].clear()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("register_criterion(3)", "criterion must be a Criterion or a WeightCriterion"),
        ("register_architecture('x')", "at least one BlockLayout"),
    ],
)
def test_a_plugin_that_registers_something_else_is_refused_in_one_line(call: str, message: str) -> None:
    Path("own.py").write_text(f"import plasticity_peft\nplasticity_peft.{call}\n")
    result = run("measure", "model", "--plugin", "own.py")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.parametrize(
    ("code", "error"), [("import no_such_module", ModuleNotFoundError), ("1 / 0", ZeroDivisionError)]
)
def test_an_error_of_the_plugin_keeps_its_traceback(
    code: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Path("own_broken_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_broken_module", "own_broken_module.py"):
        for _ in range(2):  # what failed once is not taken for what is loaded
            assert isinstance(run("measure", "model", "--plugin", name).exception, error)


def test_completing_a_word_executes_no_plugin(tmp_path: Path) -> None:
    path = plugin(tmp_path / "own.py", "size")
    words = f"plasticity-peft measure model --plugin {path} --criterion bou"
    environment = {
        "_PLASTICITY_PEFT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    result = run(env=environment)
    assert result.stdout.split() == ["bound"]
    assert not (tmp_path / "log").exists()
