"""A blank image, for values that depend on the size of an image and not on its content."""

from __future__ import annotations

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
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
        target: images; the first one determines the size. If None, the model's config does.

    Raises:
        ModelError: there are no images, and the config has no image size.
    """
    device = execution_device(model)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    if target is not None:
        image = to_device(stack([(target, 0)]), device, dtype)
        main = next(iter(image))
        return {**image, main: torch.zeros_like(image[main])}
    backbone = model.get_submodule(architecture.backbone)
    config = getattr(backbone, "config", None)
    size, frames = getattr(config, "image_size", None), getattr(config, "num_frames", None)
    if size is None:
        raise ModelError(
            f"{type(backbone).__name__}: its config has no image_size, so no blank image can be made. Give images to "
            "measure on."
        )
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    shape = (1, *([frames] if frames else []), getattr(config, "num_channels", 3), height, width)
    return {main_input(backbone): torch.zeros(shape, device=device, dtype=dtype)}
