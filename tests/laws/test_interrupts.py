"""Nothing is left behind whatever the moment of an interrupt, and other threads neither disturb nor are disturbed."""

from __future__ import annotations

import copy
import math
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from plasticity_peft import PlasticityConfig, find_components, measure_plasticity
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.hooks import OwnHook
from plasticity_peft.errors import ModelError
from plasticity_peft.measuring.left_as_found import _ONE_AT_A_TIME, LeftAsFound
from tests.support.interrupts import interrupted, moments
from tests.support.models import random_images, tiny_model
from tests.support.snapshots import assert_same, snapshot

IMAGES = random_images(12)
LABELED = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(IMAGES)]
OURS = ("/plasticity_peft/components/", "/plasticity_peft/criteria/", "/plasticity_peft/images/",
        "/plasticity_peft/measuring/")  # fmt: skip
SETTING = ("/plasticity_peft/components/hooks.py", "/plasticity_peft/measuring/left_as_found.py")
"""Where something is set and put back."""
MEASURES: dict[str, dict[str, Any]] = {
    "parameter_plasticity": {"batch_size": 2},
    "recomputed": {"batch_size": 1},
    "gradient_norm": {"criterion": "gradient_norm", "batch_size": 2},
    "embedding": {"inputs": "embedding", "batch_size": 2},
    "activation": {"inputs": "activation", "batch_size": 2},
    "token_sensitivity": {"criterion": "token_sensitivity", "batch_size": 2},
    "bound": {"criterion": "bound"},
}
IN_TURN = ("recomputed", "embedding", "bound")
"""What the default run interrupts at any line: gradients, rates of change, and weights alone."""


def lived_in(model: nn.Module) -> nn.Module:
    """Returns the model as a user may have it: mixed modes and flags, gradients, hooks."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
        if number % 5 == 0:
            module.register_forward_hook(lambda *_: None)
            module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 > 0)
        if number % 4 == 1:
            parameter.grad = torch.full_like(parameter, 0.5)
    return model


def measuring(measure: str) -> tuple[nn.Module, Callable[[], Any]]:
    """Returns a model, and the function that measures it on images of a loader."""
    model = lived_in(tiny_model())
    loader = DataLoader(LABELED[:4], 2, shuffle=True, generator=torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    return model, lambda: measure_plasticity(model, loader, max_samples=2, settle=None, **MEASURES[measure])


def interrupts_at(model: nn.Module, work: Callable[[], Any], numbers: list[int], opcodes: bool) -> Iterator[str]:
    """Interrupts at one moment after the other, and looks at the model after each; yields the places."""
    before = snapshot(model)
    for number in numbers:
        with interrupted(SETTING if opcodes else OURS, number, opcodes) as interrupter:
            try:
                work()
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError(f"moment {number} was passed over: {interrupter.place}")
        try:
            assert_same(before, snapshot(model))
            assert not is_measured()
            assert not [hook for m in model.modules() for hook in m._forward_hooks.values() if type(hook) is OwnHook]
        except AssertionError as error:
            raise AssertionError(f"after an interrupt at {interrupter.place}: {error}") from None
        yield interrupter.place


def is_measured() -> bool:
    """Returns whether another thread would wait until a measurement of this one ends."""
    free: list[bool] = []

    def acquire() -> None:
        free.append(_ONE_AT_A_TIME.acquire(blocking=False))
        if free[0]:
            _ONE_AT_A_TIME.release()

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    return not free[0]


@pytest.mark.parametrize(
    "measure", [pytest.param(name, marks=() if name in IN_TURN else pytest.mark.slow) for name in MEASURES]
)
def test_an_interrupt_at_any_line_leaves_nothing_behind(measure: str) -> None:
    model, work = measuring(measure)
    work()
    numbers = moments(OURS, work)
    assert len(numbers) > 150
    places = set(interrupts_at(model, work, numbers[:: max(1, len(numbers) // 15)], opcodes=False))
    assert len(places) > 9


@pytest.mark.parametrize("measure", ["recomputed", pytest.param("gradient_norm", marks=pytest.mark.slow)])
def test_an_interrupt_at_any_bytecode_of_what_sets_and_puts_back_leaves_nothing_behind(measure: str) -> None:
    """Between the call that sets a hook and what notes it, too."""
    model, work = measuring(measure)
    work()
    numbers = moments(SETTING, work, opcodes=True)
    assert len(numbers) > 300
    assert set(interrupts_at(model, work, numbers[:: max(1, len(numbers) // 25)], opcodes=True))


@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("opcodes", [False, True])
def test_an_interrupt_at_every_moment_leaves_nothing_behind(measure: str, opcodes: bool) -> None:
    model, work = measuring(measure)
    work()
    assert list(interrupts_at(model, work, moments(SETTING if opcodes else OURS, work, opcodes), opcodes))


@pytest.mark.slow
def test_the_law_sees_a_hook_that_an_interrupt_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sweep over hooks, some moments leave one."""
    monkeypatch.setattr("plasticity_peft.measuring.left_as_found.remove_own_hooks", lambda model: None)
    model, work = measuring("activation")
    work()
    with pytest.raises(AssertionError, match=r"after an interrupt at hooks\.py"):
        list(interrupts_at(model, work, moments(SETTING, work, opcodes=True), opcodes=True))


ADAPTING = ("/plasticity_peft/adapters/model.py", "/plasticity_peft/adapters/rollback.py")


@pytest.mark.parametrize("most", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_an_interrupt_while_a_further_adapter_is_added_leaves_the_first_as_it_was(most: int) -> None:
    """Both are chosen by what is quick to measure."""

    def add(model: Any) -> None:
        model.add_adapter("second", PlasticityConfig(training="lora", criterion="condition_number"))

    def adapted() -> Any:
        torch.manual_seed(0)
        config = PlasticityConfig(training="lora", criterion="condition_number", init_lora_weights=False)
        return get_peft_model(tiny_model(), config).eval()

    start = adapted()
    numbers = moments(ADAPTING, lambda: add(copy.deepcopy(start)))
    assert len(numbers) > 100
    with torch.no_grad():
        expected = start(pixel_values=IMAGES[:2]).logits
    for number in numbers[:: math.ceil(len(numbers) / most)]:
        model = copy.deepcopy(start)
        with interrupted(ADAPTING, number) as interrupter, pytest.raises(KeyboardInterrupt):
            add(model)
        with torch.no_grad():
            assert torch.equal(model(pixel_values=IMAGES[:2]).logits, expected), interrupter.place


def test_a_measurement_after_an_interrupt_is_the_same(vit: PreTrainedModel) -> None:
    expected = measure_plasticity(vit, IMAGES)
    with interrupted(OURS, 400), pytest.raises(KeyboardInterrupt):
        measure_plasticity(vit, IMAGES)
    assert measure_plasticity(vit, IMAGES) == expected


# -------------------------------------------------------------------------------------------------------- threads


class Running(threading.Thread):
    """A thread that does something over and over, and keeps what it raises."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.times, self.errors, self.going = work, 0, [], True

    def run(self) -> None:
        while self.going:
            try:
                self.work()
            except BaseException as error:
                self.errors.append(error)
            self.times += 1

    def __enter__(self) -> Running:
        self.start()
        while not self.times:
            time.sleep(0.001)
        return self

    def __exit__(self, *_: object) -> None:
        self.going = False
        self.join(timeout=60)


@pytest.mark.parametrize(
    "measure", [pytest.param(name, marks=pytest.mark.slow if name == "embedding" else ()) for name in MEASURES]
)
def test_a_thread_that_runs_the_model_does_not_matter(measure: str, vit: PreTrainedModel) -> None:
    options = {"max_samples": 16, "settle": None, **MEASURES[measure]}
    expected = [row.mean for row in measure_plasticity(vit, LABELED, **options).scores]
    images = random_images(3, seed=9)
    with torch.no_grad():
        logits = vit(pixel_values=images).logits
    outputs = []

    def infer() -> None:
        with torch.no_grad():
            outputs.append(vit(pixel_values=images).logits)

    with Running(infer) as thread:
        found = [[row.mean for row in measure_plasticity(vit, LABELED, **options).scores] for _ in range(2)]
    assert not thread.errors
    assert thread.times > 1
    assert all(torch.equal(output, logits) for output in outputs)
    for means in found:
        np.testing.assert_array_equal(means, expected)


def test_two_threads_measure_one_after_the_other(vit: PreTrainedModel) -> None:
    vit.train()
    expected = measure_plasticity(vit, IMAGES)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(measure_plasticity(vit, IMAGES))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == [expected] * 3
    assert vit.training


def test_a_thread_that_trains_the_model_is_an_error(vit: PreTrainedModel) -> None:
    changed = []

    def change(*_: Any) -> None:
        if not changed:
            changed.append(1)
            with torch.no_grad():
                vit.classifier.weight.add_(0.1)

    handle = vit.vit.register_forward_hook(change)
    with pytest.raises(ModelError, match=r"classifier\.weight was changed while ViTForImageClassification was meas"):
        measure_plasticity(vit, IMAGES)
    handle.remove()
    measure_plasticity(vit, IMAGES)


def test_hooks_are_of_the_thread_that_sets_them(vit: PreTrainedModel) -> None:
    seen: list[int] = []
    handle = vit.classifier.register_forward_hook(OwnHook(lambda *_: seen.append(threading.get_ident())))
    thread = threading.Thread(target=lambda: vit(pixel_values=IMAGES[:1]))
    thread.start()
    thread.join()
    vit(pixel_values=IMAGES[:1])
    handle.remove()
    assert seen == [threading.get_ident()]


def test_an_error_inside_is_not_replaced_by_one_about_weights(vit: PreTrainedModel) -> None:
    def change(error: bool) -> None:
        with LeftAsFound(vit, 0):
            vit.classifier.weight.add_(1)
            if error:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change(error=True)
    with pytest.raises(ModelError, match="was changed"):
        change(error=False)


# --------------------------------------------------------------------------------------------- layers and surroundings


FC1 = [part.modules[0] for part in find_components(tiny_model()) if part.kind == "FC1"]
"""Paths of layers, which depend on the release of transformers."""


def each_fc1(change: Callable[[nn.Module], Any]) -> nn.Module:
    model = tiny_model()
    for path in FC1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model.get_submodule(path))
    return model


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def by_hand(layer: nn.Module) -> None:
    """As many write a reparametrization of their own."""
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_raw", weight)
    layer.weight = weight.detach() * 2


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str, Callable[[nn.Module], Any] | None]] = {
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        rf"is pruned: .*prune\.remove\(model\.get_submodule\('{re.escape(FC1[0])}'\), 'weight'\)",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "pruned in turns": (
        lambda layer: [prune.random_unstructured(layer, "weight", 0.3), prune.l1_unstructured(layer, "weight", 0.3)],
        r"is pruned: .*prune\.remove",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "pruned biases": (
        lambda layer: prune.l1_unstructured(layer, "bias", 0.3),
        r"is pruned: .*prune\.remove\(.*, 'bias'\)",
        lambda layer: prune.remove(layer, "bias"),
    ),
    "weight norm": (weight_norm, r"has a weight norm: .*remove_weight_norm\(", torch.nn.utils.remove_weight_norm),
    "spectral norm": (
        spectral_norm, r"has a spectral norm: .*remove_spectral_norm\(", torch.nn.utils.remove_spectral_norm,
    ),
    "parametrized weight norm": (
        parametrizations.weight_norm,
        r"is parametrized \(WeightNorm\): .*remove_parametrizations\(",
        lambda layer: torch.nn.utils.parametrize.remove_parametrizations(layer, "weight"),
    ),
    "parametrized spectral norm": (
        parametrizations.spectral_norm,
        r"is parametrized \(SpectralNorm\): .*remove_parametrizations\(",
        lambda layer: torch.nn.utils.parametrize.remove_parametrizations(layer, "weight"),
    ),
    "a parametrization of the user": (
        lambda layer: torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
        r"is parametrized \(Doubled\)",
        lambda layer: torch.nn.utils.parametrize.remove_parametrizations(layer, "weight"),
    ),
    "by hand": (by_hand, "has a weight that is not a parameter", None),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_layers_whose_weights_are_computed_are_refused_by_name(name: str) -> None:
    change, text, remedy = COMPUTED[name]
    model = each_fc1(change)
    for options in ({}, {"inputs": "embedding"}, {"inputs": "activation"}, {"criterion": "condition_number"}):
        with pytest.raises(ModelError, match=f"{re.escape(FC1[0])} {text}"):
            measure_plasticity(model, IMAGES, max_samples=4, **options)
    with pytest.raises(ModelError, match=text):
        find_components(model)
    if remedy:
        for path in FC1:
            remedy(model.get_submodule(path))
        assert measure_plasticity(model, IMAGES, max_samples=4).samples == 4


def test_a_head_whose_weights_are_computed_is_measured_with(vit: PreTrainedModel) -> None:
    expected = [row.mean for row in measure_plasticity(vit, IMAGES).scores]
    parametrizations.weight_norm(vit.classifier)
    assert [row.mean for row in measure_plasticity(vit, IMAGES).scores] == pytest.approx(expected)


@pytest.mark.parametrize("where", [0, 1, "layernorm"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_hook_that_detaches_is_an_error_where_gradients_are_needed(where: int | str, frozen: bool) -> None:
    model = tiny_model().requires_grad_(not frozen)
    blocks = find_architecture(model).blocks
    module = model.get_submodule(blocks[where] if isinstance(where, int) else f"vit.{where}")
    module.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(
        ModelError, match=r"has no gradient with respect to the tokens .* A hook or a forward pass detaches"
    ):
        measure_plasticity(model, IMAGES)
    assert measure_plasticity(model, IMAGES, criterion="rate_of_change").samples > 2
    if where == "layernorm":
        model.classifier.requires_grad_(False)
        with pytest.raises(ModelError, match="its loss has no gradient"):
            measure_plasticity(model, LABELED, criterion="gradient_norm")


class WithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        self.config = self.model.config

    def forward(self, pixel_values: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.model(pixel_values)


def test_a_forward_pass_without_gradients_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"runs under torch\.no_grad"):
        measure_plasticity(WithoutGradients(), IMAGES)


def test_a_model_made_in_inference_mode_is_an_error_where_gradients_are_needed() -> None:
    with torch.inference_mode():
        model = tiny_model()
    for criterion in ("parameter_plasticity", "gradient_norm"):
        with pytest.raises(ModelError, match=r"was made in torch\.inference_mode\(\), so .* cannot have a gradient"):
            measure_plasticity(model, LABELED, criterion=criterion)
    found = measure_plasticity(copy.deepcopy(model), LABELED)
    assert [r.mean for r in found.scores] == [r.mean for r in measure_plasticity(tiny_model(), LABELED).scores]
    for criterion in ("rate_of_change", "token_sensitivity", "feature_norm", "bound"):
        found = measure_plasticity(model, LABELED, criterion=criterion)
        expected = measure_plasticity(tiny_model(), LABELED, criterion=criterion)
        assert [r.mean for r in found.scores] == pytest.approx([r.mean for r in expected.scores])


def test_images_made_in_inference_mode_are_measured(vit: PreTrainedModel) -> None:
    with torch.inference_mode():
        images = IMAGES.clone()
    assert measure_plasticity(vit, images) == measure_plasticity(vit, IMAGES)


CRITERIA = (
    "parameter_plasticity", "rate_of_change", "relative_rate_of_change", "token_sensitivity", "bound", "gradient_norm",
    "relative_gradient_norm", "condition_number", "feature_norm", "inverse", "random",
)  # fmt: skip


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_default_device_or_dtype_of_another_kind_does_not_matter(vit: PreTrainedModel, criterion: str) -> None:
    expected = [row.mean for row in measure_plasticity(vit, LABELED, criterion=criterion).scores]
    with torch.device("meta"):
        assert [row.mean for row in measure_plasticity(vit, LABELED, criterion=criterion).scores] == expected
        assert torch.get_default_device().type == "meta"
    torch.set_default_dtype(torch.float64)
    try:
        found = [row.mean for row in measure_plasticity(vit, LABELED, criterion=criterion).scores]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == pytest.approx(expected, rel=1e-5)
