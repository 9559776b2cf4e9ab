"""Loads models by name: with weights, to measure them, or without, to inspect their modules."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as WITH_HEAD
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.heads import within
from plasticity_peft.errors import ModelError

logger = transformers_logging.get_logger(f"transformers.{__name__}")

NOT_LOADED = (OSError, ValueError, KeyError, HFValidationError)
"""The errors of transformers for a name, a folder or a type that it cannot load."""


def load_model(name: str, labels: list[str] | None, *, revision: str | None = None) -> nn.Module:
    """Returns the pretrained model `name`, with an image classification head if its type has one.

    If `labels` are known, the head is for them, as in finetuning. New weights depend on torch's random state.

    Raises:
        ModelError: the model does not exist, or transformers cannot load it.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main")
        auto = AutoModelForImageClassification if has_head(config) else AutoModel
        options: dict[str, Any] = {"ignore_mismatched_sizes": True}
        if auto is AutoModelForImageClassification and labels:
            options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        with without_load_report():
            model, info = auto.from_pretrained(
                name, revision=revision or "main", dtype=torch.float32, output_loading_info=True, **options
            )
    except NOT_LOADED as error:
        raise ModelError(f"Cannot load the model {name}: {error}") from error
    warn_of_random(name, model, info)
    found: nn.Module = model
    return found


@contextmanager
def without_load_report() -> Iterator[None]:
    """Inside, transformers does not print which weights it found, unless its verbosity is "info" or more."""
    verbosity = transformers_logging.get_verbosity()
    if verbosity > logging.INFO:
        transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def warn_of_random(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Warns of weights outside of the head that the checkpoint lacks. A new head is what finetuning begins with."""
    try:
        heads = find_architecture(model).heads
    except ModelError:  # the command says so, unless the user names one of several backbones
        heads = ()
    rows = [*info["missing_keys"], *(row[0] for row in info["mismatched_keys"])]
    missing = sorted(row for row in rows if not any(within(row, head) for head in heads))
    if missing:
        logger.warning("%s has no weights for %s, which are random.", name, ", ".join(missing))


def blank_model(name: str, revision: str | None = None) -> nn.Module:
    """Returns the model `name` without weights. Its modules have the names of this release of transformers.

    Raises:
        ModelError: the model does not exist, or transformers cannot build it.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main")
        auto = AutoModelForImageClassification if has_head(config) else AutoModel
        with init_empty_weights():
            model: nn.Module = auto.from_config(config)  # type: ignore[no-untyped-call]
    except NOT_LOADED as error:
        raise ModelError(f"Cannot build the model {name}: {error}") from error
    return model


def has_head(config: Any) -> bool:
    """Returns whether transformers has an image classification model for this config."""
    return type(config) in WITH_HEAD


def load_processor(name: str, image_size: int | None = None, revision: str | None = None) -> Any:
    """Returns the image processor of the model, for square images of `image_size` pixels if it is given.

    Raises:
        ModelError: the model has no image processor.
    """
    size: dict[str, Any] = {}
    if image_size is not None:
        size = {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            name, revision=revision or "main", **size
        )
    except NOT_LOADED as error:
        raise ModelError(f"Cannot load the image processor of {name}: {error}") from error
