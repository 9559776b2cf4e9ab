"""The weights of an adapter, read only if they fit the model and the config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import Component
from plasticity_peft.components.wrappers import walk
from plasticity_peft.errors import AdapterError
from plasticity_peft.hub import WEIGHTS_NAME
from plasticity_peft.saved.layers import Layer, differences, read_layers
from plasticity_peft.saved.options import AdapterOptions
from plasticity_peft.saved.renames import rename

MOST_TENSORS = 100_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    # buffers of a module that is saved as a whole
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor in the header of a safetensors file."""

    dtype: str
    """Name of the dtype, such as "F32"."""
    shape: tuple[int, ...]


def read_header(path: str | os.PathLike[str], source: str) -> dict[str, Entry]:
    """Returns the header of a safetensors file; no numbers are read.

    Args:
        path: path of the file.
        source: name of the adapter in error messages.

    Raises:
        AdapterError: the file is damaged.
    """
    name = Path(path).name
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > MOST_TENSORS:
                raise AdapterError(f"{source}: {name} contains {len(keys)} tensors, more than {MOST_TENSORS}.")
            pieces = {key: file.get_slice(key) for key in keys}
            return {key: Entry(str(piece.get_dtype()), tuple(piece.get_shape())) for key, piece in pieces.items()}
    except AdapterError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, OverflowError) as error:
        raise AdapterError(f"Cannot read {name} of {source}: {error}.") from error


def read_shapes(path: str | os.PathLike[str], source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file without their numbers: shapes and dtypes, on the meta device.

    Raises:
        AdapterError: the file is damaged, or contains dtypes that weights do not have.
    """
    header = read_header(path, source)
    for key, entry in header.items():
        if entry.dtype not in DTYPES:
            raise AdapterError(f"{source}: {WEIGHTS_NAME} contains {entry.dtype} for {key[:200]!r}.")
    try:
        return {
            key: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta") for key, entry in header.items()
        }
    except (RuntimeError, ValueError, OverflowError) as error:
        raise AdapterError(f"Cannot read {WEIGHTS_NAME} of {source}: {error}.") from error


def read_weights(path: str | os.PathLike[str], source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file.

    Raises:
        AdapterError: the file is damaged, or contains NaN or infinity.
    """
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterError(f"Cannot read {WEIGHTS_NAME} of {source}: {error}.") from error
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterError(f"{source}: {WEIGHTS_NAME} contains NaN or infinity in {key!r}.")
    return weights


def fitting(
    weights: Mapping[str, torch.Tensor],
    options: AdapterOptions,
    model: nn.Module,
    architecture: Architecture,
    components: Sequence[Component],
    source: str,
) -> dict[str, Layer]:
    """Returns the layers of an adapter, by the module paths of the base model `model`.

    Args:
        weights: weights of the adapter, or their shapes.
        options: options in the config of the adapter.
        model: the base model, which `architecture` describes.
        architecture: see `model`.
        components: components with the paths under which the adapter was saved, if they are known.
        source: name of the adapter in error messages.

    Raises:
        AdapterError: the weights contradict the config, or do not fit the model.
    """
    layers = _described(read_layers(weights), options)
    modules = dict(walk(model))
    renamed = rename(layers, architecture, tuple(modules), components)
    state = {
        f"{path}.{name}": value
        for path, module in modules.items()
        for name, value in module.state_dict(keep_vars=True).items()
        if "." not in name
    }
    wrong = list(differences(renamed, state))
    if wrong:
        raise AdapterError(
            f"{source} does not fit this {type(model).__name__}: {'; '.join(wrong[:3])}. The head must have the same "
            "number of labels as the adapter's: give num_labels to the base model's from_pretrained."
        )
    _check_whole(renamed, state)
    return renamed


def _described(layers: dict[str, Layer], options: AdapterOptions) -> dict[str, Layer]:
    """Returns the layers with the scaling of LoRA and the path within saved modules that the config gives."""
    extras = {"lora_magnitude_vector": options.use_dora, "lora_B.bias": options.lora_bias}
    for path, layer in layers.items():
        outer = options.saved(path)
        if layer.full:
            if outer is None:
                raise AdapterError(f"The adapter contains weights of {path}, which its config does not name.")
            layer.inside = path.removeprefix(outer)
            continue
        if outer is not None or not options.targets(path):
            raise AdapterError(f"The adapter contains LoRA weights of {path}, which its config does not name.")
        for name, due in extras.items():
            if (name in layer.lora) != due:
                there = "must" if due else "must not"
                raise AdapterError(f"The adapter {there} contain {name} of {path}, by its config.")
        layer.scaling = options.alpha(path) / (layer.rank**0.5 if options.use_rslora else layer.rank)
    return layers


def _check_whole(layers: Mapping[str, Layer], state: Mapping[str, torch.Tensor]) -> None:
    """Raises AdapterError if a part of a module that is saved as a whole is missing."""
    saved = {path.removesuffix(layer.inside) for path, layer in layers.items() if layer.full}
    held = {f"{path}.{name}" for path, layer in layers.items() for name in layer.full}
    for outer in saved:
        missing = [name for name in state if name.startswith(f"{outer}.") and name not in held]
        if missing:
            raise AdapterError(f"The adapter contains only a part of {outer}: {missing[0]} is missing.")
