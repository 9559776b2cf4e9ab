"""A real pretrained DINOv2-S on real images, where its weights are at hand."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from plasticity_peft import PlasticityConfig, PlasticityReport, measure_plasticity
from tests.support.models import REPOSITORY

FOLDER = REPOSITORY.parent / "shared" / "models" / "dinov2-small"
IMAGES = REPOSITORY / "examples" / "data" / "fashion_mnist.parquet"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the weights of DINOv2-S are not in {FOLDER}")


def slow(value: Any) -> Any:
    """Returns a case that only the slow tests run: a pass of this model takes a second."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def dinov2() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_pretrained(FOLDER, num_labels=10, dtype=torch.float32)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    cache = str(tmp_path_factory.mktemp("cache"))
    loaded = datasets.load_dataset("parquet", data_files=str(IMAGES), split="train[:24]", cache_dir=cache)
    processor = AutoImageProcessor.from_pretrained(FOLDER)
    pictures = [image.convert("RGB") for image in loaded["image"]]
    size = {"height": 56, "width": 56}
    return processor(images=pictures, size=size, do_center_crop=False, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("inputs", ["embedding", "activation"])
def test_norms_look_most_plastic_and_asking_for_them_warns(
    dinov2: PreTrainedModel, images: torch.Tensor, inputs: str
) -> None:
    """The tokens of DINOv2 are small, and a norm's rate of change is its gain over their spread."""
    report = measure_plasticity(dinov2, images, inputs=inputs, max_samples=12, batch_size=12)
    assert {row.unit for row in report.ranking()[:2]} == {"LN1", "LN2"}
    assert report.select(candidates=("MHA", "FC1", "FC2")).units == ("FC1",)
    with pytest.warns(UserWarning, match="LN2 ranks high because .* standard deviation of its input, which is 0.1"):
        assert report.select().units == ("LN2",)


def test_the_default_chooses_attention_and_leaves_norms_last(dinov2: PreTrainedModel, images: torch.Tensor) -> None:
    report = measure_plasticity(dinov2, images, max_samples=24, batch_size=8)
    ranking = [row.unit for row in report.ranking()]
    assert ranking[0] == "MHA"
    assert set(ranking[3:]) == {"LN1", "LN2"}


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_step_of_training_moves_what_was_chosen(
    dinov2: PreTrainedModel, images: torch.Tensor, training: str
) -> None:
    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_pretrained(FOLDER, num_labels=10, dtype=torch.float32)
    config = PlasticityConfig(
        target_data=images, max_samples=4, training=training, granularity="component", candidates=("MHA",), top_k=2
    )
    model = get_peft_model(base, config)
    model(pixel_values=images[:4], labels=torch.arange(4)).loss.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == config.selection.parameters[training] + 10 * 2 * 384 + 10


@pytest.mark.parametrize("options", [{}, slow({"inputs": "embedding"}), slow({"inputs": "activation"})], ids=str)
def test_it_settles_on_what_all_pairs_choose(
    dinov2: PreTrainedModel, images: torch.Tensor, options: dict[str, str]
) -> None:
    everything = measure_plasticity(dinov2, images, settle=None, max_samples=256, **options)
    found = measure_plasticity(dinov2, images, max_samples=256, **options)
    assert found.ranking()[0].unit == everything.ranking()[0].unit
    assert found.samples <= 128
    if "inputs" in options:
        assert found.ending.settled


@pytest.fixture(scope="module")
def full(dinov2: PreTrainedModel, images: torch.Tensor, options: dict[str, str]) -> PlasticityReport:
    """Returns what the model of float32 gives, once for both of the lower precisions."""
    return measure_plasticity(dinov2, images[:12], max_samples=12, settle=None, **options)


@pytest.mark.parametrize("dtype", [slow("bfloat16"), slow("float16")])
@pytest.mark.parametrize(
    "options", [{}, slow({"inputs": "embedding"}), slow({"inputs": "activation"})], ids=str, scope="module"
)
def test_lower_precision_gives_the_same_ranking(
    dinov2: PreTrainedModel, images: torch.Tensor, full: PlasticityReport, options: dict[str, str], dtype: str
) -> None:
    lower = measure_plasticity(dinov2, images[:12], max_samples=12, settle=None, dtype=dtype, **options)
    assert [row.unit for row in lower.ranking()] == [row.unit for row in full.ranking()]
    for one, other in zip(lower.kinds, full.kinds, strict=True):
        assert one.mean == pytest.approx(other.mean, rel=0.02)
