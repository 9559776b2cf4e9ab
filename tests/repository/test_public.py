"""What users import, and what it costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import pydoc
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig

import plasticity_peft
from plasticity_peft import PlasticityConfig
from plasticity_peft.arguments import ARGUMENTS
from plasticity_peft.criteria.registry import CRITERIA
from tests.support.counting import PACKAGE, House, imported
from tests.support.forking import STOCK, run_code
from tests.support.processes import python

GROUND = ("errors", "checks", "constraints", "deprecation", "extras", "files", "hub", "registration")
"""Modules beside the rooms that every room may import."""
ROOMS = (
    "components",
    "arguments",
    "images",
    "criteria",
    "report",
    "measuring",
    "optimizers",
    "saved",
    "card",
    "checkpoints",
    "adapters",
    "cli",
)
"""The rooms in the order of the line. `arguments` needs the kinds of component; `card` and `checkpoints` are public
modules on top of `saved`."""
PUBLIC = [
    "BlockLayout",
    "PlasticityCallback",
    "PlasticityConfig",
    "PlasticityError",
    "PlasticityReport",
    "create_plasticity_optimizer",
    "find_components",
    "fit_head",
    "forecast_finetuning",
    "load_adapter",
    "load_pretrained",
    "measure_plasticity",
    "register_architecture",
    "register_criterion",
]
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_the_public_names() -> None:
    assert sorted(PUBLIC) == PUBLIC
    assert plasticity_peft.__all__ == PUBLIC
    for name in PUBLIC:
        assert inspect.getdoc(getattr(plasticity_peft, name))
    found: dict[str, object] = {}
    exec("from plasticity_peft import *", found)
    assert set(found) - {"__builtins__"} == set(PUBLIC)
    assert set(PUBLIC) <= set(dir(plasticity_peft))
    assert "Measure, rank, select and train" in pydoc.render_doc(plasticity_peft)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_room_says_what_it_is_for_and_hands_on_a_few_names(folder: str) -> None:
    room = importlib.import_module(f"plasticity_peft.{folder}")
    assert room.__doc__
    assert 1 <= len(room.__all__) <= 4
    assert all(inspect.getdoc(getattr(room, name)) for name in room.__all__)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.pyi")), ids=lambda path: path.parent.name)
def test_a_stub_declares_what_there_is(path: Path) -> None:
    """Type checkers and editors read the stub; Python reads it too, but looks up a name only when it is used."""
    module = importlib.import_module(".".join(path.parent.relative_to(PACKAGE.parent).parts))
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name  # which is how a stub declares a name as public
                assert module.__getattr__(alias.name) is getattr(module, alias.name)
        else:
            assert isinstance(node, ast.AnnAssign)
            assert hasattr(module, ast.unparse(node.target))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_public_modules_are_attributes() -> None:
    for name in ("card", "checkpoints", "files", *(name for name in ROOMS if name in FOLDERS)):
        assert plasticity_peft.__getattr__(name) is importlib.import_module(f"plasticity_peft.{name}")


def test_a_config_can_be_pickled() -> None:
    config = PlasticityConfig(training="lora", criterion="bound", top_k=2)
    assert pickle.loads(pickle.dumps(config)) == config


def test_every_option_of_the_config_is_described_once() -> None:
    assert all(each.metadata.get("help") for each in fields(PlasticityConfig))
    inherited = {each.name for each in fields(LoraConfig)} | {"chosen"}  # which no user gives
    own = {each.name: each for each in fields(PlasticityConfig) if each.init and each.name not in inherited}
    text = " ".join((inspect.getdoc(PlasticityConfig) or "").split())
    for name, each in own.items():
        assert each.metadata["help"] is ARGUMENTS[name].help
        assert f" {name}: {each.metadata['help']} " in text
    assert set(ARGUMENTS) - set(own) <= inherited
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "arguments.py"]
    for argument in ARGUMENTS.values():
        assert not argument.help or not any(argument.help[:60] in path.read_text() for path in files)


def test_the_help_text_names_every_criterion() -> None:
    assert all(f"'{name}'" in ARGUMENTS["criterion"].help for name in CRITERIA.maps[-1])


def room(module: str) -> str:
    """Returns the room of a module of this package, or the module itself if it is in none."""
    return module.removeprefix("plasticity_peft.").split(".")[0]


def test_a_room_imports_only_from_rooms_above_it_and_from_the_ground() -> None:
    imports = House(PACKAGE).imports
    assert {room(module) for module in imports} == {*GROUND, *ROOMS, "plasticity_peft", "__main__"}
    above = {name: {*GROUND, *ROOMS[: index + 1]} for index, name in enumerate(ROOMS)}
    above |= {name: set(GROUND) for name in GROUND}
    for module, needed in imports.items():
        if room(module) in above:
            wrong = {other for other in needed if room(other) not in above[room(module)]}
            assert not wrong, f"{module} imports {wrong}"


def test_the_files_that_touch_private_modules_of_peft() -> None:
    private = ("peft.mapping", "peft.utils", "peft.tuners", "peft.auto")
    found = {
        source.path.name
        for source in House(PACKAGE).sources
        if any(name.startswith(private) for name in imported(source.tree, source.module))
    }
    assert found == {"model.py", "originals.py", "peft_model.py", "preconditions.py"}


IMPORTING = """
import sys, {before}
before = set(sys.modules)
import plasticity_peft
new = {{name.split(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
assert new <= {allowed}, new
"""


def test_importing_brings_in_nothing_heavy() -> None:
    allowed = {"plasticity_peft", "lazy_loader", "typing_extensions"}
    result = python("-c", IMPORTING.format(before="sys", allowed=allowed))
    assert result.returncode == 0, result.stderr


def test_importing_brings_in_nothing_heavy_if_peft_is_imported(tmp_path: Path) -> None:
    allowed = {"plasticity_peft", "lazy_loader"}
    result = run_code(IMPORTING.format(before="peft", allowed=allowed), folder=tmp_path, parent=STOCK)
    assert result.returncode == 0, result.stderr
