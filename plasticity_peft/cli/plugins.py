"""`--plugin`: the user's own criteria and architectures on the command line.

This executes the code of the modules that the user names, and no other code. Shell completion executes nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import typer

from plasticity_peft.errors import ConfigError


def load_plugins(context: typer.Context, names: list[str] | None) -> list[str] | None:
    """Imports the modules that `--plugin` names. They call `register_criterion` or `register_architecture`."""
    if not context.resilient_parsing:  # True during shell completion
        for name in names or ():
            load_plugin(name)
    return names


def load_plugin(name: str) -> None:
    """Imports a module by its name, or from a .py file. A module that was imported before is not executed again.

    Raises:
        ConfigError: the module or file does not exist. An error inside the module is raised unchanged.
    """
    if name.endswith(".py"):
        _load_file(Path(name))
        return
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but a module that it imports does not
        raise ConfigError(
            f"--plugin must be the name of a module that Python can import, or the path of a .py file. Got {name}: "
            f"{error}."
        ) from error


def _load_file(path: Path) -> None:
    path = path.resolve()
    spec = spec_from_file_location(f"plugin {path}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"--plugin must be the path of a .py file, or the name of a module. {path} does not exist.")
    if spec.name in sys.modules:
        return
    module = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
