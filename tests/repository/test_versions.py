"""What is declared, what is pinned, what is imported and what is run say the same."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.models import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
TOOLS = {"build", "mypy", "nox", "pip-audit", "pip-licenses", "pre-commit", "ruff", "twine"}
"""Of the extra `quality`: they look at the code, and are run in one version."""


def requirements(*extras: str) -> dict[str, Requirement]:
    """Returns what is declared for the package and for `extras`, by name, on any Python."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    found = (Requirement(line) for line in lines if not line.startswith(f"{PROJECT['name']}["))
    return {canonicalize_name(one.name): one for one in found}


def constraints(name: str, python: str | None = None) -> dict[str, Version]:
    """Returns the versions of a constraints file, as they are on `python`; the first line of a name without it."""
    environment = {**default_environment(), "python_version": python or "3.10"}
    found: dict[str, Version] = {}
    for line in (REPOSITORY / name).read_text().splitlines():
        text = line.split("#")[0].strip()
        if text:
            one = Requirement(text)
            if one.marker is None or one.marker.evaluate(environment):
                (pin,) = one.specifier
                assert pin.operator == "==", line
                assert canonicalize_name(one.name) not in found, f"{name}: {one.name} is pinned twice on {python}"
                found[canonicalize_name(one.name)] = Version(pin.version)
    return found


def floor(requirement: Requirement) -> Version:
    (lowest,) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
    return lowest


DECLARED = requirements("datasets", "examples", "plot", "quantization", "test")


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_the_floor_of_a_dependency_is_what_the_lowest_run_has(name: str) -> None:
    pinned = constraints("constraints-lowest.txt")
    pinned |= {name: Version(version) for name, version in noxfile().VERSIONS["lowest"][1].items()}
    assert name in pinned, f"constraints-lowest.txt does not pin {name}, so that no run shows that its floor is true"
    assert pinned[name] == floor(DECLARED[name]), "pyproject.toml and constraints-lowest.txt differ"


def test_the_lowest_run_says_why_it_pins_more() -> None:
    text = (REPOSITORY / "constraints-lowest.txt").read_text()
    for name in set(constraints("constraints-lowest.txt")) - set(DECLARED):
        assert re.search(rf"(?m)^{name}==\S+  # \S", text), f"{name} is no dependency: say why it is pinned"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_tested_versions_are_allowed(python: str) -> None:
    declared = requirements("datasets", "docs", "examples", "plot", "quantization", "test", "quality")
    pinned = constraints("constraints.txt", python)
    assert {"torch", "transformers", "peft", "accelerate"} <= set(pinned)
    for name, version in pinned.items():
        assert declared[name].specifier.contains(str(version)), f"{name}=={version} on Python {python}"


def imported(path: Path) -> dict[str, bool]:
    """Returns the top-level modules that a file imports, and whether one import of each is outside of functions."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = {node for function in functions for node in ast.walk(function)}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
        for name in names:
            top = name.split(".")[0]
            found[top] = found.get(top, False) or node not in inner
    return found


def test_imports_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom c.d import e\ntry:\n    import f\nexcept ImportError:\n    f = None\n")
    path.write_text(path.read_text() + "def g():\n    import h\n    import a\nfrom . import i\n")
    assert imported(path) == {"a": True, "c": True, "f": True, "h": False}


@cache
def providers() -> dict[str, set[str]]:
    """Returns which distributions hold a module; scikit-learn tells so by its files alone, to Python 3.10."""
    found: dict[str, set[str]] = {}
    for one in distributions():
        name = canonicalize_name(one.metadata["Name"])  # reading it takes longer than the files do
        for file in one.files or ():
            if file.suffix == ".py":
                found.setdefault(file.parts[0].removesuffix(".py"), set()).add(name)
    return found


def undeclared(folder: str, always: dict[str, Any], inside_functions: dict[str, Any]) -> list[str]:
    """Returns the third-party imports of a folder that nothing declares."""
    scripts = (REPOSITORY / folder).rglob("*.py") if folder == "examples" else ()  # they import one another by stem
    own = {path.stem for path in scripts} | {"plasticity_peft", "tests"}
    wrong = []
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for module, outside in imported(path).items():
            if module in own or module in sys.stdlib_module_names or module == "__future__":
                continue
            allowed = always if outside else {**always, **inside_functions}
            if not providers().get(module, {canonicalize_name(module)}) & set(allowed):
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {module}")
    return wrong


@pytest.mark.parametrize(
    ("folder", "extras", "inside_functions"),
    [
        ("plasticity_peft", (), ("datasets", "plot")),
        ("examples", ("examples",), ()),
        ("tests", ("examples", "test", "plot", "quantization", "timm"), ()),
    ],
)
def test_every_import_is_declared(folder: str, extras: tuple[str, ...], inside_functions: tuple[str, ...]) -> None:
    # packaging comes with transformers, peft and pytest alike; tomllib, of Python 3.11, is tomli before
    tools = {} if folder == "plasticity_peft" else {"packaging": None, "tomllib": None, "tomli": None}
    # DeepSpeed is imported where it has spread a model, and is installed there.
    later = {**requirements(*inside_functions), "deepspeed": None}
    wrong = undeclared(folder, {**requirements(*extras), **tools}, later)
    assert not wrong, "; ".join(wrong)


def noxfile() -> ModuleType:
    """Returns noxfile.py, which needs nox only to run."""
    fake = ModuleType("nox")
    fake.Session, fake.options = object, ModuleType("options")
    fake.session = lambda function: function
    fake.parametrize = lambda *args, **kwargs: lambda function: function
    specification = importlib.util.spec_from_file_location("noxfile", REPOSITORY / "noxfile.py")
    module = importlib.util.module_from_spec(specification)
    before = sys.modules.get("nox")
    sys.modules["nox"] = fake
    try:
        specification.loader.exec_module(module)
    finally:
        sys.modules.pop("nox")
        if before is not None:
            sys.modules["nox"] = before
    return module


def test_the_workflow_runs_the_matrix_of_noxfile() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    rows = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert [(row["python"], row["versions"]) for row in rows] == noxfile().MATRIX


def test_the_matrix_covers_what_is_supported() -> None:
    nox = noxfile()
    assert {python for python, _ in nox.MATRIX} == set(PYTHONS)
    assert f">={PYTHONS[0]}" == PROJECT["requires-python"]
    assert {versions for _, versions in nox.MATRIX} == set(nox.VERSIONS)
    for file, instead in nox.VERSIONS.values():
        assert file is None or (REPOSITORY / file).is_file()
        for name, version in instead.items():
            assert {**DECLARED, **requirements("timm")}[name].specifier.contains(version), f"{name}=={version}"
    assert Version(nox.TRANSFORMERS_4["transformers"]).major == 4
    assert constraints("constraints.txt", "3.11")["transformers"].major == 5


def test_a_constraints_file_is_changed_where_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def create_tmp(self) -> str:
            return str(tmp_path)

    monkeypatch.chdir(REPOSITORY)
    nox = noxfile()
    path = nox.constraints(Session(), "constraints.txt", nox.TRANSFORMERS_4)
    found, before = constraints(str(path), "3.11"), constraints("constraints.txt", "3.11")
    changed = {name: str(version) for name, version in found.items() if version != before.get(name)}
    assert changed == nox.TRANSFORMERS_4
    assert set(found) == set(before)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_the_code_and_nothing_else(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in path.read_text()
    for name, job in workflow["jobs"].items():
        if "permissions" in job:  # the index trusts this job, which runs no code of the repository
            assert (path.name, job["permissions"], job["environment"]["name"]) == (
                "release.yml", {"id-token": "write"}, "pypi"
            )  # fmt: skip
            assert not any("run" in step or "checkout" in step["uses"] for step in job["steps"])
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, name
            # a value that is pasted into a script is run as a part of it
            assert "${{" not in step.get("run", ""), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_their_hash_with_the_tag_beside(path: Path) -> None:
    uses = re.findall(r"uses:\s*(.*)", path.read_text())
    assert uses
    for one in uses:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", one), one


def test_the_hook_and_the_constraints_have_one_ruff() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (ruff,) = (repo for repo in hooks["repos"] if "ruff" in repo["repo"])
    assert ruff["rev"] == f"v{constraints('constraints.txt')['ruff']}"
    assert set(requirements("quality")) - set(requirements()) == TOOLS
