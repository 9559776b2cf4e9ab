"""Observes a forward pass: which modules it calls, and what it passes to them.

Every hook is set by a context manager, so that it is also removed after an exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.heads import lineage, within
from plasticity_peft.components.hooks import after_calls, before_calls
from plasticity_peft.components.offloading import offloaded
from plasticity_peft.components.wrappers import (
    PIXELS,
    as_written,
    forward_parameters,
    main_input,
    takes_anything,
    takes_images_alone,
    unwrap,
)
from plasticity_peft.errors import ConfigError, DataError, ModelError, PlasticityError

Inputs = dict[str, torch.Tensor]
"""The inputs of a model for one image, or stacked for several, by the names of its arguments."""
LABEL_KEYS = ("labels", "label")


class Call(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tokens(self) -> torch.Tensor:
        """The tensor that the module maps: its first argument, or the first that is given by name."""
        value = self.args[0] if self.args else self.kwargs[self._name]
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"A module was expected to take tokens first. It got {type(value).__name__}.")
        return value

    @property
    def extras(self) -> tuple[Any, ...]:
        """The other arguments."""
        if self.args:
            return (*self.args[1:], self.kwargs)
        return ({name: value for name, value in self.kwargs.items() if name != self._name},)

    def with_tokens(self, tokens: torch.Tensor) -> Call:
        """Returns the same call on other tokens."""
        if self.args:
            return Call((tokens, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, self._name: tokens})

    @property
    def _name(self) -> str:
        tensors = (name for name, value in self.kwargs.items() if isinstance(value, torch.Tensor))
        return "hidden_states" if "hidden_states" in self.kwargs else next(tensors, "hidden_states")


def first_tensor(output: Any) -> torch.Tensor:
    """Returns the tokens in the output of a module. Attention returns a tensor, or a tuple that starts with it."""
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, torch.Tensor):
        raise ModelError(f"A component was expected to return tokens. It returned {type(tensor).__name__}.")
    return tensor


def per_image(tokens: torch.Tensor, images: int) -> torch.Tensor:
    """Returns tokens with one row per image. Windowed attention (Swin) has one row per window."""
    if len(tokens) == images:
        return tokens
    if len(tokens) % images:
        raise ModelError(f"Tokens of shape {tuple(tokens.shape)} cannot be divided among {images} images.")
    return tokens.reshape(images, -1, *tokens.shape[1:])


class _StopForwardError(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def hooked(modules: dict[str, nn.Module], hook: Callable[[str, Call, Any], None]) -> Iterator[None]:
    """Calls `hook(name, call, output)` after each call of the named modules; the hooks are removed at the end.

    Calls from other threads are not seen.
    """
    with ExitStack() as stack:
        for name, module in modules.items():

            def forward_hook(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                hook(name, Call(args, kwargs), output)

            stack.enter_context(after_calls(module, forward_hook))
        yield


def run(model: nn.Module, architecture: Architecture, inputs: Inputs, **arguments: Any) -> Any:
    """Runs the model on images and returns its output. If the model also needs text, its vision backbone is run.

    Args:
        model: the model that `architecture` describes.
        architecture: see `model`.
        inputs: the inputs of the model for n images, tensors of shape (n, ...).
        arguments: further arguments, such as labels.

    Raises:
        DataError: the model refuses the images.
    """
    entry = model.get_submodule(architecture.entry)
    if architecture.layout.random_masking:
        inputs = {**_fixed_noise(model.get_submodule(architecture.backbone), inputs), **inputs}
    images, others = _by_position(unwrap(entry), inputs)
    try:
        with as_written(unwrap(entry)):
            return entry(*images, **others, **architecture.forward_kwargs, **arguments)
    except PlasticityError:
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        if should_reduce_batch_size(error):
            raise
        given = ", ".join(
            f"{name} of shape {tuple(value.shape[1:])} ({value.dtype})" for name, value in inputs.items()
        )
        advice = _advice(naming_arguments(model, architecture), architecture, str(error))
        raise DataError(f"{type(entry).__name__} refused {given}: {error}{advice}") from error


def input_names(model: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """Returns the names of the arguments that a forward pass may take for each image, the images themselves first."""
    named = naming_arguments(model, architecture)
    main = main_input(named)
    taken = {main, *architecture.forward_kwargs, *LABEL_KEYS, *label_names(model, architecture)}
    return (main, *(name for name in forward_parameters(named) if name not in taken))


def naming_arguments(model: nn.Module, architecture: Architecture) -> nn.Module:
    """Returns the module that names the arguments: the one that is run, or the one it passes its arguments to."""
    paths = [path for path in lineage(architecture.backbone) if within(path, architecture.entry)]
    modules = [unwrap(model.get_submodule(path)) for path in paths]
    return next((module for module in modules if takes_images_alone(module)), modules[0])


def _by_position(entry: nn.Module, inputs: Inputs) -> tuple[list[torch.Tensor], Inputs]:
    """Returns the inputs by position and those by name. A module may have another name for images than the data."""
    parameters = forward_parameters(entry)
    by_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    main = next(name for name in inputs if name.startswith(PIXELS))
    if main in parameters or (by_name and takes_anything(entry)):
        return [], inputs
    return [inputs[main]], {name: value for name, value in inputs.items() if name != main}


def label_names(model: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """Returns the names of the arguments of a forward pass that take labels; empty if its loss needs none.

    They are `labels`, or several such as `mask_labels` and `class_labels`.
    """
    parameters = forward_parameters(naming_arguments(model, architecture))
    found = sorted((name for name in parameters if name.endswith("labels")), key=lambda name: name != "labels")
    # Unpack[TransformersKwargs] lists the arguments that it accepts, and labels are not among them.
    anything = any(p.kind is p.VAR_KEYWORD and not get_args(p.annotation) for p in parameters.values())
    return tuple(found) or (("labels",) if anything else ())


def with_forward_kwargs(
    model: nn.Module, architecture: Architecture, forward_kwargs: Mapping[str, Any] | None
) -> Architecture:
    """Returns the architecture with arguments for every forward pass.

    Raises:
        ConfigError: the model's forward pass has no such argument, or the argument is for images or labels.
    """
    if not forward_kwargs:
        return architecture
    entry = naming_arguments(model, architecture)
    from_data = {main_input(entry), *LABEL_KEYS, *label_names(model, architecture)}
    known = _arguments(entry)
    for name in forward_kwargs:
        if name in from_data:
            raise ConfigError(f"forward_kwargs: {name} comes from the images. Give it in target_data.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConfigError(
                f"forward_kwargs: the forward pass of {type(entry).__name__} has no argument {name!r}. "
                f"{f'Did you mean {near[0]!r}? ' if near else ''}It has: {', '.join(sorted(known - from_data))}."
            )
    return replace(architecture, forward_kwargs=dict(forward_kwargs))


def _arguments(entry: nn.Module) -> set[str]:
    """Returns the names of the arguments of a forward pass, and of those that it passes on to its modules."""
    parameters = forward_parameters(entry).values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return names
    for keys in get_args(rest.annotation):  # Unpack[TransformersKwargs]
        names |= set(getattr(keys, "__annotations__", {}))
    tops = {id(module): module for module in entry.modules() if hasattr(module, "config")}
    for module in (*tops.values(), *entry.children()):
        if module is not entry:
            inner = forward_parameters(module).values()
            names |= {p.name for p in inner if p.default is not p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return names


def _advice(entry: nn.Module, architecture: Architecture, error: str) -> str:
    """Returns advice if a model may have refused images because their size differs from its position embeddings."""
    name = "interpolate_pos_encoding"
    about_size = any(word in error.lower() for word in ("size", "match", "height", "shape"))
    if not about_size or name in architecture.forward_kwargs or name not in _arguments(entry):
        return ""
    return (
        f" Let the image processor resize the images, or give forward_kwargs={{{name!r}: True}} to measure at their "
        "size."
    )


def _fixed_noise(backbone: nn.Module, inputs: Inputs) -> Inputs:
    """Returns the noise that decides which patches are hidden, the same for all images: float32 (n, patches)."""
    images = inputs[main_input(backbone)]
    size = int(backbone.config.patch_size)  # type: ignore[arg-type, union-attr]
    patches = (images.shape[-2] // size) * (images.shape[-1] // size)
    noise = torch.rand(patches, generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)
    return {"noise": noise.to(images.device).expand(len(images), -1)}


def block_input(model: nn.Module, architecture: Architecture, inputs: Inputs) -> Call:
    """Returns the call of the first block: the tokens e, (n, tokens, features), and the other arguments.

    The forward pass ends there.
    """
    block = model.get_submodule(architecture.blocks[0])
    # An offloaded module moves its weights back at the end of its call, so the pass is not cut short.
    call = call_of(block, lambda: run(model, architecture, inputs), stop=not offloaded(model))
    if call is None:
        raise ModelError(f"{type(model).__name__} ran without calling its first block, {architecture.blocks[0]}.")
    return call


def attention_call(model: nn.Module, architecture: Architecture, index: int, call: Call) -> Call:
    """Returns the call of the attention of block `index` if the block is called with `call`. It may contain a mask.

    Only the part of the block before the attention is run.
    """
    block = model.get_submodule(architecture.blocks[index])
    attention = block.get_submodule(architecture.layout.MHA)
    found = call_of(attention, lambda: block(*call.args, **call.kwargs), stop=not offloaded(block))
    if found is None:
        raise ModelError(f"{type(model).__name__}: block {architecture.blocks[index]} ran without its attention.")
    return found


def call_of(module: nn.Module, forward: Callable[[], Any], stop: bool = True) -> Call | None:
    """Returns the first call of `module` in `forward`, which ends there if `stop`; None if there is none."""
    seen: list[Call] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(Call(args, kwargs))
        if stop:
            raise _StopForwardError

    with before_calls(module, keep), suppress(_StopForwardError):
        forward()
    return seen[0] if seen else None


def check_calls(model: nn.Module, architecture: Architecture, inputs: Inputs) -> None:
    """Raises ModelError unless a forward pass calls every layer of every component once, in the order of a block.

    Names and widths cannot show this. LoRA has no effect on a projection whose weight is used without calling the
    layer, and norms that follow their layer make another kind of block.
    """
    order: list[str] = []
    parts = architecture.components
    names = {path: model.get_submodule(path) for part in parts for path in part.modules}
    with hooked(names, lambda name, call, output: order.append(name)):
        run(model, architecture, inputs)
    for name in names:
        if order.count(name) != 1:
            raise ModelError(
                f"{type(model).__name__}: a forward pass calls {name} {order.count(name)} times. Each layer of a "
                "component must run exactly once in a pass: an adapter on a layer that never runs has no effect."
            )
    kinds = architecture.layout.order
    place = {
        path: (number // len(kinds), kinds.index(part.kind))
        for number, part in enumerate(parts)
        for path in part.modules
    }
    places = [place[name] for name in order]
    if places != sorted(places):
        wrong = next(name for name, here, due in zip(order, places, sorted(places), strict=True) if here != due)
        raise ModelError(
            f"{type(model).__name__}: {wrong} is called out of the order {', '.join(kinds)} of a "
            f"{'post' if architecture.layout.post_norm else 'pre'}-norm block."
        )


def why_unlike(model: nn.Module, architecture: Architecture, inputs: Inputs) -> str:
    """Returns why the tokens that enter the first block cannot be fed to all components; "" if they can."""
    if architecture.hierarchical:
        return "in a hierarchical model they change in width and number from stage to stage"
    width = architecture.hidden_size
    for part in architecture.components:
        got = part.features[0][0] if part.features else part.parameters
        if (part.kind == "FC2" and got < width) or (part.kind in ("MHA", "FC1") and got != width):
            return f"{part.id} takes {got} features, and a token has {width}"
    calls: dict[str, Call] = {}
    attentions = {path: f"{path}.{architecture.layout.MHA}" for path in architecture.blocks}
    watched = {path: model.get_submodule(path) for both in attentions.items() for path in both}
    with hooked(watched, lambda name, call, _: calls.update({name: call})):
        run(model, architecture, inputs)
    first = calls[architecture.blocks[0]]
    for block, attention in attentions.items():
        if calls[block].tokens.shape != first.tokens.shape or not _equal(calls[block].extras, first.extras):
            return f"block {block} is called with other arguments than the first"
        if calls[attention].tokens.shape != first.tokens.shape:
            return f"the attention of {block} gets them in another shape than the block, for example in windows"
    return ""


def has_tensors(value: Any) -> bool:
    """Returns whether an argument is a tensor, or may contain one."""
    if isinstance(value, Mapping):
        return has_tensors(list(value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(has_tensors, value))
    # An object that is not a plain value may contain tensors.
    return not isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type(None)))


def _equal(one: Any, other: Any) -> bool:
    """Returns whether two arguments are the same, tensors by value."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    return one is other or (type(one) is type(other) and bool(one == other))
