"""Every criterion against its definition, and the laws that all of them keep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from plasticity_peft import PlasticityConfig, PlasticityReport, find_components, measure_plasticity
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.criteria import gradients
from plasticity_peft.criteria.bound import attention_bound
from plasticity_peft.criteria.criterion import WeightCriterion
from plasticity_peft.criteria.feature_norm import feature_norm
from plasticity_peft.criteria.registry import CRITERIA, DEFAULT
from plasticity_peft.errors import ConfigError, ModelError, NonFiniteError
from plasticity_peft.images import sources
from plasticity_peft.images.sampler import Batches
from tests.support import oracles
from tests.support.crossing import crossed
from tests.support.models import ARCHITECTURES, backbone, random_images, tiny_model
from tests.support.processes import in_threads
from tests.support.snapshots import assert_same, snapshot

IMAGES = random_images(12)
LABELS = torch.arange(12) % 3
LABELLED = [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]
WITH_PROTOCOLS = {name for name, criterion in CRITERIA.items() if criterion.protocols}
OF_WEIGHTS = {name for name, criterion in CRITERIA.items() if isinstance(criterion, WeightCriterion)}
EACH = [(name, inputs) for name in CRITERIA for inputs in (oracles.PROTOCOLS if name in WITH_PROTOCOLS else (None,))]
OF_IMAGES = [(name, inputs) for name, inputs in EACH if name not in OF_WEIGHTS]


def named(criteria: Iterable[tuple[str, str | None]]) -> list[Any]:
    """Returns criteria with their inputs as an axis of `crossed`."""
    return [pytest.param(each, id="-".join(filter(None, each))) for each in criteria]


def measure(model: PreTrainedModel, criterion: str, inputs: str | None = None, **options: Any) -> PlasticityReport:
    return measure_plasticity(model, LABELLED, criterion=criterion, inputs=inputs, **{"max_samples": 12, **options})


def means(report: PlasticityReport) -> dict[str, float]:
    return {row.id: row.mean for row in report.scores}


def pixels(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": images}


def weights(model: PreTrainedModel, part: Component) -> dict[str, torch.Tensor]:
    modules = {path: model.get_submodule(path) for path in part.modules}
    return {f"{path}.{name}": p for path, module in modules.items() for name, p in module.named_parameters()}


def matrices(model: PreTrainedModel, part: Component) -> list[np.ndarray]:
    return [model.get_submodule(path).weight.detach().double().numpy() for path in part.modules]


def embeddings(model: PreTrainedModel) -> nn.Module:
    return getattr(model, model.base_model_prefix).embeddings


# ---- the definitions: values of (samples, components), of which a score is the mean ** power


def rates(model: PreTrainedModel, inputs: str) -> np.ndarray:
    return oracles.rates(model, inputs, pixels(IMAGES[:6]), pixels(IMAGES[6:]))


def relative_rates(model: PreTrainedModel, inputs: str) -> np.ndarray:
    def relative(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x - y).norm() / ((x.norm() + y.norm()) / 2))

    return oracles.rates(model, inputs, pixels(IMAGES[:6]), pixels(IMAGES[6:]), relative)


def token_sensitivities(model: PreTrainedModel, inputs: str) -> np.ndarray:
    """The rate of change for noise on one token, which the seed and the number of the image decide."""
    architecture, sides = find_architecture(model), oracles.PROTOCOLS[inputs]
    found = []
    for number, image in enumerate(oracles.each_image(pixels(IMAGES))):
        clean = oracles.tokens_of(model, architecture, image)
        state = np.random.SeedSequence([0, number]).generate_state(1, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]))
        noisy, place = clean.clone(), int(torch.randint(clean.shape[1], (), generator=generator))
        noisy[0, place] += torch.randn(clean.shape[-1], generator=generator) * clean.square().mean().sqrt()
        plain, disturbed = (sides(model, architecture, image, tokens) for tokens in (clean, noisy))
        found.append(oracles.change(plain, disturbed))
    return np.stack(found)


def gradient_norms(model: PreTrainedModel, inputs: None, relative: bool = False) -> np.ndarray:
    """Of the loss of a batch, by backward()."""
    drawn, found = np.random.default_rng(3).permutation(12), []
    for batch in (drawn[:4], drawn[4:8], drawn[8:]):
        own = copy.deepcopy(model)
        F.cross_entropy(own(pixel_values=IMAGES[batch]).logits, LABELS[batch]).backward()
        norms = []
        for part in find_components(own):
            parameters = weights(own, part).values()
            norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
            norms.append(float(norm / torch.cat([p.detach().flatten() for p in parameters]).norm() ** relative))
        found.append(norms)
    return np.array(found)


def squared_jacobians(model: PreTrainedModel, inputs: None) -> np.ndarray:
    """The exact Jacobian of what the head receives, row by row."""
    parts, found = find_components(model), []
    parameters = [list(weights(model, part).values()) for part in parts]
    for image in IMAGES:
        seen: list[torch.Tensor] = []
        handle = model.classifier.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(pixel_values=image[None])
        handle.remove()
        squares = np.zeros(len(parts))
        for feature in seen[0].flatten():
            slopes = iter(torch.autograd.grad(feature, [p for own in parameters for p in own], retain_graph=True))
            squares += [sum(float(next(slopes).square().sum()) for _ in own) for own in parameters]
        found.append(squares)
    return np.array(found)


def condition_numbers(model: PreTrainedModel, inputs: None) -> np.ndarray:
    return np.array(
        [
            [
                np.mean([np.linalg.cond(np.diag(w) if w.ndim == 1 else w) for w in matrices(model, part)])
                for part in find_components(model)
            ]
        ]
    )


def feature_norms(model: PreTrainedModel, inputs: None) -> np.ndarray:
    """How much longer a layer makes its inputs than Gaussian ones, all of length 1."""
    rng, found = np.random.default_rng(0), []
    for part in find_components(model):
        with torch.no_grad(), oracles.watching(model, part.modules) as seen:
            model(pixel_values=IMAGES)
        ratios = []
        for path, w in zip(part.modules, matrices(model, part), strict=True):
            z = seen[path].tokens.flatten(0, -2).double().numpy()
            if w.ndim == 1:
                z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
                w = np.diag(w)
            g = rng.normal(size=(20_000, z.shape[1]))
            norms = [np.linalg.norm(v / np.linalg.norm(v, axis=1, keepdims=True) @ w.T, axis=1).mean() for v in (z, g)]
            ratios.append(norms[0] / norms[1])
        found.append(np.mean(ratios))
    return np.array([found])


def bounds(model: PreTrainedModel, inputs: None) -> np.ndarray:
    """With heads as rows of the weights."""
    found = []
    blank = pixels(torch.zeros(1, 3, 8, 8))
    tokens = oracles.tokens_of(model, find_architecture(model), blank)[0].double().numpy()
    n, r = len(tokens), np.sqrt((np.linalg.norm(tokens, axis=1) ** 2).mean())
    for part in find_components(model):
        w = matrices(model, part)
        if part.kind in ("LN1", "LN2"):
            eps = model.get_submodule(part.path).eps
            found.append(np.abs(w[0]).max() / np.mean([np.sqrt(t.var() + eps) for t in tokens]))
        elif part.kind == "MHA":
            heads = 0.0
            for rows in (slice(0, 8), slice(8, 16)):
                a = np.linalg.norm(w[0][rows].T @ w[1][rows] / np.sqrt(8), 2)
                factor = np.sqrt(3 * n + (12 * n + 3) * r**4 * a**2)
                heads += np.linalg.norm(w[3][:, rows], 2) * np.linalg.norm(w[2][rows], 2) * factor
            found.append(heads)
        else:
            found.append(np.linalg.svd(w[0], compute_uv=False)[0])
    return np.array([found])


DATA: dict[str, Callable[[], dict[str, Any]]] = {
    # Streams in their own order; batches are drawn.
    "pairs": lambda: {"target_data": iter(IMAGES[6:]), "source_data": iter(IMAGES[:6]), "max_samples": 6},
    "images": lambda: {"target_data": iter(LABELLED), "max_samples": 12},
    "images, often": lambda: {"target_data": iter(LABELLED * 150), "max_samples": 12 * 150, "batch_size": 60},
    "batches": lambda: {"target_data": LABELLED, "max_samples": 12, "seed": 3},
    "weights": dict,
}


@dataclass(frozen=True)
class Definition:
    """What a criterion is, and how near to that its scores are."""

    observed: str
    values: Callable[[PreTrainedModel, Any], np.ndarray]
    power: float = 1.0
    tolerance: float = 1e-4
    exact: bool = True
    """False where the package draws random numbers of its own: then the spread is not that of the definition."""


DEFINITIONS = {
    "parameter_plasticity": Definition("images, often", squared_jacobians, 0.5, 0.06, exact=False),
    "rate_of_change": Definition("pairs", rates),
    "inverse": Definition("pairs", rates, -1.0),
    "relative_rate_of_change": Definition("pairs", relative_rates),
    "token_sensitivity": Definition("images", token_sensitivities),
    "gradient_norm": Definition("batches", gradient_norms),
    "relative_gradient_norm": Definition("batches", lambda model, _: gradient_norms(model, _, relative=True)),
    "condition_number": Definition("weights", condition_numbers, -1.0, 1e-3),
    "feature_norm": Definition("batches", feature_norms, -1.0, 0.1, exact=False),
    "bound": Definition("weights", bounds),
}


def test_every_criterion_has_a_definition() -> None:
    assert {*DEFINITIONS, "random"} == set(CRITERIA)


@crossed(each=named(each for each in EACH if each[0] != "random"), architecture=ARCHITECTURES)
def test_scores_are_those_of_the_definition(
    each: tuple[str, str | None], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the components and of the kinds, whose values are the means over blocks; with their spread."""
    (criterion, inputs), model = each, tiny_model(architecture)
    monkeypatch.setattr(sources, "BUFFER_IMAGES", 1)  # a buffer of one image keeps the order of a stream
    own = DEFINITIONS[criterion]
    data = DATA[own.observed]()
    report = measure_plasticity(model, criterion=criterion, inputs=inputs, settle=None, **{"batch_size": 5, **data})
    values = own.values(model, inputs)
    of_kinds = values.reshape(len(values), -1, len(KINDS)).mean(axis=1)
    for rows, columns in ((report.scores, values), (report.kinds, of_kinds)):
        mean = columns.mean(axis=0)
        np.testing.assert_allclose([row.mean for row in rows], mean**own.power, rtol=own.tolerance)
        if own.exact and criterion not in OF_WEIGHTS:
            # The spread of mean ** power, to first order.
            std = abs(own.power) * mean ** (own.power - 1) * columns.std(axis=0, ddof=1)
            np.testing.assert_allclose([row.std for row in rows], std, rtol=1e-3)
    found = [row.mean for row in report.scores]
    assert np.corrcoef(found, values.mean(axis=0) ** own.power)[0, 1] > 0.98
    assert report.observed == own.observed.split(",")[0]
    if own.exact:
        assert (report.samples, report.skipped) == (0 if criterion in OF_WEIGHTS else len(values), 0)


def test_random_scores_are_uniform_and_belong_to_the_seed() -> None:
    model = tiny_model(num_hidden_layers=6)
    reports = [measure_plasticity(model, criterion="random", seed=seed) for seed in range(40)]
    values = np.array([[row.mean for row in report.scores] for report in reports])
    assert len(np.unique(values)) == values.size
    assert abs(values.mean() - 0.5) < 0.03
    assert abs(values.std() - 12**-0.5) < 0.03
    assert {report.ranking()[0].unit for report in reports} == set(KINDS)
    assert measure_plasticity(model, criterion="random", seed=3) == reports[3]


# ---- what follows from the definitions


def test_parameter_plasticity_of_a_model_without_a_head_moves_its_tokens() -> None:
    model = backbone()
    assert min(means(measure(model, "parameter_plasticity")).values()) > 0


def test_parameter_plasticity_does_not_see_the_head_or_the_labels(vit: PreTrainedModel) -> None:
    changed = copy.deepcopy(vit)
    nn.init.normal_(changed.classifier.weight)
    assert measure(vit, "parameter_plasticity") == measure(changed, "parameter_plasticity")
    unlabelled = measure_plasticity(vit, IMAGES, max_samples=12)
    labelled = measure(vit, "parameter_plasticity")
    assert replace(labelled, target_provenance=None) == replace(unlabelled, target_provenance=None)


def test_a_feature_norm_is_1_for_a_rotation_and_0_for_what_is_projected_out() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(50, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert float(feature_norm(rotation, tokens, generator)) == pytest.approx(1, rel=1e-5)
    tokens[:, 4:] = 0
    projection = torch.diag(torch.tensor([0.0] * 4 + [1.0] * 4))
    assert float(feature_norm(projection, tokens, generator)) == pytest.approx(0, abs=1e-6)


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
def test_inverse_turns_the_papers_ranking_round(model: PreTrainedModel, inputs: str) -> None:
    paper, inverse = (measure(model, name, inputs) for name in ("rate_of_change", "inverse"))
    for granularity in ("kind", "component"):
        order = [row.unit for row in paper.ranking(granularity)]
        assert [row.unit for row in inverse.ranking(granularity)] == order[::-1]
    for one, other in zip(paper.scores, inverse.scores, strict=True):
        assert other.mean == pytest.approx(1 / one.mean)
        assert other.std / other.mean == pytest.approx(one.std / one.mean)


# ---- the laws of all


@crossed(each=named(EACH), architecture=ARCHITECTURES)
def test_every_criterion_leaves_the_model_as_found(each: tuple[str, str | None], architecture: str) -> None:
    (criterion, inputs), model = each, tiny_model(architecture)
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


@pytest.mark.parametrize(("criterion", "inputs"), OF_IMAGES)
def test_every_criterion_leaves_the_model_as_found_when_it_fails(
    vit: PreTrainedModel, criterion: str, inputs: str | None
) -> None:
    before = snapshot(vit)
    with pytest.raises(OSError, match="the disk is gone"):
        measure_plasticity(vit, Failing(), criterion=criterion, inputs=inputs, batch_size=2)
    assert_same(before, snapshot(vit))


@crossed(each=named(OF_IMAGES), processes=[2, 3])
def test_several_processes_find_what_one_does(
    vit: PreTrainedModel, each: tuple[str, str | None], processes: int
) -> None:
    check_several_processes(vit, *each, processes)


@pytest.mark.parametrize(
    ("criterion", "inputs"),
    [
        pytest.param(*each, marks=() if each[1] != "embedding" else pytest.mark.slow)
        for each in EACH
        if each[0] in (DEFAULT, "rate_of_change")
    ],
)
def test_twenty_processes_of_which_most_have_nothing_to_do(
    vit: PreTrainedModel, criterion: str, inputs: str | None
) -> None:
    check_several_processes(vit, criterion, inputs, 20)


def check_several_processes(vit: PreTrainedModel, criterion: str, inputs: str | None, processes: int) -> None:
    options = {"batch_size": 5, "settle": None}
    alone = measure(copy.deepcopy(vit), criterion, inputs, **options)
    models = [copy.deepcopy(vit) for _ in range(processes)]
    first, *others = in_threads(processes, lambda rank: measure(models[rank], criterion, inputs, **options))
    assert len(others) == processes - 1
    assert all(other == first for other in others)
    assert (first.samples, first.skipped) == (alone.samples, alone.skipped)
    for one, other in zip((*first.scores, *first.kinds), (*alone.scores, *alone.kinds), strict=True):
        assert one.mean == pytest.approx(other.mean, rel=1e-6)
        assert one.std == pytest.approx(other.std, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    "criterion",
    [name for name in CRITERIA if name not in OF_WEIGHTS and not issubclass(CRITERIA[name].sampler, Batches)],
)
def test_the_batch_size_does_not_matter_where_images_stand_for_themselves(
    vit: PreTrainedModel, criterion: str
) -> None:
    one, other = (means(measure(vit, criterion, batch_size=size)) for size in (1, 7))
    assert one == pytest.approx(other, rel=1e-5)


@crossed(each=named(EACH), architecture=ARCHITECTURES, training=["lora", "full"])
def test_a_config_takes_any_criterion(each: tuple[str, str | None], architecture: str, training: str) -> None:
    (criterion, inputs), model = each, tiny_model(architecture)
    config = PlasticityConfig(
        target_data=LABELLED, criterion=criterion, inputs=inputs, training=training, max_samples=12
    )
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
    config = PlasticityConfig(training="lora", target_data=IMAGES)
    get_peft_model(vit, config)
    assert report.criterion == config.criterion == DEFAULT
    assert config.report == report


@pytest.mark.parametrize("criterion", sorted(OF_WEIGHTS))
def test_what_reads_only_weights_needs_no_images(vit: PreTrainedModel, criterion: str) -> None:
    config = PlasticityConfig(training="lora", criterion=criterion)
    get_peft_model(vit, config)
    assert config.report == measure_plasticity(tiny_model(), criterion=criterion)
    assert {row.standard_error for row in config.report.scores} == {0}


def test_a_protocol_alone_asks_for_the_papers_measure(vit: PreTrainedModel) -> None:
    report = measure_plasticity(vit, IMAGES, inputs="embedding")
    assert (report.criterion, report.inputs) == ("rate_of_change", "embedding")
    assert report == measure_plasticity(vit, IMAGES, criterion="rate_of_change")
    assert PlasticityConfig(training="lora", inputs="activation", target_data=IMAGES).criterion == "rate_of_change"


def test_the_papers_measure_selects_what_it_ranks_first_with_a_warning(vit: PreTrainedModel) -> None:
    report = measure_plasticity(vit, IMAGES, criterion="rate_of_change")
    assert report.input_std < 1
    with torch.no_grad():
        spread = embeddings(vit)(IMAGES[:1]).std(dim=-1, correction=0).mean()
    assert report.input_std == pytest.approx(float(spread), rel=1e-5)
    best = report.ranking()[0].unit
    assert best.startswith("LN")
    config = PlasticityConfig(training="lora", target_data=IMAGES, criterion="rate_of_change")
    with pytest.warns(UserWarning, match=f"{best} ranks high because a layer norm divides by the standard deviation"):
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
    found = measure_plasticity(vit, label_forms()[form], criterion="gradient_norm", max_samples=12)
    assert replace(found, target_provenance=None) == replace(expected, target_provenance=None)


def test_labels_of_a_stream_in_batches(vit: PreTrainedModel) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from LABELLED

    loader = torch.utils.data.DataLoader(Stream(), batch_size=5)
    found = measure_plasticity(vit, loader, criterion="gradient_norm", max_samples=12)
    assert replace(found, target_provenance=None) == replace(measure(vit, "gradient_norm"), target_provenance=None)


def test_what_a_criterion_lacks_is_said(vit: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="criterion='gradient_norm' needs images to measure on"):
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
    found = gradients._squares(nn.Linear(inputs, outputs), given, back * 1e-4)
    weight = torch.einsum("pti,pto->poi", given.double(), back.double() * 1e-4)
    bias = back.double().sum(dim=1) * 1e-4
    torch.testing.assert_close(found, weight.square().sum((1, 2)) + bias.square().sum(1), rtol=1e-6, atol=0)
