"""The JSON format of reports: its versions, and the errors of files that are not of this format.

A report file contains the fields of a `PlasticityReport`. The plasticity.json of an adapter contains the same fields
and those of `plasticity_peft.saved.record.AdapterRecord`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from plasticity_peft.checks import shown
from plasticity_peft.errors import ReportError

FORMAT = "plasticity_peft"
VERSION = 2

# The keys that version 2 renamed.
_REPORT = {
    "pairs": "samples",
    "source": "uses_source",
    "target_data": "target_provenance",
    "source_data": "source_provenance",
}
_ROW = {"pairs": "samples"}
_ENDING = {"most": "planned"}


def current(values: object) -> dict[str, Any]:
    """Returns the values of a report file in the newest version of the format. Older versions are converted.

    Raises:
        ReportError: they are not a report, or have a version that this release does not read.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise ReportError(f'it is not a plasticity report: "format" must be "{FORMAT}"')
    found = values.get("format_version")
    if type(found) is not int or not 1 <= found <= VERSION:
        raise ReportError(
            f"it has format version {shown(found)}, and this release of plasticity_peft reads versions 1 to {VERSION}"
        )
    return dict(values) if found == VERSION else _from_version_1(values)


def _from_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values of version 1 in version 2. Values of a wrong type are left for validation."""
    new = {**_renamed(values, _REPORT), "format_version": VERSION}
    for name in ("scores", "kinds"):
        rows = new.get(name)
        if isinstance(rows, (list, tuple)):
            new[name] = [_renamed(row, _ROW) for row in rows]
    for name, keys in (("ending", _ENDING), ("adapter", {})):
        if isinstance(new.get(name), Mapping):
            section = _renamed(new[name], keys)
            new[name] = {**section, "granularity": "component"} if section.get("granularity") == "block" else section
    return new


def _renamed(values: Any, keys: Mapping[str, str]) -> Any:
    """Returns a dictionary under its new keys; anything else as it is."""
    if not isinstance(values, Mapping):
        return values
    return {keys.get(key, key): value for key, value in values.items()}


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Inside, an error of reading a file becomes a ReportError that contains the `name` of the file."""
    try:
        yield
    except ReportError as error:
        raise ReportError(f"Cannot read {name}: {error}.") from error
    except OSError as error:
        raise ReportError(f"Cannot read {name}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"Cannot read {name}: it is not a whole JSON file ({error}).") from error
