"""What an adapter contains for each module, and the keys under which PEFT stores it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from plasticity_peft.errors import AdapterError

PREFIX = "base_model.model."
LONGEST_KEY = 1000
MOST_RANKS = 2**14
"""Highest rank for a layer of any width. Without a limit, a sparse file could request any amount of memory."""
HIGHEST_RANK = 4
"""Highest rank per width of a layer. Above a rank of the width, LoRA has more parameters than the layer."""
PRECISIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REQUIRED = {"lora_A.weight", "lora_B.weight"}
ALLOWED = REQUIRED | {"lora_B.bias", "lora_magnitude_vector"}
_LORA = re.compile(r"(?P<path>.+)\.(?P<part>lora_[A-Za-z_]+)(?:\.(?P<leaf>weight|bias))?")


@dataclass
class Layer:
    """What an adapter contains for one module."""

    lora: dict[str, torch.Tensor] = field(default_factory=dict)
    """LoRA weights: "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"."""
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights of a module that trains in full, by their names in the module."""
    inside: str = ""
    """Path within the module that PEFT saves as a whole: "" for the module itself, or such as ".dense"."""
    scaling: float = 1.0
    """Factor of lora_B lora_A."""

    @property
    def rank(self) -> int:
        """Number of rows of lora_A."""
        return len(self.lora["lora_A.weight"])


def read_layers(weights: Mapping[str, torch.Tensor]) -> dict[str, Layer]:
    """Returns what an adapter contains, by module path.

    Args:
        weights: the tensors of the weights file by their keys, or their shapes on the meta device.

    Raises:
        AdapterError: a key is not one that PEFT writes for LoRA and modules_to_save, or shapes do not fit together.
    """
    layers: dict[str, Layer] = {}
    for key, value in weights.items():
        _add_tensor(layers, key, value)
    for path, layer in layers.items():
        if set(layer.lora) - ALLOWED or (layer.lora and not set(layer.lora) >= REQUIRED):
            raise AdapterError(
                f"The adapter contains {sorted(layer.lora)} for {path}. Expected lora_A and lora_B of a linear layer."
            )
        if layer.lora and layer.full:
            raise AdapterError(f"The adapter contains both LoRA and full weights for {path}.")
        if layer.lora:
            _check_lora(path, layer.lora)
    return layers


def _add_tensor(layers: dict[str, Layer], key: str, value: torch.Tensor) -> None:
    if len(key) > LONGEST_KEY:
        raise AdapterError(
            f"The adapter contains a key of {len(key)} characters, too long for a module: {key[:80]}..."
        )
    name = key.removeprefix(PREFIX)
    match = _LORA.fullmatch(name)
    if match:
        part = match["part"] if match["part"] == "lora_magnitude_vector" else f"{match['part']}.{match['leaf']}"
        layers.setdefault(match["path"], Layer()).lora[part] = value
        return
    path, _, leaf = name.rpartition(".")
    if not key.startswith(PREFIX) or not path:
        raise AdapterError(f"The adapter contains {key!r}. Keys of a LoRA adapter start with {PREFIX!r}.")
    layers.setdefault(path, Layer()).full[leaf] = value


def _check_lora(path: str, lora: Mapping[str, torch.Tensor]) -> None:
    """Raises AdapterError unless the LoRA weights of one layer fit together."""
    a, b = lora["lora_A.weight"].shape, lora["lora_B.weight"].shape
    fit = len(a) == len(b) == 2 and a[0] == b[1] and 1 <= a[0] <= max(HIGHEST_RANK * max(a[1], b[0]), MOST_RANKS)
    if not fit or any(lora[name].shape != b[:1] for name in set(lora) - REQUIRED):
        shapes = {name: tuple(value.shape) for name, value in lora.items()}
        raise AdapterError(
            f"The LoRA weights of {path} do not fit together: {shapes}. "
            f"lora_A is (r, inputs) and lora_B is (outputs, r), with r from 1 to {HIGHEST_RANK} times the larger "
            f"of the two, or {MOST_RANKS}; biases and magnitudes are (outputs,)."
        )
    for name, value in lora.items():
        if value.dtype not in PRECISIONS:
            raise AdapterError(
                f"The adapter contains {value.dtype} for {path}.{name}. Expected floating-point numbers."
            )


def write_layers(layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    """Returns the weights of an adapter by the keys that PEFT gives them."""
    return {
        f"{PREFIX}{path}.{name}": value.contiguous()
        for path, layer in layers.items()
        for name, value in {**layer.lora, **layer.full}.items()
    }


def differences(layers: Mapping[str, Layer], model: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yields the differences from a model with these parameters and buffers, by name."""
    for path, layer in layers.items():
        for name, value in layer.full.items():
            found = model.get(f"{path}.{name}")
            if found is None or found.shape != value.shape:
                shape = None if found is None else tuple(found.shape)
                yield f"{path}.{name} has the shape {tuple(value.shape)}, in the model {shape}"
            elif found.is_floating_point() != (value.dtype in PRECISIONS):
                yield f"{path}.{name} is {value.dtype}, in the model {found.dtype}"
        if layer.lora:
            due = model[f"{path}.weight"].shape if f"{path}.weight" in model else None
            got = (len(layer.lora["lora_B.weight"]), layer.lora["lora_A.weight"].shape[-1])
            if due is None or tuple(due) != got:
                yield f"LoRA of {path} is for a layer of shape {got}, in the model it is {due and tuple(due)}"
