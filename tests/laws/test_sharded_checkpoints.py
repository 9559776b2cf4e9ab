"""Checkpoints of FSDP: the metadata that torch writes is read without unpickling it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from plasticity_peft.checkpoints import _check_parts


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"model": {"a": torch.arange(300.0), "b": torch.ones(7, 5)}, "step": torch.tensor(3), "note": "text"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is one process
        checkpoint.save(state, checkpoint_id=tmp_path / "state", no_dist=True)
    return tmp_path / "state"


def test_a_whole_one_is_whole(saved: Path) -> None:
    _check_parts(saved / ".metadata")


def test_a_part_that_is_missing_or_cut_is_named(saved: Path) -> None:
    (part,) = saved.glob("*.distcp")
    text = part.read_bytes()
    part.write_bytes(text[:-1])
    with pytest.raises(ValueError, match=rf"{part.name} has {len(text) - 1} bytes, of {len(text)}"):
        _check_parts(saved / ".metadata")
    part.unlink()
    with pytest.raises(ValueError, match=f"there is no {part.name}"):
        _check_parts(saved / ".metadata")


def test_metadata_that_is_cut_or_another_file_is_refused(saved: Path) -> None:
    text = (saved / ".metadata").read_bytes()
    for length in range(0, len(text) - 1, 37):
        (saved / ".metadata").write_bytes(text[:length])
        with pytest.raises(ValueError):  # noqa: PT011  # pickletools has many messages
            _check_parts(saved / ".metadata")
    (saved / ".metadata").write_bytes(b"N.")
    with pytest.raises(ValueError, match="names no files"):
        _check_parts(saved / ".metadata")
