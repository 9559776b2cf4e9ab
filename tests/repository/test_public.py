"""What users import, and what it costs."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import plasticity_peft
from plasticity_peft import PlasticityConfig
from tests.support.models import REPOSITORY
from tests.support.processes import python

PACKAGE = REPOSITORY / "plasticity_peft"
GROUND = ("errors", "checks", "constraints", "deprecation", "extras", "files", "hub")
"""Modules beside the rooms that every room may import."""
ROOMS = ("components", "images", "criteria", "report", "measuring", "saved", "card", "checkpoints", "adapters", "cli")
"""The rooms in the order of the line; `card` and `checkpoints` are public modules on top of `saved`."""


def test_the_public_names() -> None:
    assert plasticity_peft.__all__ == sorted(plasticity_peft.__all__)
    assert plasticity_peft.__all__ == [
        "BlockLayout",
        "PlasticityCallback",
        "PlasticityConfig",
        "PlasticityError",
        "PlasticityReport",
        "find_components",
        "load_adapter",
        "load_pretrained",
        "measure_plasticity",
        "register_architecture",
    ]
    for name in plasticity_peft.__all__:
        assert inspect.getdoc(getattr(plasticity_peft, name))


def test_every_option_of_the_config_is_described_once() -> None:
    own = [field for field in fields(PlasticityConfig) if field.metadata.get("help")]
    assert {"target_data", "report", "top_k", "training", "r", "lora_alpha"} <= {field.name for field in own}
    assert len(own) == len(fields(PlasticityConfig))


def imports(path: Path) -> set[str]:
    """Returns the modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def room(module: str) -> str:
    """Returns the room of a module of this package, or the module itself if it is in none."""
    return module.removeprefix("plasticity_peft.").split(".")[0]


def test_a_room_imports_only_from_rooms_above_it_and_from_the_ground() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert names == {*GROUND, *ROOMS, "__init__", "__main__"}
    above = {name: {*GROUND, *ROOMS[: index + 1]} for index, name in enumerate(ROOMS)}
    above |= {name: set(GROUND) for name in GROUND}
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here in above:
            needed = {room(module) for module in imports(path) if module.startswith("plasticity_peft.")}
            wrong = needed & {*GROUND, *ROOMS} - above[here]
            assert not wrong, f"{path} imports {wrong}"


def test_the_files_of_the_seam_touch_private_parts_of_peft() -> None:
    private = ("peft.mapping", "peft.utils", "peft.tuners", "peft.auto")
    files = {path.name for path in PACKAGE.rglob("*.py") if any(m.startswith(private) for m in imports(path))}
    assert files == {"model.py", "peft_model.py", "preconditions.py"}


def test_importing_brings_in_nothing_heavy_beside_peft() -> None:
    script = (
        "import sys, peft\n"
        "before = set(sys.modules)\n"
        "import plasticity_peft\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert new - {'transformers'} == {'plasticity_peft'}, new\n"  # more files of transformers, nobody else's
    )
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
