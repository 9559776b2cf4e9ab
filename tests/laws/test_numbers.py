"""Numbers hold: the same scores however they are computed, and the scores that algebra foretells."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from plasticity_peft import PlasticityConfig, find_components, measure_plasticity
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import DataError, ModelError
from plasticity_peft.images.pairs import draw_pairs
from tests.support import oracles
from tests.support.crossing import crossed
from tests.support.families import FAMILIES, KINDS_OF_FAMILY, defined, family, items
from tests.support.measures import MEASURES, PROTOCOLS, means, rates
from tests.support.models import logits, moved, random_images, tiny_model
from tests.support.snapshots import assert_same, snapshot

SINGLE, DOUBLE = 2e-4, 1e-9
"""Relative tolerances of scores in float32 and float64 where the order of sums differs."""
SOFTMAX = 1e-5
"""The same where the softmax matters: several eager attentions of transformers take it in float32."""
LAYOUTS = ("vit", "dinov2-swiglu", "clip", "swin", "cvt", "hiera")


def in_double(images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in images.items()}


@cache
def measured(name: str, measure: str, batch_size: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Returns what all of four images give, once for all tests that compare with it."""
    images = family(name).images(4)
    data = items(in_double(images) if dtype == torch.float64 else images)
    model = family(name).build().to(dtype)
    return means(
        measure_plasticity(model, data, max_samples=4, batch_size=batch_size, settle=None, **MEASURES[measure])
    )


# ----------------------------------------------------------------------------------- however they are computed


@crossed(name=KINDS_OF_FAMILY, inputs=PROTOCOLS, possible=defined)
def test_the_order_of_pairs_and_within_a_pair_does_not_matter(name: str, inputs: str) -> None:
    model = family(name).build().double()
    images = in_double(family(name).images(6))
    x, y = ({key: value[half] for key, value in images.items()} for half in (slice(0, 3), slice(3, 6)))
    order = [2, 0, 1]
    moved_x, moved_y = ({key: value[order] for key, value in side.items()} for side in (x, y))
    expected = rates(model, inputs, x, y)
    torch.testing.assert_close(rates(model, inputs, moved_x, moved_y), expected[order], rtol=DOUBLE, atol=0)
    torch.testing.assert_close(rates(model, inputs, y, x), expected, rtol=DOUBLE, atol=0)


@pytest.mark.parametrize("inputs", PROTOCOLS)
def test_the_order_in_which_pairs_arrive_does_not_matter(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are taken in their own order without a buffer: a permutation of both is one of the pairs."""
    monkeypatch.setattr("plasticity_peft.images.sources.BUFFER_IMAGES", 1)
    target, source = random_images(40).double(), random_images(40, seed=2).double()
    reports = []
    for seed in range(3):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        reports.append(
            measure_plasticity(
                tiny_model().double(),
                iter(target[order]),
                iter(source[order]),
                inputs=inputs,
                max_samples=40,
                settle=None,
                batch_size=7,
            )
        )
    for report in reports[1:]:
        assert means(report) == pytest.approx(means(reports[0]), rel=DOUBLE)
        assert [row.std for row in report.kinds] == pytest.approx([row.std for row in reports[0].kinds], rel=1e-6)


@crossed(name=KINDS_OF_FAMILY, measure=MEASURES, possible=defined)
def test_the_size_of_a_batch_does_not_matter(name: str, measure: str) -> None:
    three = measured(name, measure, batch_size=3)
    assert three == pytest.approx(measured(name, measure, batch_size=1), rel=SINGLE)


@crossed(name=KINDS_OF_FAMILY, measure=MEASURES, possible=defined)
def test_single_and_double_precision_agree(name: str, measure: str) -> None:
    double = measured(name, measure, batch_size=1, dtype=torch.float64)
    assert measured(name, measure, batch_size=1) == pytest.approx(double, rel=SINGLE)


@crossed(name=LAYOUTS, measure=MEASURES, possible=defined)
def test_eager_and_sdpa_attention_agree_in_double_precision(name: str, measure: str) -> None:
    model, data = family(name).build().double(), items(in_double(family(name).images(4)))
    if not getattr(model, "_supports_sdpa", False):
        pytest.skip("it has one kind of attention")
    reports = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        reports.append(measure_plasticity(model, data, max_samples=4, **MEASURES[measure]))
    assert means(reports[1]) == pytest.approx(means(reports[0]), rel=SOFTMAX)


def compiled_whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def compiled_in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def compiled_blocks(model: nn.Module, backend: str) -> nn.Module:
    for path in find_architecture(model).blocks:
        model.get_submodule(path).compile(backend=backend)
    return model


def compiled_forward(model: nn.Module, backend: str) -> nn.Module:
    for path in find_architecture(model).blocks:
        block = model.get_submodule(path)
        block.forward = torch.compile(block.forward, backend=backend)
    return model


COMPILED: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "whole": compiled_whole, "in place": compiled_in_place, "blocks": compiled_blocks, "forward": compiled_forward,
}  # fmt: skip


def assert_compiled_scores_alike(name: str, how: str, measure: str, backend: str, used: bool) -> None:
    data = items(family(name).images(4))
    expected = measure_plasticity(family(name).build(), data, max_samples=4, **MEASURES[measure])
    model = COMPILED[how](family(name).build(), backend)
    if used:  # so that there is compiled code, made when no module had a hook
        with torch.no_grad():
            model(**family(name).images(4))
    got = measure_plasticity(model, data, max_samples=4, **MEASURES[measure])
    assert means(got) == means(expected)


@crossed(how=COMPILED, measure=MEASURES, used=[False, True])
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it meets in other packages
def test_a_compiled_model_scores_as_it_does_uncompiled(how: str, measure: str, used: bool) -> None:
    assert_compiled_scores_alike("vit", how, measure, "eager", used)


@pytest.mark.slow
@crossed(name=LAYOUTS, how=COMPILED, measure=MEASURES, possible=lambda name, _, measure: defined(name, measure))
@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_by_inductor_scores_as_it_does_uncompiled(name: str, how: str, measure: str) -> None:
    assert_compiled_scores_alike(name, how, measure, "inductor", used=True)


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_adapted_before_it_is_compiled() -> None:
    config = {"target_data": random_images(), "max_samples": 4, "candidates": "MHA"}
    model = torch.compile(tiny_model(), backend="eager")
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"before it is compiled: torch.compile\(get_peft_model"):
        get_peft_model(model, PlasticityConfig(**{"training": "lora", **config}))
    assert_same(before, snapshot(model))
    for compiled in (compiled_in_place, compiled_blocks):
        adapted = get_peft_model(compiled(tiny_model(), "eager"), PlasticityConfig(**{"training": "lora", **config}))
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert any("lora_" in name for name in trained)
        assert any("classifier" in name for name in trained)
        assert logits(adapted).isfinite().all()
    whole = torch.compile(
        get_peft_model(tiny_model(), PlasticityConfig(**{"training": "lora", **config})), backend="eager"
    )
    assert [part.id for part in find_components(whole)] == [part.id for part in find_components(tiny_model())]


def test_duplicated_images_are_skipped_and_counted() -> None:
    images = random_images(4).double()
    target, source = images[[0, 1, 2, 3, 0, 1]], images[[1, 0, 3, 2, 0, 1]]
    pairs = draw_pairs(6, target=6, source=6, seed=0)
    differ = [int(s) for s, t in pairs if not torch.equal(source[s], target[t])]
    unique = [(source[s], target[t]) for s, t in pairs if int(s) in differ]
    assert 2 <= len(unique) < 6
    for inputs in PROTOCOLS:
        model = tiny_model().double()
        report = measure_plasticity(model, target, source, inputs=inputs, max_samples=6, settle=None)
        assert (report.samples, report.skipped) == (len(unique), 6 - len(unique))
        halves = ({"pixel_values": torch.stack(half)} for half in zip(*unique, strict=True))
        expected = oracles.rates(model, inputs, *halves)
        assert [row.mean for row in report.scores] == pytest.approx(expected.mean(axis=0), rel=1e-9)
    same = images[:1].expand(6, -1, -1, -1)
    with pytest.raises(DataError, match="Only 0 of 6 pairs"):
        measure_plasticity(model, same, same, inputs="activation", max_samples=6)


# ----------------------------------------------------------------------------------------- what algebra foretells


def scaled(model: nn.Module, paths: tuple[str, ...], factor: float) -> None:
    with torch.no_grad():
        for path in paths:
            model.get_submodule(path).weight.mul_(factor)


def scores(model: nn.Module, name: str, inputs: str) -> dict[str, float]:
    images = in_double(family(name).images(4))
    x, y = ({key: value[half] for key, value in images.items()} for half in (slice(0, 2), slice(2, 4)))
    found = rates(model, inputs, x, y).mean(dim=0).tolist()
    return dict(zip([part.id for part in find_components(model)], found, strict=True))


@cache
def model_in_double(name: str) -> nn.Module:
    """Returns a model of a family, which is copied before it is changed."""
    return family(name).build().double()


@cache
def scores_before(name: str, inputs: str) -> dict[str, float]:
    return scores(model_in_double(name), name, inputs)


def each_component(name: str, inputs: str, kind: str) -> Iterator[tuple[nn.Module, list[Any], dict[str, float]]]:
    """Yields (model, components, scores before): the first and the last of a kind, each with a model of its own.

    If all get the embedding, the inputs of one do not depend on the other, and both are there to be changed at once.
    """
    model, before = model_in_double(name), scores_before(name, inputs)
    parts = [part for part in find_components(model) if part.kind == kind]
    ends = list(dict.fromkeys((parts[0], parts[-1])))
    for chosen in [ends] if inputs == "embedding" else [[part] for part in ends]:
        yield copy.deepcopy(model), chosen, before


@crossed(name=KINDS_OF_FAMILY, inputs=PROTOCOLS, kind=["LN1", "LN2", "FC1", "FC2"], possible=defined)
def test_a_score_scales_with_the_weights(name: str, inputs: str, kind: str) -> None:
    """Of a linear layer, and of the gains of a norm; the biases of a norm do not matter."""
    for model, parts, before in each_component(name, inputs, kind):
        for part in parts:
            scaled(model, part.modules, 3.0)
        after = scores(model, name, inputs)
        changed = {part.id for part in parts}
        assert all(after[one] == pytest.approx(3.0 * before[one], rel=DOUBLE) for one in changed)
        if inputs == "embedding":
            assert all(after[other] == pytest.approx(before[other], rel=DOUBLE) for other in after.keys() - changed)


@crossed(name=KINDS_OF_FAMILY, inputs=PROTOCOLS, projection=["value", "output"], possible=defined)
def test_attention_scales_with_its_value_and_output_projections(name: str, inputs: str, projection: str) -> None:
    """Rows of attention sum to 1, so that the bias of the values cancels, and that of the outputs does too."""
    for model, parts, before in each_component(name, inputs, "MHA"):
        for part in parts:
            scale_projection(model, part, projection)
        after = scores(model, name, inputs)
        for part in parts:
            assert after[part.id] == pytest.approx(3.0 * before[part.id], rel=SOFTMAX)


def scale_projection(model: nn.Module, part: Any, projection: str) -> None:
    if projection == "output":
        scaled(model, part.modules[-1:], 3.0)
    elif len(part.modules) == 2:  # query, key and value in one
        weight = model.get_submodule(part.modules[0]).weight
        with torch.no_grad():
            weight[slice(2 * len(weight) // 3, None)] *= 3.0
    else:
        scaled(model, part.modules[2:3], 3.0)


@crossed(name=KINDS_OF_FAMILY, inputs=PROTOCOLS, kind=KINDS, possible=defined)
def test_a_bias_changes_nothing(name: str, inputs: str, kind: str) -> None:
    """Of a norm, of the linear layers of an MLP, and of the values and outputs of attention."""
    for model, parts, before in each_component(name, inputs, kind):
        for part in parts:
            chosen = part.modules[2:] if kind == "MHA" and len(part.modules) == 4 else part.modules[-1:]
            move_biases(model, chosen if kind == "MHA" else part.modules)
        after = scores(model, name, inputs)
        for part in parts:
            assert after[part.id] == pytest.approx(before[part.id], rel=SOFTMAX)


def move_biases(model: nn.Module, paths: tuple[str, ...]) -> None:
    with torch.no_grad():
        for path in paths:
            bias = getattr(model.get_submodule(path), "bias", None)
            if bias is not None:
                bias.add_(torch.linspace(-1, 2, len(bias), dtype=bias.dtype))


# ------------------------------------------------------------------------------------------------------- merging

MERGED = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Largest difference of logits, relative to the largest logit, between an adapter and its merged weights. Merging
rounds W + scaling B A to the type of W: the unit of bfloat16 is 2^-8, of float16 2^-11."""
MODES: dict[str, dict[str, Any]] = {
    "lora": {"candidates": ("MHA", "FC1", "FC2"), "top_k": 3},
    "dora": {"candidates": ("MHA", "FC1", "FC2"), "top_k": 3, "use_dora": True},
    "full": {"training": "full", "top_k": 5},
}
FAMILIES_TO_MERGE = ("vit", "dinov2-swiglu", "clip", "swin", "hiera", "segformer", "beit")


def adapted(name: str, mode: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns a model with an adapter that does something, and images for it."""
    model = family(name).build()
    report = measure_plasticity(model, items(family(name).images(2)), criterion="random")
    wrapped = get_peft_model(
        model.to(dtype),
        PlasticityConfig(report=report, r=4, **{"training": "lora", **MODES[mode]}),
        autocast_adapter_dtype=False,
    )
    images = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family(name).images(4).items()}
    return moved(wrapped, seed=4).eval(), images


@crossed(name=FAMILIES_TO_MERGE, mode=MODES, dtype=MERGED)
def test_merging_is_exact_to_the_precision_of_the_weights(name: str, mode: str, dtype: torch.dtype) -> None:
    model, images = adapted(name, mode, dtype)
    expected = logits(model, images).float()
    with model.disable_adapter():
        base = logits(model, images).float()
    scale = float(expected.abs().max())
    assert float((base - expected).abs().max()) > 2 * MERGED[dtype] * scale, "the adapter does too little to tell"
    weights = {key: value.clone() for key, value in model.get_base_model().state_dict().items() if "lora" not in key}
    # PEFT gives NaN when it takes back a merge of DoRA in bfloat16, so that only merging for good is looked at there.
    if mode != "full" and (mode, dtype) != ("dora", torch.bfloat16):
        model.merge_adapter()
        assert float((logits(model, images) - expected).abs().max()) <= MERGED[dtype] * scale
        model.unmerge_adapter()
        assert float((logits(model, images) - expected).abs().max()) <= MERGED[dtype] * scale
        unit = torch.finfo(dtype).eps
        for key, value in model.get_base_model().state_dict().items():
            if key in weights and value.is_floating_point():
                assert float((value.float() - weights[key].float()).abs().max()) <= 16 * unit * max(
                    1.0, float(value.abs().max())
                ), key
    merged = model.merge_and_unload()
    assert float((logits(merged, images) - expected).abs().max()) <= MERGED[dtype] * scale
    if mode == "full":
        assert torch.equal(logits(merged, images).float(), expected)


def test_families_of_this_file_exist() -> None:
    assert {*LAYOUTS, *FAMILIES_TO_MERGE} <= set(FAMILIES)
