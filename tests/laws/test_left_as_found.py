"""The model, and the process, are left as they were found: on success, and on failure at every call."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from torch import nn

from plasticity_peft import PlasticityConfig, PlasticityError, PlasticityReport, load_adapter, measure_plasticity
from plasticity_peft.errors import ModelError
from tests.support.crossing import crossed
from tests.support.families import (
    FAMILIES,
    KINDS_OF_FAMILY,
    defined,
    every_family,
    family,
    few_families,
    items,
)
from tests.support.injection import InjectedError, calls, injected
from tests.support.measures import MEASURES, every_measure
from tests.support.models import tiny_model
from tests.support.snapshots import assert_same, snapshot

frozen_in_part = pytest.mark.filterwarnings("ignore:.*(stay frozen|frozen before)")
"""For models that are `lived_in`, parts of whose heads are frozen; PEFT trains some of these parts, and not others."""

some_failures = pytest.mark.parametrize("most", [2, pytest.param(40, marks=pytest.mark.slow)])

OURS = ("/plasticity_peft/plasticity_peft/", "/plasticity_peft/")
THEIRS = ("/transformers/models/",)
PEFT = ("/peft/",)
PARTS = [pytest.param(OURS, id="ours"), pytest.param(THEIRS, id="the model's")]
"""Whose calls fail while a model is measured, as an axis of `crossed`."""

LAYOUTS = ("vit", "swin", "dinov2-swiglu")
"""Plain, in stages and windows, and gated: where more is tried than in every family."""


class Mark:
    """Hooks of the user, which must stay and go on being called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.calls += 1


def lived_in(model: nn.Module) -> nn.Module:
    """Returns the model as a user may have it: mixed modes and flags, gradients, hooks of every kind."""
    mark = Mark()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 > 0)
        if number % 4 == 1:
            parameter.grad = torch.full_like(parameter, 0.5)
        if number % 8 == 1:
            parameter.register_hook(mark)
    for number, module in enumerate(model.modules()):
        if number % 5 == 0:
            module.register_forward_hook(mark)
            module.register_forward_pre_hook(lambda *_: mark(), with_kwargs=True)
    random.seed(number)
    np.random.seed(number)
    np.random.standard_normal()  # the second of a pair of normal numbers is kept for later
    torch.manual_seed(number)
    return model


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def measuring(name: str, measure: str) -> tuple[nn.Module, Callable[[], Any]]:
    """Returns a model, and the function that measures it."""
    found = family(name)
    model = lived_in(found.build())
    data = items(found.images(4))
    return model, lambda: measure_plasticity(model, data, max_samples=2, batch_size=2, **MEASURES[measure])


@crossed(name=KINDS_OF_FAMILY, measure=MEASURES, possible=defined)
def test_a_measurement_leaves_the_model_as_found(name: str, measure: str) -> None:
    model, work = measuring(name, measure)
    before = snapshot(model)
    report = work()
    assert report.samples == 2
    assert_same(before, snapshot(model))


def fails_at(model: nn.Module, work: Callable[[], Any], parts: tuple[str, ...], numbers: Iterator[int]) -> None:
    """Lets call after call fail, and looks at the model after each."""
    before = snapshot(model)
    for number in numbers:
        with injected(parts, number) as injection, pytest.raises((InjectedError, PlasticityError)):
            work()
        assert injection.place, f"call {number} was never made"
        try:
            assert_same(before, snapshot(model))
        except AssertionError as error:
            raise AssertionError(f"after a failure at {injection.place}: {error}") from None


def spread(total: int, most: int, offset: int) -> Iterator[int]:
    """Returns up to `most` numbers from 1 to `total`, evenly."""
    step = max(1, total // most)
    yield from range(1 + offset % step, total + 1, step)


def total_calls(work: Callable[[], Any], parts: tuple[str, ...], warm: bool = True) -> int:
    if warm:
        work()  # caches of the first time
    return calls(parts, work)


@crossed(
    name=LAYOUTS[:2],
    measure=MEASURES,
    parts=[pytest.param(OURS, id="ours"), pytest.param(THEIRS, id="the model's")],
    possible=defined,
)
def test_a_failure_at_any_call_leaves_the_model_as_found(name: str, measure: str, parts: tuple[str, ...]) -> None:
    model, work = measuring(name, measure)
    total = total_calls(work, parts)
    assert total > 20
    fails_at(model, work, parts, spread(total, 3, len(name)))


@few_families
def test_a_measurement_and_a_failure_somewhere_leave_every_model_as_found(name: str) -> None:
    number = list(FAMILIES).index(name)
    measure = list(MEASURES)[number % 3] if FAMILIES[name].embedding else list(MEASURES)[1 + number % 2]
    model, work = measuring(name, measure)
    before = snapshot(model)
    assert work().samples == 2
    assert_same(before, snapshot(model))
    for parts, most in ((OURS, 2), (THEIRS, 1)):
        fails_at(model, work, parts, spread(total_calls(work, parts, warm=False), most, number * 7))


@pytest.mark.slow
@crossed(name=FAMILIES, measure=MEASURES, possible=defined)
def test_every_failure_leaves_every_model_as_found(name: str, measure: str) -> None:
    model, work = measuring(name, measure)
    most = 10**9 if name in LAYOUTS else 60
    for parts in (OURS, THEIRS):
        fails_at(model, work, parts, spread(total_calls(work, parts), most, 0))


@every_measure
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_no_exception_leaves_the_model_too(measure: str, error: type[BaseException]) -> None:
    model, work = measuring("vit", measure)
    layer = model.get_submodule("vit")

    def stop(*_: Any) -> None:
        raise error

    handle = layer.register_forward_hook(stop)
    before = snapshot(model)
    with pytest.raises(error):
        work()
    assert_same(before, snapshot(model))
    handle.remove()


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: torch.random.fork_rng(),
}


@crossed(surrounding=SURROUNDINGS, measure=MEASURES, fails=[False, True])
def test_it_does_not_matter_what_the_caller_is_in(measure: str, surrounding: str, fails: bool) -> None:
    model, work = measuring("vit", measure)
    expected = work()
    with SURROUNDINGS[surrounding]():
        before = snapshot(model)
        if fails:
            with injected(OURS, 300), pytest.raises((InjectedError, PlasticityError)):
                work()
        else:
            assert [row.mean for row in work().scores] == [row.mean for row in expected.scores]
        assert_same(before, snapshot(model))


def test_generators_of_accelerators_that_the_model_is_not_on_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is often measured before it is moved: what was seeded for its training must still hold there."""
    seeded = []
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeded.append)
    torch.manual_seed(42)
    before = list(seeded)
    assert set(before) == {42}
    for measure in MEASURES:
        _, work = measuring("vit", measure)
        seeded.clear()
        work()
        assert not seeded


def test_a_default_dtype_is_left_and_does_not_matter() -> None:
    _, work = measuring("vit", "embedding")
    expected = work()
    torch.set_default_dtype(torch.float64)
    try:
        assert [row.mean for row in work().scores] == pytest.approx([row.mean for row in expected.scores], rel=1e-6)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --------------------------------------------------------------------------------------------- get_peft_model

REPORTS: dict[str, PlasticityReport] = {}


def report_of(name: str) -> PlasticityReport:
    if name not in REPORTS:
        found = family(name)
        REPORTS[name] = measure_plasticity(found.build(), items(found.images(2)), criterion="random")
    return REPORTS[name]


def adapting(name: str, training: str, how: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    model = lived_in(family(name).build())
    report = report_of(name)

    def work(model: nn.Module) -> Any:
        config = PlasticityConfig(report=report, training=training, top_k=3, r=2)
        return get_peft_model(model, config) if how == "get_peft_model" else model.add_adapter(config)

    return model, work


def injection_fails_at(
    model: nn.Module, work: Callable[[nn.Module], Any], parts: tuple[str, ...], numbers: Iterator[int]
) -> None:
    """As `fails_at`, for what changes the model where it succeeds; only failures before the end of injection count."""
    before = snapshot(model)
    for number in numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with injected(parts, number) as injection, pytest.raises((InjectedError, PlasticityError)):
                work(model)
        try:
            assert_same(before, snapshot(model))
        except AssertionError as error:
            raise AssertionError(f"after a failure at {injection.place}, call {number}: {error}") from None


def calls_of_injection(
    name: str, work: Callable[[nn.Module], Any], parts: tuple[str, ...], warm: bool = True
) -> tuple[int, int]:
    """Returns how many calls there are before and after the tuner's work: what is around it is beyond our reach."""
    original, counted = LoraModel.inject_adapter, []
    if warm:
        work(lived_in(family(name).build()))  # caches of the first time
    model = lived_in(family(name).build())
    with injected(parts, None) as injection:

        def inject(self: Any, *args: Any, **kwargs: Any) -> None:
            counted.append(injection.count)
            original(self, *args, **kwargs)
            counted.append(injection.count)

        LoraModel.inject_adapter = inject  # type: ignore[method-assign]
        try:
            work(model)
        finally:
            LoraModel.inject_adapter = original  # type: ignore[method-assign]
    return counted[0] + 1, counted[1]


ADAPTING = list(itertools.product(LAYOUTS, ["lora", "full"], ["get_peft_model", "add_adapter"]))
SOME = [("vit", "full", "get_peft_model"), ("dinov2-swiglu", "lora", "add_adapter")]
"""Each mode and each way once."""


@frozen_in_part
@pytest.mark.parametrize(
    ("name", "training", "how"),
    [pytest.param(*case, marks=() if case in SOME else pytest.mark.slow) for case in ADAPTING],
)
def test_an_injection_that_fails_leaves_the_model_as_found(name: str, training: str, how: str) -> None:
    model, work = adapting(name, training, how)
    for parts in (OURS, PEFT):
        first, last = calls_of_injection(name, work, parts, warm=parts == OURS)
        assert last - first > 20
        injection_fails_at(model, work, parts, (first + number for number in spread(last - first, 6, len(how))))
    work(model)  # it can be adapted after all


@pytest.mark.slow
@frozen_in_part
@every_family
@pytest.mark.parametrize("training", ["lora", "full"])
def test_every_injection_that_fails_leaves_every_model_as_found(name: str, training: str) -> None:
    model, work = adapting(name, training, "get_peft_model")
    for parts in (OURS, PEFT):
        first, last = calls_of_injection(name, work, parts)
        most = 10**9 if name in LAYOUTS else 40
        injection_fails_at(model, work, parts, (first + number for number in spread(last - first, most, 0)))


@frozen_in_part
@few_families
def test_an_injection_that_fails_half_way_leaves_every_model_as_found(name: str) -> None:
    number = list(FAMILIES).index(name)
    model, work = adapting(name, ("lora", "full")[number % 2], "get_peft_model")
    first, last = calls_of_injection(name, work, PEFT)
    injection_fails_at(model, work, PEFT, iter((first + (last - first) * (number % 10) // 10 + 1, last - number % 20)))


@some_failures
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_second_adapter_that_fails_half_way_leaves_the_first(training: str, most: int) -> None:
    report = report_of("vit")
    first = PlasticityConfig(report=report, training=training, top_k=2, r=2)
    model = get_peft_model(FAMILIES["vit"].build(), first)

    def work(model: nn.Module) -> None:
        model.add_adapter("second", PlasticityConfig(report=report, training=training, top_k=3, r=2))

    total = calls_until_second(model, work)
    before = snapshot(model)
    for number in spread(total, most, 0):
        with injected(PEFT, number) as injection, pytest.raises(InjectedError):
            work(model)
        assert list(model.peft_config) == ["default"]
        try:
            assert_same(before, snapshot(model))
        except AssertionError as error:
            raise AssertionError(f"after a failure at {injection.place}, call {number}: {error}") from None
    work(model)
    model.set_adapter("second")


def calls_until_second(model: nn.Module, work: Callable[[nn.Module], None]) -> int:
    twin = copy.deepcopy(model)
    work(twin)
    twin = copy.deepcopy(model)
    return calls(PEFT, lambda: work(twin)) * 9 // 10


@some_failures
@pytest.mark.parametrize("training", ["lora", "full"])
def test_an_adapter_that_cannot_be_loaded_leaves_the_model_as_found(training: str, most: int, tmp_path: Any) -> None:
    report = measure_plasticity(tiny_model(), criterion="random")
    config = PlasticityConfig(report=report, training=training, top_k=3, r=2)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    model = lived_in(tiny_model())
    for parts in (OURS, PEFT):
        load_adapter(tiny_model(), tmp_path)
        total = calls(parts, lambda: load_adapter(tiny_model(), tmp_path))
        before = snapshot(model)
        # The number of calls depends a little on the model and on what the process has done before.
        for number in spread(total * 9 // 10, most, 0):
            with injected(parts, number) as injection, pytest.raises((InjectedError, PlasticityError)):
                load_adapter(model, tmp_path)
            try:
                assert_same(before, snapshot(model))
            except AssertionError as error:
                raise AssertionError(f"after a failure at {injection.place}, call {number}: {error}") from None
    assert isinstance(load_adapter(model, tmp_path), PeftModel)


@frozen_in_part
def test_options_that_peft_refuses_leave_the_model_as_found() -> None:
    """Not an exception of ours: PEFT raises after it has begun."""
    model = lived_in(tiny_model())
    report = measure_plasticity(model, criterion="random")
    before = snapshot(model)
    config = PlasticityConfig(training="lora", report=report, candidates="MHA", init_lora_weights="no such beginning")
    with pytest.raises(ValueError, match=r"no such beginning|init_lora_weights|[Uu]nknown"):
        get_peft_model(model, config)
    assert_same(before, snapshot(model))


def test_the_law_sees_what_is_left() -> None:
    """Each of the things that are looked at is missed where it changes."""
    changes: list[Callable[[nn.Module], Any]] = [
        lambda model: model.classifier.weight.data.add_(1),
        lambda model: model.classifier.train(not model.classifier.training),
        lambda model: model.classifier.weight.requires_grad_(not model.classifier.weight.requires_grad),
        lambda model: model.classifier.register_forward_hook(lambda *_: None),
        lambda model: model.classifier.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
        lambda model: model.classifier.weight.requires_grad_().register_hook(lambda *_: None),
        lambda model: setattr(model.classifier.weight, "grad", torch.zeros_like(model.classifier.weight)),
        lambda model: setattr(model.classifier, "extra", 1),
        lambda model: setattr(model.config, "extra", 1),
        lambda model: setattr(model, "classifier", nn.Linear(16, 3)),
        lambda model: get_peft_model(model, LoraConfig(target_modules=["classifier"])),
        lambda model: torch.rand(1),
        lambda model: np.random.rand(),
        lambda model: random.random(),
        lambda model: torch.set_default_dtype(torch.float64),
        lambda model: torch.set_grad_enabled(False),
    ]
    for number, change in enumerate(changes):
        model = tiny_model()
        before = snapshot(model)
        try:
            change(model)
            with pytest.raises(AssertionError):
                assert_same(before, snapshot(model))
        except BaseException as error:
            raise AssertionError(f"change {number}") from error
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_grad_enabled(True)


def test_a_model_that_is_refused_is_left_as_found() -> None:
    model = lived_in(nn.Sequential(nn.Linear(2, 2)))
    images = [torch.rand(3, 8, 8)] * 2
    before = snapshot(model)
    with pytest.raises(ModelError):
        measure_plasticity(model, images)
    assert_same(before, snapshot(model))
