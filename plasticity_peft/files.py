"""Files that are whole or not there, whatever interrupts the writing: an error, a full disk, a killed process.

A file is written beside its place and then renamed, which file systems do in one step. Before that its content is sent
to the disk (fsync): some file systems find out only then that there is no room, and after a power cut a renamed file
could be empty. That the rename itself lasts is not waited for: without it the old file is there, whole.
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
    """Writes UTF-8 `text` to `path` in one step; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path` in one step: a reader, or a crash, sees the old file or the new one.

    Raises:
        FileError: it cannot be written; the message tells why. What was at `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"_{path.name}.{secrets.token_hex(4)}")  # Trainer publishes nothing with that "_"
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
    """Yields an empty folder, whose files move into `folder`, with their subfolders, when all have been written.

    The file named `last` is the one without which no reader takes the folder for what it is (adapter_config.json): an
    old one goes before the first file moves, and the new one moves last. So a process killed in between leaves a
    folder that is refused, not a mixture of two. An error while they are written leaves `folder` as it was.

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
        if error.errno != errno.EINVAL:  # of a file system that has no disk to write to
            raise


def _left(path: Path) -> str:
    return "What was there before is unchanged." if os.path.lexists(path) else "Nothing was left there."


def _remove(path: Path) -> None:
    with suppress(OSError):  # the folder is gone, or cannot be written to either
        path.unlink(missing_ok=True)
