"""What is published: the page of the index, the version, and what a release is checked for."""

from __future__ import annotations

import importlib.util
import re
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import plasticity_peft
from tests.support import release
from tests.support.models import REPOSITORY

TEMPLATES = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook of the build, without hatchling, which is installed for a build alone."""
    interface = ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    specification = importlib.util.spec_from_file_location("hatch_build", REPOSITORY / "hatch_build.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_links_of_the_readme_work_outside_of_the_repository(hook: ModuleType) -> None:
    text = (REPOSITORY / "README.md").read_text()
    address = "https://forge.example/owner/name"
    found = re.findall(r"\]\(([^)]*)\)", hook.with_absolute_links(text, address))
    assert len(found) == len(re.findall(r"\]\(", text)) > 15
    for link in found:
        assert link.startswith("https://")
        path = link.removeprefix(f"{address}/blob/main/").removeprefix(f"{address}/raw/main/").partition("#")[0]
        assert not link.startswith(address) or (REPOSITORY / path).is_file(), link
    assert hook.with_absolute_links("![a](b/c.png) [d](#e) [f](mailto:g@h)", address) == (
        f"![a]({address}/raw/main/b/c.png) [d](#e) [f](mailto:g@h)"
    )


def test_the_address_of_the_repository_is_one_setting(hook: ModuleType) -> None:
    setting = re.search(r'^repository = "(.*?)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert sum(address.startswith(setting) for address in hook.urls(setting).values()) == 4
    tracked = [REPOSITORY / name for name in ("README.md", "mkdocs.yml", "CITATION.cff", "CONTRIBUTING.md")]
    assert not any(setting in path.read_text() for path in tracked)
    assert hook.PLACEHOLDER == release.PLACEHOLDER


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == plasticity_peft.__version__
    entry = f"## [{plasticity_peft.__version__}] - {citation['date-released']}"
    assert entry in (REPOSITORY / "CHANGELOG.md").read_text().splitlines()


def wheel(folder: Path, version: str, address: str) -> None:
    folder.mkdir()
    (folder / "a.tar.gz").touch()
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        archive.writestr(
            f"plasticity_peft-{version}.dist-info/METADATA",
            f"Metadata-Version: 2.4\nName: plasticity_peft\nVersion: {version}\nProject-URL: Homepage, {address}\n",
        )


def test_a_release_is_refused_for_what_is_wrong(tmp_path: Path) -> None:
    version, good = plasticity_peft.__version__, "https://forge.example/owner/name"
    wheel(tmp_path / "good", version, good)
    assert release.faults(f"v{version}", tmp_path / "good") == []
    (fault,) = release.faults("v9.9.9", tmp_path / "good")
    assert "The tag is v9.9.9" in fault
    wheel(tmp_path / "placeholder", version, f"{release.PLACEHOLDER}plasticity_peft")
    (fault,) = release.faults(f"v{version}", tmp_path / "placeholder")
    assert "is a placeholder" in fault
    wheel(tmp_path / "undated", "9.9.9", good)
    (fault,) = release.faults("v9.9.9", tmp_path / "undated")
    assert "no entry with a date for 9.9.9" in fault
    (tmp_path / "good" / "a.tar.gz").unlink()
    (fault,) = release.faults(f"v{version}", tmp_path / "good")
    assert "one wheel and one source distribution" in fault


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_have_what_the_forge_asks_for(path: Path) -> None:
    template = yaml.safe_load(path.read_text())
    assert template["name"]
    assert template["description"]
    for field in template["body"]:
        assert field["type"] in ("textarea", "input")
        assert field["attributes"]["label"]


def test_every_example_is_described() -> None:
    text = (REPOSITORY / "examples" / "README.md").read_text()
    scripts = [path.name for path in (REPOSITORY / "examples").iterdir() if path.suffix in (".py", ".ipynb")]
    assert [name for name in scripts if name not in text] == []
