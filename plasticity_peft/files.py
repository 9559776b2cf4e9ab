"""Files that are whole or not there: written in one step, and read only if they are what they must be."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

MOST_BYTES = 2**23
"""What a JSON file of ours may take: a thousand times what a large model needs, and memory for it is never short."""


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns what a JSON file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large, or no JSON as the standard has it: UTF-8, no NaN, and no key twice.
        RecursionError: it is nested too deeply.
    """
    with open(path, "rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    return json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_refuse)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it holds {double!r} twice in one object")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is no JSON")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 `text` to `path` in one step: a reader, or a crash, sees the old file or the new one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
