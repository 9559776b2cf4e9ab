"""An adapter's layers under the module names of another release of transformers.

Every path in an adapter is converted to a canonical id and the number of a layer in that component, with the report of
the adapter or the known layouts of the architecture. This place is then converted to the path in the given model. A
module that belongs to no component, such as a head, keeps its name except for the prefix of the backbone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.components.layouts import LAYOUTS
from plasticity_peft.errors import AdapterError
from plasticity_peft.saved.gated import join_gated, split_gated
from plasticity_peft.saved.layers import Layer

T = TypeVar("T", str, int)


class Place(NamedTuple):
    """One layer of one component, independent of names."""

    component: str
    """Canonical id."""
    number: int
    """Number of the layer in the component."""
    layers: int
    """Number of layers of the component under these names."""


def rename(
    layers: Mapping[str, Layer],
    architecture: Architecture,
    modules: Sequence[str],
    components: Sequence[Component] = (),
) -> dict[str, Layer]:
    """Returns the layers of an adapter, by the module paths of the model that `architecture` describes.

    Args:
        layers: layers of the adapter, by the paths under which it was saved.
        architecture: describes the given model.
        modules: paths of all modules of the given model.
        components: components with the paths under which the adapter was saved, if they are known.

    Raises:
        AdapterError: a module has no counterpart in the model.
    """
    known = {
        path: Place(component.id, number, len(component.modules))
        for component in components
        for number, path in enumerate(component.modules)
    }
    found = {path: known.get(path) or _place(path, architecture) for path in layers}
    places = {path: place for path, place in found.items() if place is not None}
    targets = _targets(places, architecture)
    renamed = _moved(layers, places, targets)
    prefixes = _prefixes(targets, architecture)
    for path in found:
        if path not in places:
            _add(renamed, _elsewhere(path, modules, prefixes), layers[path])
    return renamed


def _place(path: str, architecture: Architecture) -> Place | None:
    """Returns the place of a path in one of the layouts of the architecture; None if no layout contains it."""
    for layout in LAYOUTS[architecture.model_type]:
        for kind in KINDS:
            names = layout.weights(kind)
            for number, name in enumerate(names):
                match = re.fullmatch(f"{layout.pattern.pattern}{re.escape('.' + name)}", path)
                if match:
                    return Place(".".join([*match.groups()[1:], kind]), number, len(names))
    return None


def _targets(places: Mapping[str, Place], architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Returns, for each path in the adapter, the paths that its component has in the model.

    Their number is the same as before, or it changes between one and two.
    """
    here = {component.id: component.modules for component in architecture.components}
    targets = {}
    for path, place in places.items():
        if place.component not in here:
            raise AdapterError(
                f"The adapter trains {path}, component {place.component}, and the model has no such component: it has "
                f"{len(architecture.blocks)} blocks."
            )
        names = here[place.component]
        if len(names) != place.layers and {len(names), place.layers} != {1, 2}:
            raise AdapterError(
                f"{place.component} had {place.layers} layers when the adapter was saved ({path}), and has "
                f"{len(names)} in this model: {', '.join(names)}."
            )
        targets[path] = names
    return targets


def _moved(
    layers: Mapping[str, Layer], places: Mapping[str, Place], targets: Mapping[str, tuple[str, ...]]
) -> dict[str, Layer]:
    """Returns the layers of components by their paths in the model."""
    moved: dict[str, Layer] = {}
    halves: dict[str, dict[int, Layer]] = {}
    for path, place in places.items():
        names, layer = targets[path], layers[path]
        if len(names) == place.layers:
            _add(moved, names[place.number], layer)
        elif len(names) == 2:
            for name, half in zip(names, split_gated(layer), strict=True):
                _add(moved, name, half)
        else:
            _add(halves.setdefault(names[0], {}), place.number, layer)
    for name, both in halves.items():
        _add(moved, name, join_gated(both))
    return moved


def _prefixes(targets: Mapping[str, tuple[str, ...]], architecture: Architecture) -> dict[str, str]:
    """Returns the prefix of the backbone in the model, by the prefix in the adapter."""
    prefixes = {}
    for path, names in targets.items():
        old, new = _before_blocks(path, architecture), _before_blocks(names[0], architecture)
        if not (old.endswith(new) or new.endswith(old)):
            raise AdapterError(
                f"The adapter trains {path}, in a backbone with the name {old[:-1]!r}; the model's has the name "
                f"{new[:-1]!r}. Is it an adapter of another model?"
            )
        prefixes[old] = new
    return prefixes


def _before_blocks(path: str, architecture: Architecture) -> str:
    """Returns the part of a path before the names in a layout, which is the path of the backbone."""
    for layout in LAYOUTS[architecture.model_type]:
        match = re.match(layout.pattern.pattern + r"\.", path)
        if match:
            return match[1]
    return ""


def _elsewhere(path: str, modules: Sequence[str], prefixes: Mapping[str, str]) -> str:
    """Returns the path in the model of a module that belongs to no component."""
    candidates = [path, *(new + path.removeprefix(old) for old, new in prefixes.items() if path.startswith(old))]
    for candidate in candidates:
        if candidate in modules:
            return candidate
    raise AdapterError(
        f"The adapter trains {path}, which belongs to no component, and the model has no module of that name. Is it "
        "an adapter of another model?"
    )


def _add(layers: dict[T, Layer], place: T, layer: Layer) -> None:
    if place in layers:
        raise AdapterError(f"The adapter contains weights for {place} twice, under two of its names.")
    layers[place] = layer
