"""Packages that only some uses need. They belong to extras, and are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from plasticity_peft.errors import MissingExtraError


def require(package: str, *, extra: str, purpose: str) -> ModuleType:
    """Returns the module `package`, which `purpose` needs and which the extra `extra` installs.

    Raises:
        MissingExtraError: it cannot be imported; the message contains the command that installs it.

    Examples:
        >>> require("json", extra="json", purpose="Reading JSON").__name__
        'json'
        >>> require("no_such_package", extra="json", purpose="Reading JSON")
        Traceback (most recent call last):
            ...
        plasticity_peft.errors.MissingExtraError: Reading JSON needs no_such_package, which cannot be imported (No \
module named 'no_such_package'). Install it: pip install "plasticity_peft[json]"
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {package}, which cannot be imported ({error}). Install it: pip install "
            f'"plasticity_peft[{extra}]"'
        ) from error
