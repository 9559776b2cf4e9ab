"""A blank image, for values that depend on the size of an image and not on its content."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.blocks import is_timm_model
from plasticity_peft.components.calls import Inputs
from plasticity_peft.components.offloading import execution_device
from plasticity_peft.components.wrappers import main_input
from plasticity_peft.errors import ModelError
from plasticity_peft.images.indexed import Images, stack, to_device


def blank_image(model: nn.Module, architecture: Architecture, target: Images | None) -> Inputs:
    """Returns an image of zeros, the mean of the output of an image processor: tensors of shape (1, ...).

    Args:
        model: the model that `architecture` describes.
        architecture: see `model`.
        target: images; the first one determines the size. If None, it is the size that the model was made for.

    Raises:
        ModelError: there are no images, and the model does not say which size it takes.
    """
    device = execution_device(model)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    if target is not None:
        image = to_device(stack([(target, 0)]), device, dtype)
        main = next(iter(image))
        return {**image, main: torch.zeros_like(image[main])}
    backbone = model.get_submodule(architecture.backbone)
    shape = _shape(getattr(backbone, "config", None)) or _shape_in_timm(model.get_submodule(architecture.trunk))
    if shape is None:
        raise ModelError(
            f"{type(backbone).__name__}: its config has no image_size, so no blank image can be made. Give images to "
            "measure on."
        )
    return {main_input(backbone): torch.zeros((1, *shape), device=device, dtype=dtype)}


def _shape(config: Any) -> tuple[int, ...] | None:
    """Returns the shape of an image, or of a video, as a config of transformers names it."""
    size, frames = getattr(config, "image_size", None), getattr(config, "num_frames", None)
    if size is None:
        return None
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return (*([frames] if frames else []), getattr(config, "num_channels", 3), height, width)


def _shape_in_timm(trunk: nn.Module) -> tuple[int, ...] | None:
    """Returns the shape of an image that a model of timm was made for, or pretrained on if it takes any size."""
    if not is_timm_model(trunk):
        return None
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    pretrained = (getattr(trunk, "pretrained_cfg", None) or {}).get("input_size")
    channels = (module.in_channels for module in trunk.modules() if isinstance(module, nn.Conv2d))
    size = size or (pretrained and pretrained[-2:])
    return (next(channels, 3), *size) if size else None
