"""Files that are whole or absent, even if an error, a full disk or a kill interrupts the writing.

A file is written under another name and then renamed, which file systems do in one step. Before that, its content is
sent to the disk (fsync). Some file systems only notice then that the disk is full, and after a power cut a renamed
file could be empty. The rename itself is not sent to the disk: if it is lost, the old file is there, whole.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plasticity_peft.errors import FileError

MOST_BYTES = 2**23
"""Largest size of a JSON file of an adapter. It is a thousand times what a large model needs, and fits into memory."""


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns the content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too large, or is not standard JSON: it is not UTF-8, or contains NaN or a key twice.
        RecursionError: the content is nested too deeply.
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
        raise ValueError(f"it contains {double!r} twice in one object")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"it contains {constant}, which is not JSON")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 `text` to `path` in one step; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path` in one step, so a reader sees either the old file or the new one.

    Raises:
        FileError: the file cannot be written; the message contains the reason. An old file at `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f"_{path.name}.{secrets.token_hex(4)}")  # Trainer does not publish names with "_"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with open(temporary, "xb") as file:
            file.write(content)
            _to_disk(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(error.errno, f"Cannot write {path}: {reason}. {_left(path)}") from error
    finally:
        _remove(temporary)


@contextmanager
def replaced_when_whole(folder: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """Yields an empty folder. At the end its files move into `folder`, with their subfolders.

    `last` names the file that marks the folder as complete, such as "adapter_config.json". It is removed first and
    moved into place last. So a process that is killed in between leaves a folder that readers refuse, and not a
    mixture of old and new files. An error before the end leaves `folder` as it was.

    Args:
        folder: folder that receives the files. It is created if it does not exist.
        last: name of the file that marks the folder as complete.

    Yields:
        The folder to write into.

    Examples:
        >>> folder = tempfile.mkdtemp()
        >>> with replaced_when_whole(folder, last="adapter_config.json") as new:
        ...     _ = (new / "adapter_config.json").write_text("{}")
        >>> os.listdir(folder)
        ['adapter_config.json']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="_unfinished-", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)
        written = sorted(
            (path for path in Path(temporary).rglob("*") if path.is_file()), key=lambda path: path.name == last
        )
        for path in written:
            with open(path, "rb+") as file:
                _to_disk(file.fileno())
        places = [folder / path.relative_to(temporary) for path in written]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_name(last).unlink(missing_ok=True)
        for path, place in zip(written, places, strict=True):
            os.replace(path, place)


def _to_disk(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system has no disk
            raise


def _left(path: Path) -> str:
    return "The old file is unchanged." if os.path.lexists(path) else "No file was left there."


def _remove(path: Path) -> None:
    with suppress(OSError):  # the folder is gone, or cannot be written to either
        path.unlink(missing_ok=True)
