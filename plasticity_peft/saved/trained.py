"""The facts about an adapter for its model card, read from its files or taken from the live model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.models.auto import modeling_auto

from plasticity_peft.errors import AdapterError
from plasticity_peft.hub import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME, find_json
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection
from plasticity_peft.saved.record import AdapterRecord, Results, present_results, reading_record
from plasticity_peft.saved.weights import read_header

TASKS = {
    "depth-estimation": ("DEPTH_ESTIMATION",),
    "image-classification": ("IMAGE_CLASSIFICATION",),
    "image-segmentation": (
        "SEMANTIC_SEGMENTATION",
        "INSTANCE_SEGMENTATION",
        "UNIVERSAL_SEGMENTATION",
        "IMAGE_SEGMENTATION",
    ),
    "image-text-to-text": ("IMAGE_TEXT_TO_TEXT",),
    "mask-generation": ("MASK_GENERATION",),
    "object-detection": ("OBJECT_DETECTION",),
    "video-classification": ("VIDEO_CLASSIFICATION",),
    "zero-shot-image-classification": ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
    "zero-shot-object-detection": ("ZERO_SHOT_OBJECT_DETECTION",),
}
"""Tasks as the Hub names them, and as transformers does in its tables of classes."""
LABELED = ("image-classification", "image-segmentation", "object-detection", "video-classification")
"""Tasks of which a head has one output for each label."""


def task_of(class_name: str | None) -> str | None:
    """Returns what a class of transformers is for, as the Hub names it; None if it is none of `TASKS`.

    Examples:
        >>> task_of("SegformerForSemanticSegmentation"), task_of("CLIPModel"), task_of("ViTModel")
        ('image-segmentation', 'zero-shot-image-classification', None)
    """
    for task, names in TASKS.items():
        tables = (getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}) for name in names)
        classes = {each for table in tables for value in table.values() for each in _several(value)}
        if class_name in classes:
            return task
    return None


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """Returns the classes of a model type in a table of transformers, which has one or several."""
    return (names,) if isinstance(names, str) else tuple(names)


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter of this package."""

    report: PlasticityReport
    selection: Selection
    training: str
    """"lora" or "full"."""
    saved_parameters: int
    """Number of trained parameters, including the head."""
    base_model: str | None = None
    """Hub name or folder of the base model."""
    base_class: str | None = None
    """Class of the base model, if it is one of transformers."""
    id2label: Mapping[int, str] | None = None
    """Names of the labels; None for a model without a head."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of LoRA: r, lora_alpha, ..."""
    has_image_processor: bool = False
    """True if an image processor is saved with the adapter."""
    results: tuple[Results, ...] = ()
    """Metrics of its weights."""
    name: str = "default"
    """Name of the adapter in its model. Its files are in a folder of this name, except for "default"."""

    @property
    def task(self) -> str | None:
        """What the model is for, as the Hub names it; None if it is not known, as for a model without a head."""
        return task_of(self.base_class)

    @property
    def has_labels(self) -> bool:
        """Whether the model has a head with one output for each label."""
        return self.id2label is not None and self.task in LABELED

    @property
    def classifies_images(self) -> bool:
        """Whether the model has a head for image classification."""
        return self.id2label is not None and "ForImageClassification" in (self.base_class or "")

    @property
    def hub_model(self) -> str | None:
        """The base model, if its name can be a repository on the Hub."""
        return self.base_model if is_hub_id(self.base_model) else None

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> TrainedAdapter:
        """Returns the adapter that was saved in `folder`.

        Raises:
            AdapterError: the folder does not contain an adapter.
            ReportError: plasticity.json is missing or damaged.
        """
        if not os.path.isdir(folder):
            raise AdapterError(f"The folder {os.fspath(folder)} does not exist.")
        record = AdapterRecord.read(folder)
        with reading_record(folder):
            described = record.described()
        config = find_json(folder, CONFIG_NAME, AdapterError)
        if config is None:
            raise AdapterError(f"No {CONFIG_NAME} in {os.fspath(folder)}. A folder without it is not an adapter.")
        header = read_header(Path(folder, WEIGHTS_NAME), os.fspath(folder))
        found = config.get("auto_mapping")
        mapping = found if isinstance(found, Mapping) else {}
        library = str(mapping.get("parent_library"))
        return cls(
            report=record.report,
            selection=described.selection,
            training=described.training,
            saved_parameters=sum(math.prod(entry.shape) for entry in header.values()),
            base_model=config.get("base_model_name_or_path"),
            base_class=mapping.get("base_model_class") if library.startswith("transformers.") else None,
            id2label=described.id2label,
            options=config,
            has_image_processor=Path(folder, PROCESSOR_NAME).is_file(),
            results=present_results(folder),
        )


def is_hub_id(name: str | None) -> bool:
    """Returns whether `name` can be a repository on the Hub and is not a local file or folder.

    Examples:
        >>> is_hub_id("google/vit-base-patch16-224-in21k"), is_hub_id("/home/me/vit"), is_hub_id("")
        (True, False, False)
    """
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
