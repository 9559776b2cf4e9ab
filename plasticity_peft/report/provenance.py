"""The origin of images, for reports and model cards. It contains no local paths."""

from __future__ import annotations

import re
from collections.abc import Sized
from dataclasses import dataclass
from typing import Annotated, Any

from plasticity_peft.constraints import Name, PositiveCount, allowed

REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
RepoId = Annotated[Name, allowed("must be the id of a dataset on the Hub", REPO_ID.fullmatch)]


@dataclass(frozen=True)
class Provenance:
    """The origin of images."""

    form: Name
    """Class of the images, such as "Dataset" or "Tensor"."""
    images: PositiveCount | None = None
    """Number of images; None for a stream."""
    name: Name | None = None
    """Name of the dataset, if it has one."""
    split: Name | None = None
    """Split of the dataset, such as "train"."""
    repo_id: RepoId | None = None
    """Id of the dataset on the Hub, if it was loaded from there."""

    def __str__(self) -> str:
        count = "a stream of images" if self.images is None else f"{self.images:,} images"
        split = f", split {self.split}" if self.split else ""
        return f"{self.repo_id or self.name or self.form}{split}: {count}"


def provenance_of(data: Any) -> Provenance | None:
    """Returns the origin of `data`, as far as it is known; None if `data` is None.

    A `datasets.Dataset` contains its name, its split and, if its download was verified, its repository on the Hub. For
    other data, only the class and the number of images are known. For a DataLoader, the origin is that of its dataset.

    Examples:
        >>> import torch
        >>> print(provenance_of(torch.rand(10, 3, 8, 8)))
        Tensor: 10 images
    """
    if data is None:
        return None
    data = data.dataset if hasattr(data, "collate_fn") else data
    info, split = getattr(data, "info", None), getattr(data, "split", None)
    return Provenance(
        form=type(data).__name__,
        images=_length(data),
        name=_short(getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)),
        split=None if split is None or callable(split) else _short(str(split)),  # tensors have a method of this name
        repo_id=_repo_id(info),
    )


def _length(data: Any) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over a stream has a __len__ that raises
        return None


def _short(name: Any) -> str | None:
    """Returns `name`, or None if it is a path or is not printable."""
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\x00-\x1f]{1,100}", name):
        return None
    return name if name.isprintable() else None


def _repo_id(info: Any) -> str | None:
    """Returns the id on the Hub in the addresses of the dataset's files; None if there is none, or more than one."""
    addresses = getattr(info, "download_checksums", None) or {}
    ids = {re.sub(r"^hf://datasets/([^@]+)@.*", r"\1", str(address)) for address in addresses}
    found = ids.pop() if len(ids) == 1 else ""
    return found if REPO_ID.fullmatch(found) else None
