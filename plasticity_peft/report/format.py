"""The JSON format of reports: its versions, and the errors of files that are not of this format.

A report file contains the fields of a `PlasticityReport`. The plasticity.json of an adapter contains the same fields,
and beside them what `plasticity_peft.saved.record` adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from plasticity_peft.checks import shown
from plasticity_peft.errors import ReportError

FORMAT = "plasticity_peft"
FORMAT_VERSION = 1


def current(values: object) -> dict[str, Any]:
    """Returns the values of a report file in the newest version of the format.

    Raises:
        ReportError: they are not those of a report, or are of a version that this release does not read.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise ReportError(f'it is not a plasticity report: "format" must be "{FORMAT}"')
    found = values.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise ReportError(
            f"it has format version {shown(found)}, and this release of plasticity_peft reads version {FORMAT_VERSION}"
        )
    return dict(values)


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
