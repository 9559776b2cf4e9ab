"""Adds `PlasticityConfig` to PEFT's table of configs, without importing PEFT.

`PeftConfig.from_pretrained` finds the class of a saved config in that table. So `import plasticity_peft` has to change
the table, whether PEFT is imported before or after it. A stand-in is added as soon as PEFT is imported; it imports
`PlasticityConfig` when PEFT uses it. `plasticity_peft.adapters` replaces the stand-in by the class.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

PEFT_TYPE = "PLASTICITY"
"""The `peft_type` in the file of a config whose components are not selected yet. In memory the `peft_type` is LORA.

`task_type` also has this value until the model is adapted, unless the user gives a task type. PEFT finds the class of
the adapted model by it.
"""


class _Later(type):
    """Metaclass of a class that behaves as `PlasticityConfig` in everything that PEFT does with it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _config_class()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(_config_class(), name)


class _StandIn(metaclass=_Later):
    """`PlasticityConfig`, imported on first use."""


def _config_class() -> Any:
    import plasticity_peft

    return plasticity_peft.PlasticityConfig


class _PeftFinder:
    """Finds PEFT as the other finders do, and adds the stand-in once PEFT has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Returns the spec of PEFT, which adds the stand-in when it is executed; None for all other modules."""
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute(exec_module: Any, module: Any) -> None:
    exec_module(module)
    _add_stand_in(module)


def _add_stand_in(peft: Any) -> None:
    peft.PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(PEFT_TYPE, _StandIn)


def register_when_peft_is_imported() -> None:
    """Adds the stand-in now if PEFT is imported already, and else as soon as it is."""
    if "peft" in sys.modules:
        _add_stand_in(sys.modules["peft"])
    else:
        sys.meta_path.insert(0, _PeftFinder())
