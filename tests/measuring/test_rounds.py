"""Measuring as a user sees it: when it ends, what it says, and that memory, precision and offloading do not matter."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from peft import get_peft_model
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from plasticity_peft import PlasticityConfig, measure_plasticity
from plasticity_peft.errors import ConfigError, ModelError
from tests.support.crossing import crossed
from tests.support.forking import STOCK, run_code
from tests.support.logs import warned_of_selections
from tests.support.measures import MEASURES, means
from tests.support.models import REPOSITORY, random_images, tiny_model
from tests.support.snapshots import assert_same, snapshot

IMAGES = random_images(60)
each_measure = pytest.mark.parametrize("options", MEASURES.values(), ids=MEASURES)


# ---- when it ends


@each_measure
def test_it_ends_when_the_choice_is_settled(vit: PreTrainedModel, options: dict[str, str]) -> None:
    all_pairs = measure_plasticity(vit, IMAGES, settle=None, max_samples=1000, **options)
    found = measure_plasticity(vit, IMAGES, max_samples=1000, **options)
    most = 60 if "criterion" in options else 1000
    assert (all_pairs.samples, all_pairs.ending) == (most, None)
    assert found.ending.settled
    assert (found.ending.planned, found.ending.confidence, found.ending.granularity) == (most, 0.95, "kind")
    assert found.samples in [look for look in (32, 64) if look < most]
    assert found.ending.units == (all_pairs.ranking()[0].unit,)
    # What was looked at are the first of all pairs, or images.
    same = measure_plasticity(vit, IMAGES, settle=None, max_samples=found.samples, **options)
    assert means(found) == pytest.approx(means(same), rel=1e-6)
    assert f"Settled after {found.samples} of {most} " in str(found)


def tied_model() -> PreTrainedModel:
    """Returns a model whose two norms are alike, and come first by the paper's measure."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        if "layernorm_" in name:
            torch.nn.init.constant_(parameter, 50.0 if name.endswith("weight") else 0.0)
    return model


def test_a_tie_goes_to_the_end_and_is_reported() -> None:
    with warned_of_selections() as messages:
        found = measure_plasticity(tied_model(), IMAGES, inputs="embedding", max_samples=100)
        with pytest.warns(UserWarning, match="LN1 ranks high"):
            assert found.select().tied == ("LN1", "LN2")
    assert (found.samples, found.ending.settled, found.ending.units) == (100, False, ("LN1",))
    assert "Not settled: LN1 does not stand out from the rest (95% confidence)." in str(found)
    (warning,) = messages  # once, though the report was selected from as well
    assert warning == (
        "The selection of LN1 from 100 pairs is not settled: its confidence is none, because the scores of LN1 and "
        "LN2 are equal. Another top_k or budget may settle it."
    )
    both = measure_plasticity(tied_model(), IMAGES, inputs="embedding", max_samples=100, top_k=2)
    assert (both.samples, both.ending.settled) == (32, True)


def test_the_config_settles_what_it_chooses() -> None:
    config = PlasticityConfig(training="lora", target_data=IMAGES, inputs="embedding", max_samples=100, top_k=2)
    with pytest.warns(UserWarning, match="ranks high because"):
        get_peft_model(tied_model(), config)
    assert config.report.samples == 32
    assert config.report.ending.units == config.selection.units
    config = PlasticityConfig(
        target_data=IMAGES, granularity="component", budget=0.3, training="full", max_samples=400
    )
    get_peft_model(tiny_model(), config)
    assert set(config.report.ending.units) == set(config.selection.units)
    assert (config.report.ending.granularity, config.report.ending.planned) == ("component", 60)
    config = PlasticityConfig(training="lora", target_data=IMAGES, settle=None)
    get_peft_model(tiny_model(), config)
    assert (config.report.samples, config.report.ending) == (60, None)


@pytest.mark.parametrize("settle", [0, 1, 1.5, -0.1, "0.95", True])
def test_what_is_no_confidence_is_refused(vit: PreTrainedModel, settle: Any) -> None:
    for make in (
        lambda: measure_plasticity(vit, IMAGES, settle=settle),
        lambda: PlasticityConfig(training="lora", settle=settle),
    ):
        with pytest.raises(ConfigError, match="settle must be a confidence above 0 and below 1"):
            make()


def test_a_stream_is_read_no_further_than_it_takes_to_settle(
    vit: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plasticity_peft.images.sources.BUFFER_IMAGES", 20)
    read = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            read.append(0)
            yield IMAGES[len(read) % 60] + 0.001 * len(read)

    for inputs, most in (("embedding", 64), (None, 32)):
        read.clear()
        report = measure_plasticity(vit, endless(), inputs=inputs, max_samples=10_000)
        assert (report.samples, report.ending.planned) == (32, 10_000)
        assert len(read) == most + 20


def test_a_short_stream_is_used_up(vit: PreTrainedModel) -> None:
    report = measure_plasticity(vit, (image for image in IMAGES), settle=None, max_samples=1000)
    assert report.samples == 60
    report = measure_plasticity(vit, (image for image in IMAGES[:5]), inputs="activation", max_samples=1000)
    assert report.samples == 10


# ---- what it says


def shown(vit: PreTrainedModel, capfd: pytest.CaptureFixture[str]) -> str:
    measure_plasticity(vit, IMAGES)
    out, err = capfd.readouterr()
    assert out == ""
    return err


def test_a_progress_bar_that_can_be_switched_off(vit: PreTrainedModel, capfd: pytest.CaptureFixture[str]) -> None:
    best = measure_plasticity(vit, IMAGES).ranking()[0].unit
    capfd.readouterr()
    bar = shown(vit, capfd)
    assert "Measuring plasticity: 100%" in bar
    assert "32/32" in bar
    assert f"selected so far: {best}" in bar
    try:
        transformers_logging.disable_progress_bar()
        assert shown(vit, capfd) == ""
    finally:
        transformers_logging.enable_progress_bar()
    try:
        disable_progress_bars()
        assert shown(vit, capfd) == ""
    finally:
        enable_progress_bars()
    assert "Measuring plasticity" in shown(vit, capfd)


def test_messages_follow_the_verbosity_of_transformers() -> None:
    logger = logging.getLogger("transformers.plasticity_peft.measuring.measure")
    before = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()
        assert not logger.isEnabledFor(logging.WARNING)
        transformers_logging.set_verbosity_info()
        assert logger.isEnabledFor(logging.INFO)
    finally:
        transformers_logging.set_verbosity(before)


# ---- memory


def short_of_memory(model: torch.nn.Module, most: int) -> list[int]:
    """Makes a model run out of memory for more than `most` images; returns a list of the batches that it takes."""
    taken: list[int] = []

    def check(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
        count = len(kwargs["pixel_values"])
        if count > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        taken.append(count)

    model.register_forward_pre_hook(check, with_kwargs=True)
    return taken


@each_measure
def test_batches_are_halved_where_memory_does_not_suffice(options: dict[str, str]) -> None:
    expected = measure_plasticity(tiny_model(), IMAGES, settle=None, max_samples=50, batch_size=32, **options)
    model = tiny_model()
    taken = short_of_memory(model, most=10)
    found = measure_plasticity(model, IMAGES, settle=None, max_samples=50, batch_size=32, **options)
    images = 1 if "criterion" in options else 2
    # 32, 16 (, 8) do not fit; from then on no more than what fits is tried.
    assert max(taken) == {1: 8, 2: 4 * 2}[images]
    assert found.samples == expected.samples == 50
    assert means(found) == pytest.approx(means(expected), rel=1e-5)


def test_where_nothing_fits_it_says_so(vit: PreTrainedModel) -> None:
    short_of_memory(vit, most=2)
    before = snapshot(vit)
    with pytest.raises(ModelError, match="Out of memory for a batch of 8 images, by criterion='feature_norm'"):
        measure_plasticity(vit, IMAGES, criterion="feature_norm", batch_size=8)
    model = tiny_model()
    measured = []
    model.register_forward_pre_hook(
        lambda m, a, kwargs: measured.append(len(kwargs["pixel_values"])), with_kwargs=True
    )

    def fail(*_: Any) -> None:
        if len(measured) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    model.register_forward_pre_hook(fail)
    with pytest.raises(ModelError, match="Out of memory for one image, by criterion="):
        measure_plasticity(model, IMAGES)
    assert_same(before, snapshot(vit))


REALLY_SHORT = """
import pathlib, resource
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging
from plasticity_peft import measure_plasticity

torch.set_num_threads(1)
torch.manual_seed(0)
config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=128,
                   patch_size=4, attn_implementation="eager")
model = ViTForImageClassification(config)
images = torch.rand(24, 3, 128, 128)
expected = measure_plasticity(model, images, inputs="activation", max_samples=12, batch_size=1)
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, resource.RLIM_INFINITY))
found = measure_plasticity(model, images, inputs="activation", max_samples=12, batch_size=12)
for one, other in zip(found.scores, expected.scores):
    assert abs(one.mean - other.mean) < 1e-5 * other.mean
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_a_process_that_really_runs_out_of_memory_goes_on(tmp_path: Path) -> None:
    result = run_code(REALLY_SHORT, folder=tmp_path, parent=STOCK)
    assert result.returncode == 0, result.stderr
    assert "Out of memory: measuring continues with 6 pairs per pass." in result.stderr


# ---- precision


@crossed(measure=MEASURES, dtype=["bfloat16", torch.float16])
def test_lower_precision_gives_the_same_ranking(measure: str, dtype: Any) -> None:
    options = MEASURES[measure]
    model = AutoModelForImageClassification.from_pretrained(REPOSITORY / "examples" / "fashion-mnist-vit")
    size = model.config.image_size
    images = random_images(32, size=size) * 2 - 1
    if model.config.num_channels == 1:
        images = images[:, :1]
    before = snapshot(model)
    full = measure_plasticity(model, images, max_samples=32, **options)
    found = measure_plasticity(model, images, max_samples=32, dtype=dtype, **options)
    assert_same(before, snapshot(model))
    assert [row.unit for row in found.ranking()] == [row.unit for row in full.ranking()]
    assert means(found) == pytest.approx(means(full), rel=0.1)
    assert means(found) != means(full)


@pytest.mark.parametrize("dtype", ["float32", "int8", torch.float64, 16])
def test_what_is_no_precision_to_measure_in_is_refused(vit: PreTrainedModel, dtype: Any) -> None:
    for make in (
        lambda: measure_plasticity(vit, IMAGES, dtype=dtype),
        lambda: PlasticityConfig(training="lora", dtype=dtype),
    ):
        with pytest.raises(ConfigError, match="dtype must be one of 'bfloat16', 'float16', or None"):
            make()
    assert PlasticityConfig(training="lora", dtype=torch.bfloat16).dtype == "bfloat16"


# ---- weights that are elsewhere


def offloaded(way: str, folder: Path) -> PreTrainedModel:
    model = tiny_model()
    if way == "CPU":
        return cpu_offload(model, execution_device="cpu")
    if way == "disk":
        return disk_offload(model, folder, execution_device="cpu")
    (blocks,) = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    devices = {name: "cpu" for name, _ in model.named_children() if name != model.base_model_prefix}
    devices |= {f"{blocks}.0": "cpu", f"{blocks}.1": "disk"}
    inside = [name for name, _ in model.named_modules() if name.count(".") == 1 and not blocks.startswith(name)]
    devices |= dict.fromkeys(inside, "cpu")
    return dispatch_model(model, devices, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("way", ["CPU", "disk", "device_map"])
@pytest.mark.parametrize(
    "options",
    [*MEASURES.values(), {"criterion": "condition_number"}, {"criterion": "feature_norm"}, {"criterion": "bound"}],
    ids=lambda options: "-".join(options.values()),
)
def test_offloaded_models_are_measured_and_left_as_found(way: str, options: dict[str, str], tmp_path: Path) -> None:
    model = offloaded(way, tmp_path)
    devices = {name: parameter.device for name, parameter in model.named_parameters()}
    assert torch.device("meta") in devices.values()
    expected = measure_plasticity(tiny_model(), IMAGES, max_samples=8, **options)
    found = measure_plasticity(model, IMAGES, max_samples=8, **options)
    assert means(found) == pytest.approx(means(expected), rel=1e-5)
    assert {name: parameter.device for name, parameter in model.named_parameters()} == devices


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_model())(tiny_model().config)
    with pytest.raises(ModelError, match=r"has no weights yet: .* is on the meta device"):
        measure_plasticity(model, IMAGES)
