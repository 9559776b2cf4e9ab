"""Every criterion against a computation of its own, and the laws that all of them keep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import PreTrainedModel

from plasticity_peft import PlasticityConfig, PlasticityReport, find_components, measure_plasticity
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.criteria import CRITERIA, DEFAULT, gradients
from plasticity_peft.criteria.bound import attention_bound
from plasticity_peft.criteria.feature_norm import feature_norm
from plasticity_peft.errors import ConfigError, ModelError, NonFiniteError
from plasticity_peft.images.indexed import Images
from plasticity_peft.images.sampler import Probe
from plasticity_peft.measuring.left_as_found import left_as_found
from plasticity_peft.measuring.moments import Moments
from plasticity_peft.measuring.processes import Share
from plasticity_peft.measuring.rounds import Table, _Progress, _Worker
from plasticity_peft.measuring.settling import Settling
from plasticity_peft.report.selection import Choice
from tests.support.models import backbone, random_images, tiny_model
from tests.support.snapshots import assert_same, snapshot

IMAGES = random_images(12)
LABELS = torch.arange(12) % 3
LABELLED = [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]
WITH_PROTOCOLS = {name for name, rule in CRITERIA.items() if rule.protocols}
EACH = [(name, inputs) for name in CRITERIA for inputs in (("embedding", "activation") if name in WITH_PROTOCOLS else (None,))]  # fmt: skip  # noqa: E501


def measure(model: PreTrainedModel, criterion: str, inputs: str | None = None, **options: Any) -> PlasticityReport:
    return measure_plasticity(model, LABELLED, criterion=criterion, inputs=inputs, **{"pairs": 12, **options})


def means(report: PlasticityReport) -> dict[str, float]:
    return {row.id: row.mean for row in report.scores}


def probe(**options: Any) -> Probe:
    defaults = {
        "target": Images(LABELLED, "target", 0), "source": None, "inputs": "embedding", "count": 12, "batch_size": 5,
        "seed": 0, "device": torch.device("cpu"), "dtype": torch.float32,
    }  # fmt: skip
    return Probe(**{**defaults, **options})


def weights(model: PreTrainedModel, part: Component) -> dict[str, torch.Tensor]:
    modules = {path: model.get_submodule(path) for path in part.modules}
    return {f"{path}.{name}": p for path, module in modules.items() for name, p in module.named_parameters()}


def embeddings(model: PreTrainedModel) -> torch.nn.Module:
    return getattr(model, model.base_model_prefix).embeddings


def output(model: PreTrainedModel, part: Component, tokens: torch.Tensor) -> torch.Tensor:
    """Returns f(tokens) by the paper's protocol, zeros appended for FC2."""
    module = model.get_submodule(part.path)
    if part.kind == "FC2":
        tokens = F.pad(tokens, (0, module.in_features - tokens.shape[-1]))
    found = module(tokens)
    return found[0] if isinstance(found, tuple) else found


# ---- each against its own formula


def test_parameter_plasticity_is_the_norm_of_the_jacobian(model: PreTrainedModel) -> None:
    """The exact Jacobian of what the head receives, row by row, against the mean of many random projections."""
    parts, head = find_components(model), model.classifier
    exact = dict.fromkeys((part.id for part in parts), 0.0)
    for image in IMAGES:
        seen: list[torch.Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(pixel_values=image[None])
        handle.remove()
        for feature in seen[0].flatten():
            for part in parts:
                row = torch.autograd.grad(feature, list(weights(model, part).values()), retain_graph=True)
                exact[part.id] += sum(float(slope.square().sum()) for slope in row) / len(IMAGES)
    rule, architecture = CRITERIA["parameter_plasticity"], find_architecture(model)
    with left_as_found(model, 0):
        probes = [probe(seed=seed) for seed in range(150)]
        draws = [rule.prepare(model, architecture, drawn)(drawn.images(range(12))).values for drawn in probes]
    squares = torch.cat(draws).mean(0)
    np.testing.assert_allclose(squares, list(exact.values()), rtol=0.12)
    assert np.corrcoef(squares, list(exact.values()))[0, 1] > 0.99
    one = measure(model, "parameter_plasticity", batch_size=6)
    assert list(means(one).values()) == pytest.approx(draws[0].mean(0).sqrt().tolist())
    assert (one.observed, one.pairs) == ("images", 12)


def test_parameter_plasticity_of_a_model_without_a_head_moves_its_tokens() -> None:
    model = backbone()
    assert min(means(measure(model, "parameter_plasticity")).values()) > 0


def test_parameter_plasticity_does_not_see_the_head_or_the_labels(vit: PreTrainedModel) -> None:
    changed = copy.deepcopy(vit)
    torch.nn.init.normal_(changed.classifier.weight)
    assert measure(vit, "parameter_plasticity") == measure(changed, "parameter_plasticity")
    unlabelled = measure_plasticity(vit, IMAGES, pairs=12)
    labelled = measure(vit, "parameter_plasticity")
    assert replace(labelled, target_data=None) == replace(unlabelled, target_data=None)


@pytest.mark.parametrize("relative", [False, True])
def test_gradient_norms_are_those_of_backward(model: PreTrainedModel, relative: bool) -> None:
    ours = measure(model, "relative_gradient_norm" if relative else "gradient_norm", batch_size=5, seed=3)
    drawn = np.random.default_rng(3).permutation(12)
    expected: dict[str, list[float]] = {row.id: [] for row in ours.scores}
    for batch in (drawn[:4], drawn[4:8], drawn[8:]):
        own = copy.deepcopy(model)
        F.cross_entropy(own(pixel_values=IMAGES[batch]).logits, LABELS[batch]).backward()
        for part in find_components(own):
            found = weights(own, part).values()
            norm = torch.cat([p.grad.flatten() for p in found]).norm()
            size = torch.cat([p.detach().flatten() for p in found]).norm() if relative else 1
            expected[part.id].append(float(norm / size))
    assert (ours.pairs, ours.observed) == (3, "batches")
    for row in ours.scores:
        assert row.mean == pytest.approx(np.mean(expected[row.id]), rel=1e-5)
        assert row.std == pytest.approx(np.std(expected[row.id], ddof=1), rel=1e-4)


def test_condition_numbers_are_those_of_numpy(model: PreTrainedModel) -> None:
    report = measure(model, "condition_number")
    for part, score in zip(find_components(model), report.scores, strict=True):
        matrices = [model.get_submodule(path).weight.detach().numpy() for path in part.modules]
        found = [np.linalg.cond(np.diag(m) if m.ndim == 1 else m) for m in matrices]
        assert 1 / score.mean == pytest.approx(np.mean(found), rel=1e-3)
    blocks = 2
    for kind in report.kinds:
        rows = [1 / row.mean for row in report.scores if row.kind == kind.kind]
        assert 1 / kind.mean == pytest.approx(sum(rows) / blocks)


def test_feature_norms_are_those_of_the_formula(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(0)
    ours = means(measure(model, "feature_norm", pairs=12))
    for part in find_components(model):
        ratios = []
        for path in part.modules:
            seen: list[torch.Tensor] = []
            module = model.get_submodule(path)
            handle = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(pixel_values=IMAGES)
            handle.remove()
            z = seen[0].flatten(0, -2).double().numpy()
            w = module.weight.detach().double().numpy()
            if w.ndim == 1:
                z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
                w = np.diag(w)
            g = rng.normal(size=(20_000, z.shape[1]))
            norms = [np.linalg.norm(v / np.linalg.norm(v, axis=1, keepdims=True) @ w.T, axis=1).mean() for v in (z, g)]
            ratios.append(norms[0] / norms[1])
        assert 1 / ours[part.id] == pytest.approx(np.mean(ratios), rel=0.1)


def test_a_feature_norm_is_1_for_a_rotation_and_0_for_what_is_projected_out() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(50, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert float(feature_norm(rotation, tokens, generator)) == pytest.approx(1, rel=1e-5)
    tokens[:, 4:] = 0
    projection = torch.diag(torch.tensor([0.0] * 4 + [1.0] * 4))
    assert float(feature_norm(projection, tokens, generator)) == pytest.approx(0, abs=1e-6)


def test_bounds_are_those_of_the_formula_with_heads_as_rows(model: PreTrainedModel) -> None:
    ours = means(measure_plasticity(model, criterion="bound"))
    with torch.no_grad():
        tokens = embeddings(model)(torch.zeros(1, 3, 8, 8))[0].numpy().astype(np.float64)
    n, r = len(tokens), np.sqrt((np.linalg.norm(tokens, axis=1) ** 2).mean())
    for part in find_components(model):
        w = [model.get_submodule(path).weight.detach().double().numpy() for path in part.modules]
        if part.kind in ("LN1", "LN2"):
            eps = model.get_submodule(part.path).eps
            expected = np.abs(w[0]).max() / np.mean([np.sqrt(t.var() + eps) for t in tokens])
        elif part.kind == "MHA":
            expected = 0.0
            for h in range(2):
                rows = slice(8 * h, 8 * h + 8)
                a = np.linalg.norm(w[0][rows].T @ w[1][rows] / np.sqrt(8), 2)
                factor = np.sqrt(3 * n + (12 * n + 3) * r**4 * a**2)
                expected += np.linalg.norm(w[3][:, rows], 2) * np.linalg.norm(w[2][rows], 2) * factor
        else:
            expected = np.linalg.svd(w[0], compute_uv=False)[0]
        assert ours[part.id] == pytest.approx(expected, rel=1e-5)


def test_the_bound_of_a_linear_layer_is_above_its_rate_of_change(model: PreTrainedModel) -> None:
    bound, rate = (means(measure(model, name)) for name in ("bound", "rate_of_change"))
    for name in bound:
        if "FC" in name:
            assert rate[name] <= bound[name]


def test_heads_are_rows() -> None:
    """A head that nothing attends to adds nothing: its rows of the value are zero."""
    torch.manual_seed(0)
    query, key, value, projection = (torch.randn(8, 8).double() for _ in range(4))
    value[4:] = 0
    options = {"tokens": 5, "r": 1.5}
    both = attention_bound(query, key, value, projection, heads=2, **options)
    first = attention_bound(query[:4], key[:4], value[:4], projection[:, :4], heads=1, **options)
    assert float(both) == pytest.approx(float(first))


def pixels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["pixel_values"]


@pytest.mark.parametrize("inputs", ["embedding", "activation"])
def test_relative_rates_are_those_of_the_formula(model: PreTrainedModel, inputs: str) -> None:
    report = measure(model, "relative_rate_of_change", inputs, pairs=6, batch_size=4)
    x, y = map(pixels, probe(count=6).pairs(range(6)))

    def d(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((one - two).norm() / ((one.norm() + two.norm()) / 2))

    for part, score in zip(find_components(model), report.scores, strict=True):
        found = []
        for pair in zip(x, y, strict=True):
            with torch.no_grad():
                if inputs == "embedding":
                    before = [embeddings(model)(image[None]) for image in pair]
                    after = [output(model, part, tokens) for tokens in before]
                else:
                    before, after = zip(*(in_and_out(model, part, image[None]) for image in pair), strict=True)
            found.append(d(*after) / d(*before))
        assert score.mean == pytest.approx(np.mean(found), rel=1e-4)


def in_and_out(model: PreTrainedModel, part: Component, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the component gets and gives in a forward pass."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = model.get_submodule(part.path).register_forward_hook(
        lambda m, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
    )
    model(pixel_values=image)
    handle.remove()
    return seen[0]


def test_relative_rates_have_no_scale(vit: PreTrainedModel) -> None:
    """Larger tokens and larger weights, without biases, change nothing."""
    with torch.no_grad():
        for part in find_components(vit):
            for name, weight in weights(vit, part).items():
                if name.endswith("bias"):
                    weight.zero_()
    larger = copy.deepcopy(vit)
    with torch.no_grad():
        for parameter in embeddings(larger).parameters():
            parameter *= 5
        for part in find_components(larger):
            if part.kind in ("FC1", "FC2"):
                for weight in weights(larger, part).values():
                    weight *= 3
    one, two = (means(measure(each, "relative_rate_of_change")) for each in (vit, larger))
    for name, value in one.items():
        if "MHA" not in name:  # the softmax has a scale of its own
            assert two[name] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("inputs", ["embedding", "activation"])
def test_token_sensitivity_is_the_rate_of_change_for_noise_on_one_token(model: PreTrainedModel, inputs: str) -> None:
    report = measure(model, "token_sensitivity", inputs, batch_size=5)
    drawn = np.random.default_rng(0).permutation(12)
    found: dict[str, list[float]] = {row.id: [] for row in report.scores}
    for number, index in enumerate(drawn):
        generator = probe().generator(number)
        with torch.no_grad():
            clean = embeddings(model)(IMAGES[index][None])
            place = int(torch.randint(clean.shape[1], (), generator=generator))
            noise = torch.randn(clean.shape[-1], generator=generator) * clean.square().mean().sqrt()
            noisy = clean.clone()
            noisy[0, place] += noise
            for part in find_components(model):
                if inputs == "embedding":
                    change = output(model, part, clean) - output(model, part, noisy)
                    found[part.id].append(float(change.norm() / noise.norm()))
                else:
                    handle = embeddings(model).register_forward_hook(lambda m, args, out, noisy=noisy: noisy)
                    disturbed = in_and_out(model, part, IMAGES[index][None])
                    handle.remove()
                    plain = in_and_out(model, part, IMAGES[index][None])
                    before, after = ((a - b).norm() for a, b in zip(plain, disturbed, strict=True))
                    found[part.id].append(float(after / before))
    assert (report.pairs, report.skipped) == (12, 0)
    for row in report.scores:
        assert row.mean == pytest.approx(np.mean(found[row.id]), rel=1e-4)


@pytest.mark.parametrize("inputs", ["embedding", "activation"])
def test_inverse_turns_the_papers_ranking_round(model: PreTrainedModel, inputs: str) -> None:
    paper, inverse = (measure(model, name, inputs) for name in ("rate_of_change", "inverse"))
    for granularity in ("kind", "block"):
        order = [row.unit for row in paper.ranking(granularity)]
        assert [row.unit for row in inverse.ranking(granularity)] == order[::-1]
    for one, other in zip(paper.scores, inverse.scores, strict=True):
        assert other.mean == pytest.approx(1 / one.mean)
        assert other.std / other.mean == pytest.approx(one.std / one.mean)


def test_random_scores_are_uniform_and_belong_to_the_seed() -> None:
    model = tiny_model(num_hidden_layers=6)
    reports = [measure_plasticity(model, criterion="random", seed=seed) for seed in range(40)]
    values = np.array([[row.mean for row in report.scores] for report in reports])
    assert len(np.unique(values)) == values.size
    assert abs(values.mean() - 0.5) < 0.03
    assert abs(values.std() - 12**-0.5) < 0.03
    assert {report.ranking()[0].unit for report in reports} == set(KINDS)
    assert measure_plasticity(model, criterion="random", seed=3) == reports[3]


# ---- the laws of all


@pytest.mark.parametrize(("criterion", "inputs"), EACH)
def test_every_criterion_leaves_the_model_as_found(model: PreTrainedModel, criterion: str, inputs: str | None) -> None:
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    report = measure(model, criterion, inputs)
    assert_same(before, snapshot(model))
    assert (report.criterion, report.inputs) == (criterion, inputs)
    assert PlasticityReport.from_dict(report.to_dict()) == report


class Failing:
    """Labelled images, the last of which cannot be read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 11:
            raise OSError("the disk is gone")
        return LABELLED[index]


@pytest.mark.parametrize(("criterion", "inputs"), [each for each in EACH if CRITERIA[each[0]].observed != "weights"])
def test_every_criterion_leaves_the_model_as_found_when_it_fails(
    vit: PreTrainedModel, criterion: str, inputs: str | None
) -> None:
    before = snapshot(vit)
    with pytest.raises(OSError, match="the disk is gone"):
        measure_plasticity(vit, Failing(), criterion=criterion, inputs=inputs, batch_size=2)
    assert_same(before, snapshot(vit))


@pytest.mark.parametrize(
    ("criterion", "inputs", "processes"),
    [
        (*each, processes)
        for each in EACH
        for processes in (2, 3, 20)
        # Twenty, of which most have nothing to do, for the default and the paper's measure.
        if CRITERIA[each[0]].observed != "weights" and (processes < 20 or each[0] in (DEFAULT, "rate_of_change"))
    ],
)
def test_shares_of_processes_merge_to_the_whole(
    vit: PreTrainedModel, criterion: str, inputs: str | None, processes: int
) -> None:
    architecture, rule = find_architecture(vit), CRITERIA[criterion]

    def moments(rank: int, world: int) -> Moments:
        images = probe(inputs=inputs or "")
        table = Table(architecture, rule, Settling(Choice(("MHA", "FC1"), 1), 0.95, 1))
        share, total = Share(rank, world), images.planned(rule.observed)
        with left_as_found(vit, 0), _Progress(total, rule.observed, share) as progress:
            worker = _Worker(rule.prepare(vit, architecture, images), table, images)
            return worker.look_at(share.of(range(total)), progress)[0]

    whole, merged = moments(0, 1), moments(0, processes)
    for rank in range(1, processes):
        merged = merged.merge(moments(rank, processes))
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(
    "criterion", [name for name, rule in CRITERIA.items() if rule.observed in ("pairs", "images")]
)
def test_the_batch_size_does_not_matter_where_images_stand_for_themselves(
    vit: PreTrainedModel, criterion: str
) -> None:
    one, other = (means(measure(vit, criterion, batch_size=size)) for size in (1, 7))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(("criterion", "inputs"), EACH)
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_config_takes_any_criterion(
    model: PreTrainedModel, criterion: str, inputs: str | None, training: str
) -> None:
    config = PlasticityConfig(target_data=LABELLED, criterion=criterion, inputs=inputs, training=training, pairs=12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LN. ranks high")
        adapted = get_peft_model(model, config)
    best = config.report.ranking()[0].unit
    assert config.selection.units == (best,)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and "classifier" not in name}
    paths = [path for part in find_components(model) if part.kind == best for path in part.modules]
    assert all(any(path in name for path in paths) for name in trained)
    assert all(any(path in name for name in trained) for path in paths)


def test_the_default_is_the_same_in_one_step_and_in_two(vit: PreTrainedModel) -> None:
    report = measure_plasticity(vit, IMAGES)
    config = PlasticityConfig(target_data=IMAGES)
    get_peft_model(vit, config)
    assert report.criterion == config.criterion == DEFAULT
    assert config.report == report


@pytest.mark.parametrize("criterion", [name for name, rule in CRITERIA.items() if rule.observed == "weights"])
def test_what_reads_only_weights_needs_no_images(vit: PreTrainedModel, criterion: str) -> None:
    config = PlasticityConfig(criterion=criterion)
    get_peft_model(vit, config)
    assert config.report == measure_plasticity(tiny_model(), criterion=criterion)
    assert {row.standard_error for row in config.report.scores} == {0}


def test_a_protocol_alone_asks_for_the_papers_measure(vit: PreTrainedModel) -> None:
    report = measure_plasticity(vit, IMAGES, inputs="embedding")
    assert (report.criterion, report.inputs) == ("rate_of_change", "embedding")
    assert report == measure_plasticity(vit, IMAGES, criterion="rate_of_change")
    assert PlasticityConfig(inputs="activation", target_data=IMAGES).criterion == "rate_of_change"


def test_the_papers_measure_selects_what_it_ranks_first_with_a_warning(vit: PreTrainedModel) -> None:
    report = measure_plasticity(vit, IMAGES, criterion="rate_of_change")
    assert report.input_std < 1
    with torch.no_grad():
        spread = embeddings(vit)(IMAGES[:1]).std(dim=-1, correction=0).mean()
    assert report.input_std == pytest.approx(float(spread), rel=1e-5)
    best = report.ranking()[0].unit
    assert best.startswith("LN")
    config = PlasticityConfig(target_data=IMAGES, criterion="rate_of_change")
    with pytest.warns(UserWarning, match=f"{best} ranks high because a layer norm divides by the spread"):
        get_peft_model(vit, config)
    assert config.selection.units == (best,)


def stream() -> Iterator[dict[str, Any]]:
    yield from LABELLED


def label_forms() -> dict[str, Any]:
    loader = torch.utils.data.DataLoader(LABELLED, batch_size=4)
    return {
        "label": [{"pixel_values": row["pixel_values"], "label": row["labels"]} for row in LABELLED],
        "tuples": [(row["pixel_values"], row["labels"]) for row in LABELLED],
        "loader": loader,
        "stream": stream(),
    }


@pytest.mark.parametrize("form", label_forms())
def test_labels_are_read_from_all_that_holds_images(vit: PreTrainedModel, form: str) -> None:
    expected = measure(vit, "gradient_norm")
    found = measure_plasticity(vit, label_forms()[form], criterion="gradient_norm", pairs=12)
    assert replace(found, target_data=None) == replace(expected, target_data=None)


def test_labels_of_a_stream_in_batches(vit: PreTrainedModel) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from LABELLED

    loader = torch.utils.data.DataLoader(Stream(), batch_size=5)
    found = measure_plasticity(vit, loader, criterion="gradient_norm", pairs=12)
    assert replace(found, target_data=None) == replace(measure(vit, "gradient_norm"), target_data=None)


def test_what_a_criterion_lacks_is_said(vit: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="criterion='gradient_norm' has nothing to rank by: give images"):
        measure_plasticity(vit, criterion="gradient_norm")
    with pytest.raises(ModelError, match="ViTModel has no head, and criterion='gradient_norm' needs one"):
        measure(backbone(), "gradient_norm")
    with torch.no_grad():
        vit.classifier.weight.zero_()
        vit.classifier.bias.zero_()
    with pytest.raises(ModelError, match="gradient_norm of every component is 0"):
        measure(vit, "gradient_norm")


def test_a_score_that_is_no_number_names_its_component(vit: PreTrainedModel) -> None:
    part = next(part for part in find_components(vit) if part.id == "1.FC1")
    with torch.no_grad():
        model = copy.deepcopy(vit)
        model.get_submodule(part.path).weight.zero_()
    with pytest.raises(NonFiniteError, match=r"inverse of 1\.FC1 is infinite"):
        measure(model, "inverse")
    with torch.no_grad():
        model.get_submodule(part.path).weight.fill_(3e38)
    for criterion in ("parameter_plasticity", "gradient_norm"):
        with pytest.raises(NonFiniteError, match=f"The {criterion} of .* is NaN or infinite"):
            measure(model, criterion)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["parameter_plasticity", "bound", "condition_number", "feature_norm"])
def test_half_precision_ranks_as_float32(criterion: str, dtype: torch.dtype) -> None:
    model = tiny_model()
    half = measure(copy.deepcopy(model).to(dtype), criterion)
    full = measure(model, criterion)
    for one, other in zip(half.kinds, full.kinds, strict=True):
        assert one.mean == pytest.approx(other.mean, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(5, 40, 60), (60, 40, 60), (24, 40, 60), (1, 1, 1), (7, 3, 200)]
)
@pytest.mark.parametrize("most", [1, 5_000, 2**24])
def test_gradients_of_linear_layers_by_image(
    tokens: int, inputs: int, outputs: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few tokens and with many, in one piece and in several, against the gradient matrix of each image."""
    monkeypatch.setattr(gradients, "MOST_ELEMENTS", most)
    generator = torch.Generator().manual_seed(0)
    given, back = (torch.randn(3, tokens, width, generator=generator) for width in (inputs, outputs))
    found = gradients._squares(torch.nn.Linear(inputs, outputs), given, back * 1e-4)
    weight = torch.einsum("pti,pto->poi", given.double(), back.double() * 1e-4)
    bias = back.double().sum(dim=1) * 1e-4
    torch.testing.assert_close(found, weight.square().sum((1, 2)) + bias.square().sum(1), rtol=1e-6, atol=0)
