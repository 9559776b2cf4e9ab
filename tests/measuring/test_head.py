"""The fitted head: equal to scikit-learn, to a model that is fitted without each image in turn, and on any split."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import log_softmax
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

from plasticity_peft import PlasticityConfig, find_components, fit_head, measure_plasticity
from plasticity_peft.errors import ConfigError, DataError, ModelError
from plasticity_peft.measuring.processes import Share
from plasticity_peft.measuring.ridge import Ridge, Sums
from plasticity_peft.report.head import HeadFit
from plasticity_peft.saved.record import AdapterRecord
from tests.support.forking import run_script
from tests.support.models import backbone, tiny_model
from tests.support.processes import in_threads

QUERY = find_components(tiny_model())[1].modules[0]
PENALTIES = (0.1, 1.0, 10.0, 100.0)


def labeled(count: int, labels: Any, *, seed: int = 0) -> list[dict[str, Any]]:
    """Returns images whose mean depends on their label, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    shift = torch.as_tensor(labels, dtype=torch.float32).reshape(count, -1).mean(dim=1)
    return [
        {"pixel_values": image + by, "labels": label} for image, by, label in zip(images, shift, labels, strict=True)
    ]


def features(model: nn.Module, items: list[dict[str, Any]]) -> np.ndarray:
    """Returns what the classifier of a ViT receives, computed without the code under test."""
    with torch.no_grad():
        tokens = model.vit(pixel_values=torch.stack([item["pixel_values"] for item in items])).last_hidden_state
    return tokens[:, 0].numpy()


def logits(model: nn.Module, items: list[dict[str, Any]]) -> np.ndarray:
    with torch.no_grad():
        return model(pixel_values=torch.stack([item["pixel_values"] for item in items])).logits.numpy()


def test_it_is_the_ridge_classifier_of_scikit_learn(vit: nn.Module) -> None:
    items = labeled(40, [number % 3 for number in range(40)])
    found = fit_head(vit, items, penalties=PENALTIES)
    theirs = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=PENALTIES))
    theirs.fit(features(vit, items), [item["labels"] for item in items])
    assert found.penalty == theirs[-1].alpha_
    decision = theirs.decision_function(features(vit, items))
    np.testing.assert_allclose(logits(vit, items), found.temperature * decision, atol=2e-4)


def test_leave_one_out_is_a_fit_without_each_sample_in_turn() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(12, 2))
    ridge = Ridge(Sums.of(x, y))
    z = (x - x.mean(axis=0)) / x.std(axis=0)  # the scale is that of all samples, as in scikit-learn's pipelines
    for row, predicted in enumerate(ridge.left_out(x, y, 3.0)):
        others = np.arange(12) != row
        # With a free intercept, each sample left out also changes the means.
        theirs = SklearnRidge(alpha=3.0).fit(z[others], y[others]).predict(z[[row]])[0]
        np.testing.assert_allclose(predicted, theirs, rtol=1e-8)


@pytest.mark.parametrize("splits", [(0, 7), (3, 3, 1), (20, 20), (39, 1)])
def test_sums_of_parts_are_the_sums_of_all(splits: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    count = sum(splits)
    x, y = 100 + rng.normal(size=(count, 4)), rng.normal(size=(count, 2))
    merged, parts = Sums.of(x[:0], y[:0]), [Sums.of(*part) for part in zip(*cut(splits, x, y), strict=True)]
    for part in parts:
        before = merged.xx.copy()
        previous, merged = merged, merged.merge(part)
        np.testing.assert_array_equal(previous.xx, before)
    of_processes = in_threads(len(parts), lambda rank: parts[rank].of_all(Share(rank, len(parts))))
    whole = Sums.of(x, y)
    for found in (merged, *of_processes):
        assert found.count == whole.count
        for name in ("x", "y", "xx", "xy"):
            np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def cut(splits: tuple[int, ...], *arrays: np.ndarray) -> list[list[np.ndarray]]:
    """Returns the parts of each array, of these lengths."""
    return [np.split(array, np.cumsum(splits)[:-1]) for array in arrays]


def test_the_temperature_is_the_best_for_the_loss_and_the_loss_is_that_of_images_left_out(vit: nn.Module) -> None:
    items = labeled(60, [number % 3 for number in range(60)])
    found = fit_head(vit, items)
    x, labels = features(vit, items), np.array([item["labels"] for item in items])
    y = 2 * np.eye(3)[labels] - 1
    left_out = Ridge(Sums.of(x, y)).left_out(x, y, found.penalty)

    def loss(temperature: float) -> float:
        return float(-log_softmax(temperature * left_out, axis=1)[np.arange(60), labels].mean())

    assert found.loss == pytest.approx(loss(found.temperature), rel=1e-4)
    assert all(loss(found.temperature) <= loss(found.temperature * factor) for factor in (0.8, 0.95, 1.05, 1.25))
    assert found.score == pytest.approx((left_out.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_size_of_a_pass_changes_nothing(batch_size: int) -> None:
    items = labeled(30, [number % 3 for number in range(30)])
    one, other = tiny_model(), tiny_model()
    first, second = fit_head(one, items), fit_head(other, items, batch_size=batch_size)
    assert second.problem_type == first.problem_type
    numbers = [
        {key: value for key, value in asdict(found).items() if key != "problem_type"} for found in (first, second)
    ]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-3)
    torch.testing.assert_close(other.classifier.weight, one.classifier.weight, rtol=1e-3, atol=1e-4)


def test_only_the_head_changes(vit: nn.Module) -> None:
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    vit.train()
    fit_head(vit, labeled(20, [number % 3 for number in range(20)]))
    changed = {name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert vit.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


def test_an_image_alone_decides_its_own_left_out_prediction_in_no_way() -> None:
    """A wrong label is seen as wrong when its image is left out."""
    items = labeled(40, [0] * 20 + [1] * 20)
    for item in items[:20]:
        item["pixel_values"] = item["pixel_values"] - 3
    items[0]["labels"] = 1
    found = fit_head(tiny_model(num_labels=2), items)
    assert found.score == pytest.approx(39 / 40)


def problem(problem_type: str, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=outputs, problem_type=problem_type,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def test_a_label_that_does_not_fit_the_head_is_named(vit: nn.Module) -> None:
    before = vit.classifier.weight.clone()
    with pytest.raises(DataError, match=r"from 0 to 2, as the model's head has 3 outputs\. Got 0 to 7"):
        fit_head(vit, labeled(10, [0, 7] * 5))
    with pytest.raises(DataError, match="no label"):
        fit_head(vit, torch.rand(4, 3, 8, 8))
    with pytest.raises(ConfigError, match="penalties must be a number above 0"):
        fit_head(vit, labeled(10, [0, 1] * 5), penalties=[0.0])
    assert torch.equal(vit.classifier.weight, before)


def test_a_model_without_a_head_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"ViTModel: a head can be fitted if .* Its head is: none"):
        fit_head(backbone(), labeled(10, [0, 1] * 5))


def test_what_it_returns_says_what_was_fitted(vit: nn.Module) -> None:
    found = fit_head(vit, labeled(10, [0, 1] * 5))
    assert isinstance(found, HeadFit)
    assert (found.problem_type, found.images, found.features, found.outputs) == (
        "single_label_classification",
        10,
        16,
        3,
    )


def test_several_labels_per_image_are_fitted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (40, 3)).astype(np.float32)
    items = labeled(40, labels)
    model = problem("multi_label_classification", 3)
    found = fit_head(model, items, penalties=[10.0])
    x, y = features(model, items), 2 * labels - 1
    theirs = make_pipeline(StandardScaler(), SklearnRidge(alpha=10.0)).fit(x, y)
    np.testing.assert_allclose(logits(model, items), found.temperature * theirs.predict(x), atol=2e-4)
    left_out = Ridge(Sums.of(x, y)).left_out(x, y, 10.0)
    assert found.score == pytest.approx(((left_out > 0) == (labels > 0)).mean())
    own = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(found.temperature * left_out), torch.from_numpy(labels).double()
    )
    assert found.loss == pytest.approx(float(own), rel=1e-4)


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_are_fitted_as_they_are(outputs: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, outputs)).astype(np.float32)
    items = labeled(40, values if outputs > 1 else values[:, 0])
    model = problem("regression", outputs)
    found = fit_head(model, items, penalties=[1.0])
    x = features(model, items)
    theirs = make_pipeline(StandardScaler(), SklearnRidge(alpha=1.0)).fit(x, values)
    np.testing.assert_allclose(logits(model, items), theirs.predict(x).reshape(40, outputs), atol=2e-4)
    left_out = Ridge(Sums.of(x, values)).left_out(x, values, 1.0)
    assert found.temperature == 1.0
    assert found.loss == pytest.approx(((left_out - values) ** 2).mean())
    assert found.score == pytest.approx(1 - ((left_out - values) ** 2).sum() / ((values - values.mean(0)) ** 2).sum())


def test_a_config_fits_the_head_before_it_measures() -> None:
    """A gradient criterion ranks by what comes through the fitted head."""
    items = labeled(40, [number % 3 for number in range(40)])
    options = {"criterion": "gradient_norm", "max_samples": 16, "batch_size": 8, "settle": None}
    by_hand = tiny_model()
    found = fit_head(by_hand, items, batch_size=8)
    expected = measure_plasticity(by_hand, items, **options)
    config = PlasticityConfig(target_data=items, fit_head=True, **{"training": "lora", **options})
    model = get_peft_model(tiny_model(), config)
    assert config.head_fit == found
    assert config.report.scores == expected.scores
    assert config.report.scores != measure_plasticity(tiny_model(), items, **options).scores
    np.testing.assert_array_equal(logits(model, items), logits(by_hand, items))
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model, items), logits(by_hand, items))


def test_what_was_found_is_saved_beside_the_adapter(tmp_path: Path) -> None:
    items = labeled(20, [number % 3 for number in range(20)])
    config = PlasticityConfig(training="lora", target_data=items, fit_head=True, criterion="bound")
    get_peft_model(tiny_model(), config).save_pretrained(str(tmp_path))
    assert AdapterRecord.read(tmp_path).adapter.head_fit == config.head_fit


def test_a_report_and_images_to_fit_the_head_go_together() -> None:
    items = labeled(20, [number % 3 for number in range(20)])
    report = measure_plasticity(tiny_model(), items, max_samples=8)
    config = PlasticityConfig(training="lora", report=report, target_data=items, fit_head=True)
    get_peft_model(tiny_model(), config)
    assert config.report == report
    assert config.head_fit.images == 20
    with pytest.raises(ConfigError, match="fit_head=True needs labeled images"):
        get_peft_model(tiny_model(), PlasticityConfig(training="lora", report=report, fit_head=True))


def test_a_head_that_was_fitted_in_vain_is_as_it_was() -> None:
    items = labeled(20, [number % 3 for number in range(20)])
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="top_k"):  # found out after measuring
        get_peft_model(
            model, PlasticityConfig(training="lora", target_data=items, fit_head=True, top_k=9, max_samples=8)
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_further_adapter_leaves_the_head_of_the_first_alone() -> None:
    items = labeled(20, [number % 3 for number in range(20)])
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=[QUERY], modules_to_save=["classifier"]))
    first = logits(model, items)
    config = PlasticityConfig(training="lora", target_data=items, fit_head=True, criterion="bound", candidates="FC1")
    model.add_adapter("fitted", config)
    np.testing.assert_array_equal(logits(model, items), first)
    model.set_adapter("fitted")
    fitted = tiny_model()
    fit_head(fitted, items)
    np.testing.assert_allclose(logits(model, items), logits(fitted, items), atol=1e-5)


def test_an_adapter_that_is_trained_has_its_own_head_fitted() -> None:
    """`fit_head` sets the head that the model uses: that of the active adapter."""
    items = labeled(20, [number % 3 for number in range(20)])
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=[QUERY], modules_to_save=["classifier"]))
    with model.disable_adapter():
        before = logits(model, items)
    fit_head(model, items)
    fitted = tiny_model()
    fit_head(fitted, items)
    np.testing.assert_allclose(logits(model, items), logits(fitted, items), atol=1e-5)
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model, items), before)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (
            lambda: DeiTForImageClassificationWithTeacher(tiny_model("deit").config),
            r"cls_classifier \(Linear\), distillation_classifier \(Linear\)",
        ),
        (lambda: tiny_model_with(nn.Sequential(nn.Linear(16, 3), nn.Softmax(-1))), r"classifier \(Sequential\)"),
        (lambda: tiny_model_with(nn.Linear(16, 3, bias=False)), r"classifier \(Linear\)"),
    ],
    ids=["two heads", "not linear at the end", "no bias"],
)
def test_other_heads_are_refused_by_name(make: Any, parts: str) -> None:
    with pytest.raises(ModelError, match=f"whose output is the logits of the model. Its head is: {parts}"):
        fit_head(make(), labeled(10, [0, 1] * 5))


def tiny_model_with(head: nn.Module) -> nn.Module:
    model = tiny_model()
    model.classifier = head
    return model


@pytest.mark.parametrize("name", ["deit", "dinov2"])
def test_other_architectures_have_their_head_fitted(name: str) -> None:
    """The head of DINOv2 receives the first token and the mean of the others."""
    items = labeled(40, [number % 3 for number in range(40)])
    model = tiny_model(name)
    received: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    logits(model, items)
    theirs = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=PENALTIES))
    theirs.fit(received[0].numpy(), [item["labels"] for item in items])
    found = fit_head(model, items, penalties=PENALTIES)
    decision = theirs.decision_function(received[0].numpy())
    np.testing.assert_allclose(logits(model, items), found.temperature * decision, atol=5e-4)


SCRIPT = """
import json
import sys
from dataclasses import asdict
from pathlib import Path
from accelerate import PartialState
from plasticity_peft import fit_head
from tests.measuring.test_head import labeled, tiny_model
state = PartialState(cpu=True)
model = tiny_model()
found = fit_head(model, labeled(50, [number % 3 for number in range(50)]), batch_size=4)
row = {**asdict(found), "weights": float(model.classifier.weight.detach().abs().sum())}
Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps(row))
state.destroy_process_group()
"""


def test_several_processes_fit_the_head_of_one(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    run = run_script(tmp_path / "script.py", tmp_path, cwd=tmp_path, processes=2)
    assert run.returncode == 0, run.stderr
    rows = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    alone = tiny_model()
    one = asdict(fit_head(alone, labeled(50, [number % 3 for number in range(50)]), batch_size=4))
    for row in rows:
        assert row.pop("problem_type") == one["problem_type"]
        assert row.pop("weights") == pytest.approx(float(alone.classifier.weight.detach().abs().sum()), rel=1e-6)
        assert row == pytest.approx({name: value for name, value in one.items() if name in row}, rel=1e-6)
