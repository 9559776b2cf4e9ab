"""An adapter's weights under the module names of another release of transformers.

Every name in an adapter is read as a canonical id and the place of a layer in that component (by the report beside the
adapter, or by the known namings of the architecture), and written again as the name that this place has in the model
at hand. What belongs to no component (a head, a patch embedding) keeps its name, but for the prefix of the backbone.

One family changed more than names: the two input layers of a gated MLP lie in one layer in DINOv2 until transformers
5.17 and in two since. LoRA on them is split or put together without changing what it computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.components.layouts import LAYOUTS
from plasticity_peft.errors import AdapterError

PREFIX = "base_model.model."
LONGEST_KEY = 1000
HIGHEST_RANK = 4
"""Times the width of a layer; above the width itself, LoRA holds more numbers than the layer."""
MOST_RANKS = 2**14
"""Of a layer of any width. A file with holes could ask for any amount of memory."""
PRECISIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LORA = re.compile(r"(?P<path>.+)\.(?P<part>lora_[A-Za-z_]+)(?:\.(?P<leaf>weight|bias))?")

T = TypeVar("T", str, int)


class Place(NamedTuple):
    """One layer of one component, independent of names."""

    component: str
    """Canonical id."""
    number: int
    """Which layer of the component."""
    layers: int
    """How many layers the component has under these names."""


@dataclass
class Layer:
    """What an adapter holds for one module."""

    lora: dict[str, torch.Tensor] = field(default_factory=dict)
    """LoRA weights: "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"."""
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights of a module that trains in full, by their names in it."""
    inside: str = ""
    """Path within the module that PEFT saves as a whole: "" if that is this one, ".dense" in a deeper head."""
    scaling: float = 1.0
    """What lora_B lora_A is multiplied by."""

    @property
    def rank(self) -> int:
        """Number of rows of lora_A."""
        return len(self.lora["lora_A.weight"])


def read(weights: Mapping[str, torch.Tensor]) -> dict[str, Layer]:
    """Returns what an adapter holds, by module path.

    Raises:
        AdapterError: a key is not one that PEFT writes for LoRA and modules_to_save.
    """
    layers: dict[str, Layer] = {}
    for key, value in weights.items():
        if len(key) > LONGEST_KEY:
            raise AdapterError(f"The adapter holds a key of {len(key)} characters, which no module has: {key[:80]}...")
        name = key.removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        if match:
            part = match["part"] if match["part"] == "lora_magnitude_vector" else f"{match['part']}.{match['leaf']}"
            layers.setdefault(match["path"], Layer()).lora[part] = value
        else:
            path, _, leaf = name.rpartition(".")
            if not key.startswith(PREFIX) or not path:
                raise AdapterError(f"The adapter holds {key!r}. Keys of a LoRA adapter start with {PREFIX!r}.")
            layers.setdefault(path, Layer()).full[leaf] = value
    for path, layer in layers.items():
        known = {"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"}
        if set(layer.lora) - known or (layer.lora and not {"lora_A.weight", "lora_B.weight"} <= set(layer.lora)):
            raise AdapterError(
                f"The adapter holds {sorted(layer.lora)} for {path}. Expected lora_A and lora_B of a linear layer."
            )
        if layer.lora and layer.full:
            raise AdapterError(f"The adapter holds both LoRA and full weights for {path}.")
        if layer.lora:
            _check_shapes(path, layer.lora)
    return layers


def _check_shapes(path: str, lora: Mapping[str, torch.Tensor]) -> None:
    """Raises AdapterError unless the weights of LoRA on one layer fit together."""
    a, b = lora["lora_A.weight"].shape, lora["lora_B.weight"].shape
    fit = len(a) == len(b) == 2 and a[0] == b[1] and 1 <= a[0] <= max(HIGHEST_RANK * max(a[1], b[0]), MOST_RANKS)
    if not fit or any(lora[name].shape != b[:1] for name in set(lora) - {"lora_A.weight", "lora_B.weight"}):
        shapes = {name: tuple(value.shape) for name, value in lora.items()}
        raise AdapterError(
            f"The LoRA weights of {path} do not fit together: {shapes}. "
            f"lora_A is (r, inputs) and lora_B is (outputs, r), with r from 1 to {HIGHEST_RANK} times the larger of "
            f"the two, or {MOST_RANKS}; biases and magnitudes are (outputs,)."
        )
    for name, value in lora.items():
        if value.dtype not in PRECISIONS:
            raise AdapterError(f"The adapter holds {value.dtype} for {path}.{name}. Expected floating-point numbers.")


def write(layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    """Returns the weights of an adapter as PEFT names them."""
    return {
        f"{PREFIX}{path}.{name}": value.contiguous()
        for path, layer in layers.items()
        for name, value in {**layer.lora, **layer.full}.items()
    }


def rename(
    layers: Mapping[str, Layer], architecture: Architecture, modules: Sequence[str], measured: Sequence[Component] = ()
) -> dict[str, Layer]:
    """Returns what an adapter holds, by the module paths of the model that `architecture` describes.

    Args:
        layers: what the adapter holds, by the paths under which it was saved.
        architecture: of the model at hand.
        modules: paths of all modules of the model at hand.
        measured: components with the paths under which the adapter was saved, if they are known.

    Raises:
        AdapterError: a module has no counterpart in the model.
    """
    here = {part.id: part for part in architecture.components}
    places = {
        path: Place(part.id, index, len(part.modules)) for part in measured for index, path in enumerate(part.modules)
    }
    renamed: dict[str, Layer] = {}
    together: dict[str, dict[int, Layer]] = {}
    prefixes: dict[str, str] = {}
    rest: dict[str, Layer] = {}
    for path, layer in layers.items():
        place = places.get(path) or _place(path, architecture)
        if place is None:
            rest[path] = layer
            continue
        if place.component not in here:
            raise AdapterError(
                f"The adapter trains {path}, component {place.component}, and the model has no such component: it has "
                f"{len(architecture.blocks)} blocks."
            )
        targets = here[place.component].modules
        if len(targets) == place.layers:
            _add(renamed, targets[place.number], layer)
        elif len(targets) == 2 and place.layers == 1:
            for target, half in zip(targets, split(layer), strict=True):
                _add(renamed, target, half)
        elif len(targets) == 1 and place.layers == 2:
            _add(together.setdefault(targets[0], {}), place.number, layer)
        else:
            raise AdapterError(
                f"{place.component} had {place.layers} layers when the adapter was saved ({path}), and has "
                f"{len(targets)} in this model: {', '.join(targets)}."
            )
        old, new = _before_blocks(path, architecture), _before_blocks(targets[0], architecture)
        if not (old.endswith(new) or new.endswith(old)):
            raise AdapterError(
                f"The adapter trains {path}, in a backbone that is called {old[:-1]!r}; the model's is called "
                f"{new[:-1]!r}. Is it an adapter of another model?"
            )
        prefixes[old] = new
    for target, halves in together.items():
        _add(renamed, target, join(halves))
    for path, layer in rest.items():
        _add(renamed, _elsewhere(path, modules, prefixes), layer)
    return renamed


def _add(layers: dict[T, Layer], place: T, layer: Layer) -> None:
    if place in layers:
        raise AdapterError(f"The adapter holds weights for {place} twice, under two of its names.")
    layers[place] = layer


def _place(path: str, architecture: Architecture) -> Place | None:
    """Returns which layer of which component has this path under one of the namings of the architecture."""
    for layout in LAYOUTS[architecture.model_type]:
        for kind in KINDS:
            names = layout.weights(kind)
            for index, name in enumerate(names):
                match = re.fullmatch(f"{layout.pattern.pattern}{re.escape('.' + name)}", path)
                if match:
                    return Place(".".join([*match.groups()[1:], kind]), index, len(names))
    return None


def _before_blocks(path: str, architecture: Architecture) -> str:
    """Returns what stands before the names that a layout knows: the path of the backbone, as a rule."""
    for layout in LAYOUTS[architecture.model_type]:
        match = re.match(layout.pattern.pattern + r"\.", path)
        if match:
            return match[1]
    return ""


def _elsewhere(path: str, modules: Sequence[str], prefixes: Mapping[str, str]) -> str:
    candidates = [path, *(new + path.removeprefix(old) for old, new in prefixes.items() if path.startswith(old))]
    for candidate in candidates:
        if candidate in modules:
            return candidate
    raise AdapterError(
        f"The adapter trains {path}, which belongs to no component, and the model has no module of that name. Is it "
        "an adapter of another model?"
    )


def split(layer: Layer) -> tuple[Layer, Layer]:
    """Returns the adapters of the two halves of a layer's outputs, the first half first.

    Both get the whole of lora_A; what they compute is what the one computed.
    """

    def half(number: int) -> Layer:
        lora = {
            name: value.clone() if name == "lora_A.weight" else value.chunk(2)[number].clone()
            for name, value in layer.lora.items()
        }
        full = {name: value.chunk(2)[number].clone() for name, value in layer.full.items()}
        return Layer(lora, full, scaling=layer.scaling)

    return half(0), half(1)


def join(halves: Mapping[int, Layer]) -> Layer:
    """Returns the adapter of one layer whose outputs are those of two, one after the other.

    lora_A holds the rows of both, lora_B is block diagonal: the rank is the sum of the ranks. A half that the adapter
    does not train gets zeros.

    Raises:
        AdapterError: one half alone trains in full or by DoRA, which cannot be said of half a layer.
    """
    present = list(halves.values())
    missing = len(present) == 1
    if missing and (present[0].full or "lora_magnitude_vector" in present[0].lora):
        raise AdapterError(
            "The adapter trains one of the two input layers of a gated MLP in full or by DoRA, and in this release of "
            "transformers both are one layer."
        )
    if present[0].full:
        names = present[0].full
        return Layer(full={name: torch.cat([halves[0].full[name], halves[1].full[name]]) for name in names})
    first = present[0]
    outputs, total = len(first.lora["lora_B.weight"]), sum(layer.rank for layer in present)
    rows = []
    column = 0
    for number in (0, 1):
        block = first.lora["lora_B.weight"].new_zeros(outputs, total)
        if number in halves:
            own = halves[number]
            block[:, column : column + own.rank] = own.lora["lora_B.weight"] * (own.scaling / first.scaling)
            column += own.rank
        rows.append(block)
    lora = {
        "lora_A.weight": torch.cat([halves[number].lora["lora_A.weight"] for number in sorted(halves)]),
        "lora_B.weight": torch.cat(rows),
    }
    for name in sorted(set(first.lora) - set(lora)):
        parts = [halves[n].lora[name] if n in halves else torch.zeros_like(first.lora[name]) for n in (0, 1)]
        ratios = [halves[n].scaling / first.scaling if n in halves and name == "lora_B.bias" else 1.0 for n in (0, 1)]
        lora[name] = torch.cat([part * ratio for part, ratio in zip(parts, ratios, strict=True)])
    return Layer(lora, scaling=first.scaling)


def differing(layers: Mapping[str, Layer], model: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yields what does not fit a model with these parameters and buffers, by name."""
    for path, layer in layers.items():
        for name, value in layer.full.items():
            found = model.get(f"{path}.{name}")
            if found is None or found.shape != value.shape:
                shape = None if found is None else tuple(found.shape)
                yield f"{path}.{name} has the shape {tuple(value.shape)}, in the model {shape}"
            elif found.is_floating_point() != (value.dtype in PRECISIONS):
                yield f"{path}.{name} holds {value.dtype}, in the model {found.dtype}"
        if layer.lora:
            due = model[f"{path}.weight"].shape if f"{path}.weight" in model else None
            got = (len(layer.lora["lora_B.weight"]), layer.lora["lora_A.weight"].shape[-1])
            if due is None or tuple(due) != got:
                yield f"LoRA of {path} is for a layer of shape {got}, in the model it is {due and tuple(due)}"
