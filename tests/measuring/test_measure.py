"""The measure: the authors' numbers, an independent computation, laws, and a model left as found."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel, ViTForImageClassification
from transformers.utils import logging

from plasticity_peft import PlasticityConfig, PlasticityReport, find_components, measure_plasticity
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ModelError, NonFiniteError, SelectionError
from plasticity_peft.images.pairs import draw_pairs
from tests.support import oracles
from tests.support.measures import PROTOCOLS, distances, rates
from tests.support.models import GOLDEN, random_images, tiny_model
from tests.support.snapshots import assert_same, snapshot

IMAGES = random_images(12)
measure = partial(measure_plasticity, criterion="rate_of_change")


@pytest.fixture(scope="module")
def golden() -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(GOLDEN).eval()


def by_id(model: PreTrainedModel, values: Any) -> dict[str, np.ndarray]:
    """Returns the columns of (pairs, components) by canonical id."""
    return {part.id: np.asarray(column) for part, column in zip(find_components(model), values.T, strict=True)}


def pixels(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": images}


def measured(model: PreTrainedModel, inputs: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
    """Returns the rates of change that the package finds for each pair."""
    return by_id(model, rates(model, inputs, pixels(x), pixels(y)))


def test_the_authors_numbers_pair_by_pair(golden: ViTForImageClassification) -> None:
    """rates.json was written by the authors' own code on these weights and these six pairs."""
    pairs = load_file(GOLDEN / "pairs.safetensors")
    rows = json.loads((GOLDEN / "rates.json").read_text())["rows"]
    ours = measured(golden, "embedding", pairs["source"], pairs["target"])
    # The definition that everything else is compared with is theirs too.
    definition = oracles.rates(golden, "embedding", pixels(pairs["source"]), pixels(pairs["target"]))
    for found in (ours, by_id(golden, definition)):
        assert len(rows) == len(found) == 3 * 5
        for row in rows:
            assert len(row["rates"]) == 6
            np.testing.assert_allclose(found[f"{row['layer']}.{row['component']}"], row["rates"], rtol=1e-5)


def test_the_report_is_the_mean_of_the_authors_rates(golden: ViTForImageClassification) -> None:
    pairs = load_file(GOLDEN / "pairs.safetensors")
    report = measure(golden, pairs["target"], pairs["source"], max_samples=24, batch_size=5, seed=3)
    indices = draw_pairs(24, target=6, source=6, seed=3)
    ours = measured(golden, "embedding", pairs["source"][indices[:, 0]], pairs["target"][indices[:, 1]])
    for row in report.scores:
        np.testing.assert_allclose(row.mean, ours[row.id].mean(), rtol=1e-6)
        np.testing.assert_allclose(row.std, ours[row.id].std(ddof=1), rtol=1e-6)
    for kind in report.kinds:
        per_pair = np.mean([ours[f"{block}.{kind.kind}"] for block in range(3)], axis=0)
        np.testing.assert_allclose(kind.mean, per_pair.mean(), rtol=1e-6)
        np.testing.assert_allclose(kind.std, per_pair.std(ddof=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", oracles.PROTOCOLS)
def test_both_protocols_equal_an_independent_computation(
    model: PreTrainedModel, inputs: str, dtype: torch.dtype
) -> None:
    model, x, y = model.to(dtype), pixels(IMAGES[:5].to(dtype)), pixels(IMAGES[5:10].to(dtype))
    ours, expected = rates(model, inputs, x, y), oracles.rates(model, inputs, x, y)
    np.testing.assert_allclose(ours, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e25])
def test_the_shortcuts_are_exact(model: PreTrainedModel, scale: float) -> None:
    """Also where most of the difference of the tokens lies where a layer hardly looks, and squares would overflow."""
    with torch.no_grad():
        for part in find_components(model):
            if part.kind == "FC1":
                weight = model.get_submodule(part.path).weight
                weight *= torch.logspace(0, -4, weight.shape[1]) * scale
    fast = rates(model, "embedding", pixels(IMAGES[:6]), pixels(IMAGES[6:]))
    x, y = (pixels(half.double()) for half in (IMAGES[:6], IMAGES[6:]))
    np.testing.assert_allclose(fast, oracles.rates(model.double(), "embedding", x, y), rtol=1e-5)


def test_the_protocols_are_different_statistics(vit: PreTrainedModel) -> None:
    embedding, activation = (measure(vit, IMAGES, inputs=inputs, max_samples=8) for inputs in PROTOCOLS)
    assert embedding.scores[0].mean == pytest.approx(activation.scores[0].mean)
    assert embedding.scores[3].mean != pytest.approx(activation.scores[3].mean, rel=1e-2)


@pytest.mark.parametrize("inputs", PROTOCOLS)
@pytest.mark.parametrize("source", [None, random_images(9, seed=4)])
def test_batch_size_does_not_matter_and_the_seed_decides(
    vit: PreTrainedModel, inputs: str, source: torch.Tensor | None
) -> None:
    options = {"source_data": source, "inputs": inputs, "max_samples": 10}
    reports = [measure(vit, IMAGES, batch_size=size, **options) for size in (1, 3, 32)]
    for report in reports:
        assert [row.mean for row in report.scores] == pytest.approx([row.mean for row in reports[0].scores], rel=1e-6)
        assert (report.samples, report.uses_source) == (10, source is not None)
    assert measure(vit, IMAGES, batch_size=3, **options) == reports[1]
    assert measure(vit, IMAGES, seed=1, **options).scores != reports[2].scores


@pytest.mark.parametrize("kind", ["FC1", "FC2"])
def test_scaling_a_weight_scales_its_score_and_a_bias_changes_nothing(model: PreTrainedModel, kind: str) -> None:
    changed = copy.deepcopy(model)
    part = next(part for part in find_components(model) if part.kind == kind)
    with torch.no_grad():
        changed.get_submodule(part.path).weight *= 3
        changed.get_submodule(part.path).bias += 5
    before, after = (measure(each, IMAGES, max_samples=8) for each in (model, changed))
    for one, other in zip(before.scores, after.scores, strict=True):
        factor = 3 if one.id == part.id else 1
        assert other.mean == pytest.approx(factor * one.mean, rel=1e-5)


def test_identical_pairs_are_skipped_and_counted(vit: PreTrainedModel) -> None:
    images = torch.cat([IMAGES[:1], IMAGES[:1], IMAGES[:1], IMAGES[1:3]])
    indices = draw_pairs(10, target=5, source=None, seed=0)
    same = sum(set(pair) <= {0, 1, 2} for pair in indices.tolist())
    assert 0 < same < 9
    for inputs in PROTOCOLS:
        report = measure(vit, images, inputs=inputs, max_samples=10)
        assert (report.samples, report.skipped) == (10 - same, same)


@pytest.mark.parametrize("inputs", PROTOCOLS)
def test_half_precision_ranks_as_float32(golden: ViTForImageClassification, inputs: str) -> None:
    images = random_images(20, size=32)
    reports = {
        dtype: measure(copy.deepcopy(golden).to(dtype), images, inputs=inputs, max_samples=16)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    order = [row.unit for row in reports[torch.float32].ranking()]
    for report in reports.values():
        assert [row.unit for row in report.ranking()] == order
        for row, expected in zip(report.scores, reports[torch.float32].scores, strict=True):
            assert row.mean == pytest.approx(expected.mean, rel=0.03)


@pytest.mark.parametrize("inputs", PROTOCOLS)
def test_distances_of_half_precision_models_are_taken_in_float32(vit: PreTrainedModel, inputs: str) -> None:
    model = vit.bfloat16()
    x, y = (pixels(half.bfloat16()) for half in (IMAGES[:5], IMAGES[5:10]))
    with torch.no_grad():
        for found in distances(model, inputs)(x, y):
            assert found.dtype == torch.float64
            assert (found != found.bfloat16()).any(dim=0).all()


def test_dropout_and_the_mode_of_the_model_change_nothing() -> None:
    config = copy.deepcopy(tiny_model().config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.5
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    for inputs in PROTOCOLS:
        reports = [measure(model.train(mode), IMAGES, inputs=inputs, max_samples=8) for mode in (True, False)]
        assert reports[0] == reports[1]


def test_autocast_outside_changes_nothing(vit: PreTrainedModel) -> None:
    plain = measure(vit, IMAGES, max_samples=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure(vit, IMAGES, max_samples=4) == plain
        assert torch.is_autocast_enabled("cpu")


def test_a_peft_model_is_measured_with_its_adapter_under_the_names_of_its_base(vit: PreTrainedModel) -> None:
    expected = measure(vit, IMAGES, max_samples=4)
    paths = [path for part in find_components(vit) if part.kind == "FC1" for path in part.modules]
    adapted = get_peft_model(copy.deepcopy(vit), LoraConfig(target_modules=paths, init_lora_weights=True))
    assert measure(adapted, IMAGES, max_samples=4).scores[0].modules == expected.scores[0].modules
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    merged = copy.deepcopy(adapted).merge_and_unload()
    found, plain = (measure(each, IMAGES, max_samples=4).scores for each in (adapted, merged))
    assert [row.mean for row in found] == pytest.approx([row.mean for row in plain], rel=1e-5)
    assert [row.parameters for row in found] == [row.parameters for row in plain]


def test_a_narrow_fc2_is_refused_with_the_other_protocol_named() -> None:
    config = copy.deepcopy(tiny_model().config)
    config.intermediate_size = 12
    model = ViTForImageClassification(config).eval()
    with pytest.raises(ModelError, match=r'0.FC2 takes 12 features, and a token has 16 .* Use inputs="activation"'):
        measure(model, IMAGES, max_samples=4)
    assert measure(model, IMAGES, max_samples=4, inputs="activation").samples == 4


@pytest.mark.parametrize("inputs", PROTOCOLS)
def test_overflow_is_an_error_that_names_the_component(vit: PreTrainedModel, inputs: str) -> None:
    # The linear layers of the MLP are not called by the paper's protocol.
    name = "1.MHA" if inputs == "embedding" else "1.FC1"
    part = next(part for part in find_components(vit) if part.id == name)
    with torch.no_grad():
        vit.get_submodule(part.modules[-1]).weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=rf"of {name} \(vit.*\) contain NaN or infinity"):
        measure(vit, IMAGES, max_samples=4, inputs=inputs)


def test_no_progress_bar_where_hugging_face_shows_none(vit: PreTrainedModel, capsys: pytest.CaptureFixture) -> None:
    measure(vit, IMAGES, max_samples=4)
    assert "Measuring plasticity" in capsys.readouterr().err
    logging.disable_progress_bar()
    try:
        measure(vit, IMAGES, max_samples=4)
    finally:
        logging.enable_progress_bar()
    assert capsys.readouterr().err == ""


class Failing(torch.utils.data.Dataset):
    """Gives some images, draws random numbers, and then raises."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        self.given += 1
        torch.rand(1), np.random.rand()
        if self.given > 6:
            raise KeyError("the disk is gone")
        return IMAGES[index]


@pytest.mark.parametrize("inputs", PROTOCOLS)
@pytest.mark.parametrize("fault", [None, "data", "component"])
def test_the_model_is_left_as_found(model: PreTrainedModel, inputs: str, fault: str | None) -> None:
    model.train()
    list(model.modules())[7].eval()
    next(model.parameters()).requires_grad_(False)
    handles = []
    if fault == "component":
        part = find_components(model)[-2]

        def fail(*_: object) -> None:
            raise KeyError("the component is gone")

        handles.append(model.get_submodule(part.path).register_forward_hook(fail))
    before = snapshot(model)
    options = {"inputs": inputs, "max_samples": 6, "batch_size": 2}
    # FC1 is not called by the embedding protocol, but the check of the calls runs the whole model.
    if fault is None:
        measure(model, IMAGES, **options)
    else:
        with pytest.raises(KeyError, match="is gone"):
            measure(model, Failing() if fault == "data" else IMAGES, **options)
    assert_same(before, snapshot(model))


def test_kinds_come_in_the_order_of_a_block() -> None:
    assert [row.kind for row in measure(tiny_model(), IMAGES, max_samples=2).kinds] == list(KINDS)


def test_an_activation_that_works_in_place_does_not_change_the_scores(vit: PreTrainedModel) -> None:
    """FC1's output is then no longer what FC1 returned when FC2 gets it."""
    scores = []
    for inplace in (False, True):
        for block in find_architecture(vit).blocks:
            parts = [module for module in vit.get_submodule(block).modules() if hasattr(module, "activation_fn")]
            parts += [m for m in vit.get_submodule(block).modules() if hasattr(m, "intermediate_act_fn")]
            for part in parts:
                name = "activation_fn" if hasattr(part, "activation_fn") else "intermediate_act_fn"
                setattr(part, name, torch.nn.ReLU(inplace=inplace))
            assert parts
        report = measure_plasticity(vit, random_images(), inputs="activation", max_samples=4)
        scores.append([row.mean for row in report.scores])
    assert scores[0] == scores[1]


def test_a_device_without_double_precision_is_refused(vit: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnApple:
        device = torch.device("mps")

    monkeypatch.setattr(vit, "parameters", lambda *_, **__: iter([OnApple()]))
    with pytest.raises(ModelError, match=r"mps\), which has no float64. Measure it on the CPU"):
        measure_plasticity(vit, random_images())


# ---- budgets


@pytest.mark.parametrize(
    "options",
    [{"budget": 1e-6}, {"budget": "0.01 time"}, {"budget": 0.05, "candidates": ("MHA",), "training": "full"}],
    ids=["parameters", "time", "candidates"],
)
def test_a_budget_that_nothing_fits_into_is_refused_before_measuring(
    vit: PreTrainedModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "plasticity_peft.measuring.measure.observe_until_settled", lambda *_, **__: pytest.fail("measured")
    )
    with pytest.raises(SelectionError, match=r"of at least|fits whichever") as caught:
        measure_plasticity(vit, random_images(6), max_samples=4, **options)
    assert caught.value.report is None


def test_a_measurement_is_kept_if_the_budget_does_not_fit_the_best_unit(vit: PreTrainedModel) -> None:
    images = random_images(8)
    sizes = {row.kind: 0 for row in find_components(vit)}
    for row in find_components(vit):
        sizes[row.kind] += row.parameters
    budget = 1.01 * min(sizes.values()) / sum(parameter.numel() for parameter in vit.parameters())
    options = {"max_samples": 6, "budget": budget, "training": "full"}
    report = measure_plasticity(vit, images, **options)
    assert report.ending is None
    assert PlasticityReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    with pytest.raises(SelectionError, match="the attribute `report` of this error") as caught:
        get_peft_model(vit, PlasticityConfig(target_data=images, **options))
    assert caught.value.report == report
    assert PlasticityConfig(report=caught.value.report, top_k=1).select(report).units
