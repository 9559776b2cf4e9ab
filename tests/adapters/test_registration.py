"""PEFT knows `PlasticityConfig`, whatever is imported first, and only once it is needed."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

from plasticity_peft import PlasticityConfig, registration
from plasticity_peft.registration import PEFT_TYPE, register_when_peft_is_imported
from tests.support.forking import TRANSFORMERS, run_code

LOAD = """
import sys
assert "peft" not in sys.modules
{imports}
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
table = PEFT_TYPE_TO_CONFIG_MAPPING
assert "plasticity_peft.adapters" not in sys.modules  # it is imported when PEFT needs it
if {through_the_class}:
    config = table["PLASTICITY"].from_pretrained(sys.argv[1])
else:
    config = PeftConfig.from_pretrained(sys.argv[1])
assert (type(config).__name__, config.criterion, config.top_k) == ("PlasticityConfig", "bound", 3), config
from plasticity_peft import PlasticityConfig
assert type(config) is PlasticityConfig is table["PLASTICITY"]
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that was saved before the components were selected."""
    folder = tmp_path_factory.mktemp("config")
    PlasticityConfig(training="lora", criterion="bound", top_k=3).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("imports", "through_the_class"),
    [
        ("import plasticity_peft", False),
        pytest.param("import peft, plasticity_peft", True, marks=pytest.mark.slow),
        pytest.param("from plasticity_peft import measure_plasticity", False, marks=pytest.mark.slow),
    ],
)
def test_a_saved_config_is_loaded_by_peft(imports: str, through_the_class: bool, saved: Path, tmp_path: Path) -> None:
    script = LOAD.format(imports=imports, through_the_class=through_the_class)
    result = run_code(script, saved, folder=tmp_path, parent=TRANSFORMERS)
    assert result.returncode == 0, result.stderr


def test_the_class_itself_is_in_the_tables(saved: Path) -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is PlasticityConfig  # type: ignore[index]
    assert type(PeftConfig.from_pretrained(str(saved))) is PlasticityConfig


class Loader:
    """Loads a PEFT that has nothing but its table."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.PEFT_TYPE_TO_CONFIG_MAPPING = {}  # type: ignore[attr-defined]


class Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, Loader()) if name == "peft" else None  # type: ignore[arg-type]


def test_the_stand_in_is_the_class_in_all_that_peft_does_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(), Finder(), *sys.meta_path])  # one is of an old kind
    register_when_peft_is_imported()
    import peft

    stand_in = peft.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE]
    assert stand_in is not PlasticityConfig
    assert stand_in(criterion="bound") == PlasticityConfig(criterion="bound")
    assert stand_in.from_pretrained.__func__ is PlasticityConfig.from_pretrained.__func__
    with pytest.raises(AttributeError, match="no_such_method"):
        _ = stand_in.no_such_method


def test_a_peft_that_is_missing_is_still_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr(sys, "meta_path", [])
    register_when_peft_is_imported()
    with pytest.raises(ModuleNotFoundError, match="No module named 'peft'"):
        import peft  # noqa: F401


def test_the_class_is_not_replaced_by_the_stand_in() -> None:
    register_when_peft_is_imported()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is PlasticityConfig  # type: ignore[index]
    assert registration.PEFT_TYPE == "PLASTICITY"
