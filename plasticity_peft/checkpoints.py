"""Checkpoints of a Trainer that are whole: from which a killed run may go on.

A Trainer writes a checkpoint file by file, trainer_state.json last, and then deletes old ones, file by file too. So a
killed run leaves folders that look like checkpoints and are not. There is nothing that a Trainer could mark them with
in time (its callback `on_save` runs after the old ones are gone): they are read instead.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from plasticity_peft.hub import REPORT_NAME
from plasticity_peft.report.report import PlasticityReport

logger = logging.get_logger(f"transformers.{__name__}")

STATE_NAME = "trainer_state.json"
NEEDED = (STATE_NAME, "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")


def last_whole_checkpoint(
    folder: str | os.PathLike[str], *, processes: int = 1, also: Iterable[str] = ()
) -> Path | None:
    """Returns the checkpoint in `folder` that was written last, of those that are whole; None where there is none.

    In place of `transformers.trainer_utils.get_last_checkpoint`, which takes the highest number, whole or not. The
    time of writing decides, for a folder may hold checkpoints of an earlier, longer run. Those left out are warned of,
    with the reason, and left alone.

    Args:
        folder: the `output_dir` of a Trainer of a PeftModel, which may not exist yet.
        processes: how many train together; each has a file with its random state.
        also: names of files that must be there too, such as "plasticity.json".

    Examples:
        >>> last_whole_checkpoint("no/such/folder") is None
        True
    """
    found: list[tuple[int, int, Path]] = []
    for path in Path(folder).glob("checkpoint-*"):
        reason = why_not_whole(path, processes=processes, also=also)
        if reason:
            logger.warning("%s is no whole checkpoint, and is left out: %s", path, reason)
        else:
            found.append(((path / STATE_NAME).stat().st_mtime_ns, _step(path), path))
    return max(found)[-1] if found else None


def why_not_whole(checkpoint: str | os.PathLike[str], *, processes: int | None = 1, also: Iterable[str] = ()) -> str:
    """Returns what is missing or damaged in a checkpoint; "" where it is whole.

    Every file is read: sizes and headers of safetensors, the check sums of what torch.save wrote, all of JSON. Nothing
    is unpickled. Arguments are those of `last_whole_checkpoint`; with `processes=None` the files of random states,
    without which a run goes on with other random numbers, may be missing.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes or 0)]
    for name in (*NEEDED, *states, *also):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    for path in sorted(checkpoint.iterdir()):
        check = CHECKS.get(path.suffix)
        try:
            if check is not None and path.is_file():
                check(path)
        except (OSError, ValueError, RecursionError, zipfile.BadZipFile, SafetensorError) as error:
            return f"{path.name} is damaged ({error})"
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
    if path.name == REPORT_NAME:
        PlasticityReport.from_dict(values)


def _check_safetensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        if not file.keys():
            raise ValueError("it holds no tensors")


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it does not have its check sum")


CHECKS: dict[str, Callable[[Path], None]] = {
    ".json": _check_json,
    ".safetensors": _check_safetensors,
    ".pt": _check_archive,
    ".pth": _check_archive,
    ".bin": _check_archive,
}
