"""The weights of an adapter that others wrote: read only if they are what the model and the config leave room for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import Component
from plasticity_peft.components.wrappers import walk
from plasticity_peft.errors import AdapterError
from plasticity_peft.hub import WEIGHTS_NAME
from plasticity_peft.saved.options import AdapterOptions
from plasticity_peft.saved.renames import Layer, differing, read, rename

MOST_TENSORS = 100_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    # of buffers of a module that is saved as a whole
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_shapes(path: str | os.PathLike[str], source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file without their numbers: shapes and types, on the meta device.

    Raises:
        AdapterError: the file is damaged, or holds types that no weights have.
    """
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > MOST_TENSORS:
                raise AdapterError(f"{source}: {WEIGHTS_NAME} holds {len(keys)} tensors, more than {MOST_TENSORS}.")
            for key in keys:
                piece = file.get_slice(key)
                dtype = DTYPES.get(str(piece.get_dtype()))
                if dtype is None:
                    raise AdapterError(f"{source}: {WEIGHTS_NAME} holds {piece.get_dtype()} for {key[:200]!r}.")
                shapes[key] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
    except (OSError, SafetensorError, RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"Cannot read {WEIGHTS_NAME} of {source}: {error}.") from error
    return shapes


def read_weights(path: str | os.PathLike[str], source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file. Raises AdapterError where it is damaged, or holds NaN or infinity."""
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterError(f"Cannot read {WEIGHTS_NAME} of {source}: {error}.") from error
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterError(f"{source}: {WEIGHTS_NAME} holds NaN or infinity in {key!r}.")
    return weights


def fitting(
    weights: Mapping[str, torch.Tensor],
    options: AdapterOptions,
    model: nn.Module,
    architecture: Architecture,
    measured: Sequence[Component],
    source: str,
) -> dict[str, Layer]:
    """Returns what an adapter holds, by the module paths of the base model `model`.

    Args:
        weights: the adapter's, or their shapes.
        options: what its config says.
        model: the base model, which `architecture` describes.
        architecture: see `model`.
        measured: components with the paths under which the adapter was saved, if they are known.
        source: what messages call the adapter.

    Raises:
        AdapterError: the weights contradict the config, or do not fit the model.
    """
    layers = _described(read(weights), options)
    modules = dict(walk(model))
    renamed = rename(layers, architecture, tuple(modules), measured)
    state = {
        f"{path}.{name}": value
        for path, module in modules.items()
        for name, value in module.state_dict(keep_vars=True).items()
        if "." not in name
    }
    wrong = list(differing(renamed, state))
    if wrong:
        raise AdapterError(
            f"{source} does not fit this {type(model).__name__}: {'; '.join(wrong[:3])}. A head must have as many "
            "labels as the adapter's: give num_labels to the base model's from_pretrained."
        )
    _check_whole(renamed, state)
    return renamed


def _described(layers: dict[str, Layer], options: AdapterOptions) -> dict[str, Layer]:
    """Returns the layers with LoRA's scaling and the place within saved modules, as the config says."""
    extras = {"lora_magnitude_vector": options.use_dora, "lora_B.bias": options.lora_bias}
    for path, layer in layers.items():
        outer = options.saved(path)
        if layer.full:
            if outer is None:
                raise AdapterError(f"The adapter holds weights of {path}, and its config does not say that it trains.")
            layer.inside = path.removeprefix(outer)
            continue
        if outer is not None or not options.targets(path):
            raise AdapterError(f"The adapter holds LoRA weights of {path}, and its config says that none are there.")
        for name, due in extras.items():
            if (name in layer.lora) != due:
                raise AdapterError(f"The adapter's config says of {path} that {name} is {'' if due else 'not '}there.")
        layer.scaling = options.alpha(path) / (layer.rank**0.5 if options.use_rslora else layer.rank)
    return layers


def _check_whole(layers: Mapping[str, Layer], state: Mapping[str, torch.Tensor]) -> None:
    """Raises AdapterError where a module that is saved as a whole is there in part."""
    saved = {path.removesuffix(layer.inside) for path, layer in layers.items() if layer.full}
    held = {f"{path}.{name}" for path, layer in layers.items() for name in layer.full}
    for outer in saved:
        missing = [name for name in state if name.startswith(f"{outer}.") and name not in held]
        if missing:
            raise AdapterError(f"The adapter holds only a part of {outer}, which it says it holds: not {missing[0]}.")
