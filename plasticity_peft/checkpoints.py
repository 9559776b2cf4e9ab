"""Whole checkpoints of a Trainer: those from which a killed run can continue.

A Trainer writes a checkpoint file by file, trainer_state.json last, and then deletes old checkpoints, also file by
file. So a killed run leaves folders that look like checkpoints and are not. A Trainer cannot mark whole checkpoints in
time, as its callback `on_save` runs after the old ones are gone. So all files of a checkpoint are read.

FSDP and DeepSpeed write the state of the optimizer in forms of their own, possibly in parts, one for each process.
Each of them writes a last file that names or implies the others: `.metadata` and `latest`.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from transformers.utils import logging

from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.hub import CONFIG_NAME, WEIGHTS_NAME
from plasticity_peft.saved.record import AdapterRecord
from plasticity_peft.saved.weights import read_header

logger = logging.get_logger(f"transformers.{__name__}")

STATE_NAME = "trainer_state.json"
OF_THE_OPTIMIZER = ("optimizer.pt", "scheduler.pt")
OF_AN_ADAPTER = (CONFIG_NAME, WEIGHTS_NAME)
OF_FSDP = ("pytorch_model_fsdp", "optimizer")
"""What FSDP saves: each is a file, name.bin, or a folder, name_0, with a part for each process."""
OF_DEEPSPEED = "latest"
"""The file that DeepSpeed writes last. It contains the name of the folder with the states of all processes."""


def last_whole_checkpoint(
    folder: str | os.PathLike[str],
    *,
    processes: int = 1,
    also: Iterable[str] = (),
    save_only_model: bool = False,
    set_aside: bool = False,
) -> Path | None:
    """Returns the whole checkpoint in `folder` that was written last, or None if there is none.

    It replaces `transformers.trainer_utils.get_last_checkpoint`, which returns the checkpoint with the highest number,
    whole or not. Here the time of writing decides, as a folder may contain checkpoints of an earlier, longer run.
    Every checkpoint that is not whole is ignored, with a warning that contains the reason.

    A checkpoint of another number of processes is whole. Training goes on from it, and draws other random numbers than
    an uninterrupted run, which a warning says. Only DeepSpeed cannot go on with another number.

    The checkpoints may be those of one process, of DDP, FSDP or DeepSpeed.

    Args:
        folder: the `output_dir` of a Trainer of a PeftModel. It need not exist.
        processes: number of processes that train together. Each has a file with its random state.
        also: names of further files that a whole checkpoint has, such as "plasticity.json".
        save_only_model: the argument of the Trainer with this name. If True, checkpoints need no optimizer, scheduler
            and random states. A Trainer that continues from such a checkpoint starts with a new optimizer.
        set_aside: True renames checkpoints that are not whole, to "not-whole-checkpoint-28" for example, so that a
            Trainer neither writes over them nor deletes them. If several processes train, only one may do this.

    Raises:
        ConfigError: the last whole checkpoint is that of DeepSpeed, and of another number of processes.

    Examples:
        >>> last_whole_checkpoint("no/such/folder") is None
        True
    """
    found: list[tuple[int, int, Path]] = []
    for path in list(Path(folder).glob("checkpoint-*")):
        reason = why_not_whole(path, processes=processes, also=also, save_only_model=save_only_model)
        if reason:
            logger.warning("%s is not a whole checkpoint and is ignored: %s", path, reason)
            if set_aside:
                _set_aside(path)
        else:
            found.append(((path / STATE_NAME).stat().st_mtime_ns, _step(path), path))
    last = max(found)[-1] if found else None
    if last is not None:
        check_processes(last, processes)
    if last is not None and not save_only_model and _writers(last) != processes:
        logger.warning(
            "%s was written by %d processes, and %d go on from it. They draw other random numbers than an "
            "uninterrupted run.", last, _writers(last), processes,
        )  # fmt: skip
    return last


def check_processes(checkpoint: str | os.PathLike[str], processes: int) -> None:
    """Raises ConfigError if a whole checkpoint cannot be continued from with this number of processes."""
    checkpoint = Path(checkpoint)
    if (checkpoint / OF_DEEPSPEED).is_file() and _writers(checkpoint) not in (0, processes):
        raise ConfigError(
            f"{checkpoint} was written by {_writers(checkpoint)} processes with DeepSpeed, which continues only with "
            f"as many. Got {processes}. Start {_writers(checkpoint)} processes, or convert the checkpoint with "
            "DeepSpeed's ds_to_universal.py."
        )


def _set_aside(checkpoint: Path) -> None:
    name = f"not-whole-{checkpoint.name}"
    places = (checkpoint.with_name(f"{name}-{number}" if number else name) for number in count())
    checkpoint.rename(next(place for place in places if not place.exists()))


def why_not_whole(
    checkpoint: str | os.PathLike[str],
    *,
    processes: int | None = 1,
    also: Iterable[str] = (),
    save_only_model: bool = False,
) -> str:
    """Returns what is missing or damaged in a checkpoint, or "" if it is whole.

    Every file is read: sizes and headers of safetensors, the checksums of what torch.save wrote, and all of JSON.
    Nothing is unpickled: of a pickle, the instructions are read, and not carried out.

    Args:
        checkpoint: folder of the checkpoint.
        processes: see `last_whole_checkpoint`. None accepts a checkpoint without random states; a run that continues
            from it draws other random numbers.
        also: see `last_whole_checkpoint`.
        save_only_model: see `last_whole_checkpoint`.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    adapters = _adapters_in(checkpoint)
    missing = [] if (checkpoint / STATE_NAME).is_file() else [STATE_NAME]
    missing += [] if save_only_model else _missing_of_the_optimizer(checkpoint)
    if processes is not None and not save_only_model and not _writers(checkpoint):
        missing += [name for name in _states(processes) if not (checkpoint / name).is_file()]
    missing += [name for folder in adapters for name in OF_AN_ADAPTER if not (folder / name).is_file()]
    missing += [name for name in also if not any((folder / name).is_file() for folder in {checkpoint, *adapters})]
    if missing:
        return f"it has no {missing[0]}"
    folders = dict.fromkeys((checkpoint, *adapters, *_with_states(checkpoint)))
    return next((reason for folder in folders if (reason := _damage(folder))), "")


def _missing_of_the_optimizer(checkpoint: Path) -> list[str]:
    """Returns which files with the state of the optimizer are missing."""
    names = {path.name for path in checkpoint.iterdir()}
    if OF_DEEPSPEED in names or any(name.startswith("global_step") for name in names):
        return _missing_of_deepspeed(checkpoint)  # which may have a scheduler of its own
    if any(name.startswith(OF_FSDP[0]) for name in names):
        missing = [] if "scheduler.pt" in names else ["scheduler.pt"]
        return missing + [file for name in OF_FSDP for file in _missing_of_fsdp(checkpoint, name)]
    return [name for name in OF_THE_OPTIMIZER if name not in names]


def _missing_of_deepspeed(checkpoint: Path) -> list[str]:
    if not (checkpoint / OF_DEEPSPEED).is_file():
        return [OF_DEEPSPEED]
    folder = checkpoint / (checkpoint / OF_DEEPSPEED).read_text(encoding="utf-8").strip()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not any(name.endswith("model_states.pt") for name in names):
        return [f"{folder.name}/*model_states.pt"]
    parts = [match for name in names if (match := re.fullmatch(r"(.*zero_pp_rank_)(\d+)(_.*)", name))]
    ranks = range(max(_writers(checkpoint), *(int(match[2]) + 1 for match in parts))) if parts else range(0)
    expected = {f"{match[1]}{rank}{match[3]}" for match in parts for rank in ranks}
    return [f"{folder.name}/{name}" for name in sorted(expected - names)]


def _missing_of_fsdp(checkpoint: Path, name: str) -> list[str]:
    if (checkpoint / f"{name}.bin").is_file():
        return []
    folder = checkpoint / f"{name}_0"
    if not (folder / ".metadata").is_file():
        return [f"{folder.name}/.metadata"]
    return []


def _with_states(checkpoint: Path) -> list[Path]:
    """Returns the folders in which DeepSpeed and FSDP saved their states."""
    patterns = ("global_step*", *(f"{name}_0" for name in OF_FSDP))
    return [path for pattern in patterns for path in sorted(checkpoint.glob(pattern)) if path.is_dir()]


def _states(processes: int) -> list[str]:
    """Returns the names of the files with the random states of so many processes."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]


def _has_states(checkpoint: Path, processes: int) -> bool:
    return all((checkpoint / name).is_file() for name in _states(processes))


def _writers(checkpoint: Path) -> int:
    """Returns how many processes wrote their random states; 0 if there are none, or one is missing."""
    if _has_states(checkpoint, 1):
        return 1
    written = len(list(checkpoint.glob("rng_state_*.pth")))
    return written if written > 1 and _has_states(checkpoint, written) else 0


def _adapters_in(checkpoint: Path) -> list[Path]:
    """Returns the folders of the adapters: PEFT saves "default" beside the state, and others below their names."""
    below = [path for path in sorted(checkpoint.iterdir()) if any((path / name).is_file() for name in OF_AN_ADAPTER)]
    beside = any((checkpoint / name).is_file() for name in OF_AN_ADAPTER)
    return [checkpoint, *below] if beside or not below else below


def _damage(folder: Path) -> str:
    """Returns which file of a folder is damaged, and how; "" if none is."""
    for path in sorted(folder.iterdir()):
        check = CHECKS.get(path.suffix or path.name)
        try:
            if check is not None and path.is_file():
                check(path)
        except (OSError, ValueError, RecursionError, EOFError, TypeError, zipfile.BadZipFile) as error:
            return f"{path.name} is damaged ({error})"
    try:
        AdapterRecord.find(folder)
    except ReportError as error:
        return str(error)
    return ""


def _step(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def _check_json(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    if path.name == STATE_NAME:
        step = values.get("global_step") if isinstance(values, dict) else None
        if step != _step(path.parent):
            raise ValueError(f"it was written at step {step}")


def _check_safetensors(path: Path) -> None:
    if not read_header(path, path.parent.name):
        raise ValueError("it contains no tensors")


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it does not have its checksum")


OF_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG1", "LONG4")
NUMBERS_AND_TEXTS = (*OF_NUMBERS, "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
"""Instructions of a pickle that hold a number or a text."""


def _values_in(path: Path) -> Iterator[Any]:
    """Yields the numbers and texts of a pickle in their order. Its instructions are read, and not carried out.

    Raises:
        ValueError: it is cut off, or no pickle.
    """
    memo: dict[int, Any] = {}
    last: Any = None
    for code, argument, _ in pickletools.genops(path.read_bytes()):
        if code.name == "MEMOIZE":
            memo[len(memo)] = last
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = last
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            last = memo.get(int(str(argument)))
            yield last
        else:
            last = argument if code.name in NUMBERS_AND_TEXTS else None
            if last is not None:
                yield last


def _parts_in(path: Path) -> Iterator[dict[str, Any]]:
    """Yields "relative_path", "offset" and "length" of each tensor that the metadata of FSDP names."""
    found: dict[str, Any] = {}
    values = _values_in(path)
    for value in values:
        if value in ("relative_path", "offset", "length"):
            found[value] = next(values, None)
        if len(found) == 3:
            yield found
            found = {}


def _check_parts(path: Path) -> None:
    """Raises ValueError unless the files that the metadata of FSDP name have the sizes that they tell."""
    parts = list(_parts_in(path))
    if not parts:
        raise ValueError("it names no files")
    for part in parts:
        due, held = part["offset"] + part["length"], path.with_name(part["relative_path"])
        if not held.is_file():
            raise ValueError(f"there is no {held.name}")
        if held.stat().st_size < due:
            raise ValueError(f"{held.name} has {held.stat().st_size} bytes, of {due}")


CHECKS: dict[str, Callable[[Path], None]] = {
    ".metadata": _check_parts,
    ".json": _check_json,
    ".safetensors": _check_safetensors,
    ".pt": _check_archive,
    ".pth": _check_archive,
    ".bin": _check_archive,
}
