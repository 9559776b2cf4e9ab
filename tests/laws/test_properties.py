"""Laws of input at random: what is wrong is refused by name, what is right comes back as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from plasticity_peft import PlasticityConfig, PlasticityReport, measure_plasticity
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.errors import ConfigError, DataError, NonFiniteError, PlasticityError, ReportError
from plasticity_peft.images.indexed import Images
from plasticity_peft.images.pairs import draw_pairs
from plasticity_peft.images.sampler import SingleImages
from plasticity_peft.report.scores import KindScore, Score
from plasticity_peft.saved.layers import Layer
from plasticity_peft.saved.renames import rename
from tests.support.models import random_images, tiny_model
from tests.support.snapshots import assert_same, snapshot

# The same examples in every run: a test that fails for some and not for others tells nothing.
settings.register_profile("ours", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("ours")

IMAGES = random_images(6)
MODEL = tiny_model()
RANDOM = measure_plasticity(MODEL, criterion="random")

# ---------------------------------------------------------------------------------------------------- configs

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 2**63, 2**64 - 1, 2**64, sys.maxsize + 1]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e308, np.float32(0.5), np.int64(3), np.bool_(True)]),
    st.sampled_from(
        ["", "MHA", "kind", "full", "lora", "embedding", "bound", "float16", "vit", "\0", "\ud800", b"MHA"]
    ),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.sampled_from([np.zeros(2), np.array(["MHA"]), torch.zeros(2), torch.float16, int, object(), len]),
    st.lists(st.sampled_from([*KINDS, "x", 1, None]), max_size=3),
    st.sampled_from([[["MHA"]], ({"MHA"},), {"MHA": 1}, {"MHA", "FC1"}, (), [], {}, set(), frozenset(KINDS)]),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
OWN = [
    "criterion", "inputs", "granularity", "candidates", "top_k", "budget", "training", "max_samples", "batch_size",
    "seed", "settle", "dtype", "backbone",
]  # fmt: skip
LORA = ["r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern",
        "modules_to_save", "bias", "fan_in_fan_out"]  # fmt: skip


Right = Callable[[Any], bool]


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def one_of(found: re.Match[str]) -> Right:
    names = re.findall("'([^']*)'", found[1])
    return lambda value: isinstance(value, str) and value in names


def one_or_more(found: re.Match[str]) -> Right:
    allowed = found[1].split(", ")

    def right(value: Any) -> bool:
        names = [value] if isinstance(value, str) else value
        listed = isinstance(names, (list, tuple, set, frozenset, np.ndarray)) and len(names) > 0
        return listed and all(isinstance(n, str) and n in allowed for n in names) and len(set(names)) == len(names)

    return right


def whole_number(found: re.Match[str]) -> Right:
    lowest, highest = int(found[1] or found[2]), int(found[3] or 10**1000)
    return lambda value: type(value) is int and lowest <= value <= highest


def bounded(found: re.Match[str]) -> Right:
    """From, or above, the first number, and below, or at most, the second; finite."""
    first, second = float(found[2]), float(found[4] or math.inf)
    return lambda value: (
        number(value)
        and (value > first or (found[1] == "from" and value == first))
        and (value < second or (found[3] == "at most" and value == second))
    )


def mapping(found: re.Match[str]) -> Right:
    """From what are regular expressions to what is promised for one of the values."""
    name = found.string.partition(" ")[0]
    right = promised(f"{name}['a']", {name: {"a": object()}})
    return lambda value: (
        value is None
        or (
            isinstance(value, dict)
            and all(isinstance(key, str) and compiles(key) and right(value[key]) for key in value)
        )
    )


def compiles(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


PROMISES: list[tuple[str, Callable[[re.Match[str]], Right]]] = [
    (r" must be one of ('.*')", one_of),
    (r" must be one or more of (.*), each once", one_or_more),
    (r" must be a whole number (?:of at least (\d+)|from (\d+) to (\d+))", whole_number),
    (
        r" must be a (?:share|confidence|number).*? (above|from) (\S+)(?: (?:and|to) (at most|below) (\S+))?[. ]",
        bounded,
    ),
    (r" must be True or False", lambda _: lambda value: type(value) is bool),
    (r" must be the path of a module", lambda _: lambda value: isinstance(value, str)),
    (
        r" must be a list of module names",
        lambda _: (
            lambda value: (
                isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)
            )
        ),
    ),
    (r" must map module paths to numbers", mapping),
]
"""What messages say that an argument must be, and what that means."""


DEFAULTS = {field.name: field.default for field in dataclasses.fields(PlasticityConfig)}


def promised(name: str, options: dict[str, Any]) -> Right:
    """Returns what an argument may be, from the words in which something else is refused."""
    with pytest.raises(ConfigError) as refused:
        PlasticityConfig(**{"training": "lora", **options})
    text = str(refused.value).partition(" Got <object")[0] + " "
    means = [build(found) for pattern, build in PROMISES if (found := re.search(f"^{re.escape(name)}{pattern}", text))]
    assert len(means) == 1, f"nobody knows what this means: {text}"
    none = "or None" in text or DEFAULTS.get(name, "") is None
    return lambda value: means[0](value) or (none and value is None)


def a_name_for(dtype: Right) -> Right:
    return lambda value: dtype(str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value)


RIGHT = {name: promised(name, {name: object()}) for name in [*OWN, *LORA]}
"""What an argument may be, as users are told."""
RIGHT["dtype"] = a_name_for(RIGHT["dtype"])


def test_what_is_promised_is_understood() -> None:
    """A few values that are allowed and a few that are not, for each argument."""
    examples: dict[str, tuple[list[Any], list[Any]]] = {
        "criterion": ([None, "bound"], ["x", b"bound", 1]),
        "inputs": ([None, "embedding"], ["", "x"]),
        "granularity": (["kind", "component"], [None, "layer"]),
        "candidates": (
            ["MHA", ["MHA", "FC1"], {"LN1"}, np.array(["MHA"])],
            [None, [], ["MHA", "MHA"], "x", [["MHA"]]],
        ),
        "top_k": ([None, 1, 10**30], [0, True, 1.0, "1"]),
        "budget": ([None, 1, 0.01], [0, 1.01, math.nan, True, "1%"]),
        "training": (["lora", "full", None], ["dora"]),
        "max_samples": ([2, 2**24], [1, 2**24 + 1, None, 2.0]),
        "batch_size": ([1], [0, None]),
        "seed": ([0, 2**64 - 1], [-1, 2**64, None]),
        "settle": ([None, 0.95], [0, 1, math.nan]),
        "dtype": ([None, "float16", torch.bfloat16], ["float32", torch.float32]),
        "backbone": ([None, "", "vit"], [3]),
        "r": ([1], [0, None, 8.0]),
        "lora_alpha": ([1, 0.5, 1e308], [0, math.inf, math.nan, None, True]),
        "lora_dropout": ([0, 0.5], [1, -0.1, None]),
        "use_dora": ([True], [1, None]),
        "use_rslora": ([False], [0, None]),
        "lora_bias": ([True], ["yes", None]),
        "rank_pattern": ([None, {}, {"a|b": 2}], [{"a": 0}, {1: 1}, {"(": 1}, [("a", 1)]]),
        "alpha_pattern": ([None, {"a": 0.5}], [{"a": 0}, {"a": math.inf}]),
        "modules_to_save": ([None, ["head"], {"head"}], ["head", [1]]),
        "bias": (["none", "all"], [None, ""]),
        "fan_in_fan_out": ([True], [None]),
    }
    assert set(examples) == set(RIGHT)
    for name, (allowed, refused) in examples.items():
        assert all(RIGHT[name](value) for value in allowed), name
        assert not any(RIGHT[name](value) for value in refused), name


def test_every_field_is_looked_at() -> None:
    own = {field.name for field in dataclasses.fields(PlasticityConfig) if field.init and not _of_lora(field.name)}
    assert own == {*OWN, "target_data", "source_data", "report", "chosen", "forward_kwargs", "fit_head"}


def _of_lora(name: str) -> bool:
    from peft import LoraConfig

    return name in {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("name", [*OWN, *LORA])
@settings(max_examples=40)
@given(value=ANYTHING)
def test_a_field_is_right_or_refused_by_name(name: str, value: Any) -> None:
    try:
        config = PlasticityConfig(target_data=IMAGES, **{"training": "lora", name: value})
    except ConfigError as error:
        assert name in str(error)  # noqa: PT017
        # Right by itself, but not in company: inputs with a criterion that has none, lora_bias with DoRA.
        assert not RIGHT[name](value), error  # noqa: PT017
        return
    assert RIGHT[name](value), value
    json.dumps(config.to_dict())


@pytest.mark.parametrize("name", [*OWN, "r", "rank_pattern", "use_dora", "lora_bias"])
@settings(max_examples=20)
@given(value=ANYTHING)
def test_an_argument_of_measure_plasticity_is_right_or_refused_by_name(name: str, value: Any) -> None:
    arguments = {"criterion": "random", name: value}
    try:
        report = measure_plasticity(MODEL, **arguments)
    except PlasticityError as error:
        # Right by itself, but not for this model, or without images.
        fits = name not in ("criterion", "inputs", "top_k", "budget", "backbone")
        assert name in str(error)  # noqa: PT017
        assert not fits or not RIGHT[name](value), error  # noqa: PT017
        return
    assert RIGHT[name](value) or (name, value) == ("r", None), value
    assert len(report.scores) == 10


SELECTING = ["granularity", "candidates", "top_k", "budget", "training", "r", "rank_pattern", "use_dora", "lora_bias"]


@pytest.mark.parametrize("name", SELECTING)
@settings(max_examples=20)
@given(value=ANYTHING)
def test_an_argument_of_select_is_right_or_refused_by_name(name: str, value: Any) -> None:
    try:
        chosen = RANDOM.select(**{name: value})
    except ConfigError as error:
        assert name in str(error)  # noqa: PT017
        # Right by itself, but more than there are, or less than the smallest takes.
        assert name in ("top_k", "budget") or not RIGHT[name](value), error  # noqa: PT017
        return
    assert RIGHT[name](value) or (name, value) == ("r", None), value
    assert chosen.units


@settings(max_examples=100)
@given(options=st.fixed_dictionaries({}, optional=dict.fromkeys([*OWN, *LORA, "report", "source_data"], ANYTHING)))
def test_combinations_are_carried_out_or_refused(options: dict[str, Any]) -> None:
    try:
        config = PlasticityConfig(**{"training": "lora", **options})
    except ConfigError:
        return
    assert all(RIGHT[name](value) for name, value in options.items() if name in RIGHT)
    assert config.top_k is None or config.budget is None


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(PlasticityConfig) if f.init])
@pytest.mark.parametrize(
    "value", [5, "x", True, math.nan, [1], {"a": 1}, object()], ids=lambda value: repr(value).split(" at ")[0]
)
@pytest.mark.filterwarnings("ignore")
def test_no_option_of_lora_raises_anything_else(field: str, value: Any) -> None:
    """What PEFT checks when a config is written has our type too; what it does not check is PEFT's to refuse later."""
    try:
        PlasticityConfig(**{"training": "lora", field: value})
    except PlasticityError as error:
        assert isinstance(error, ConfigError)  # noqa: PT017


@pytest.mark.parametrize("model", [None, "vit", 3, {}, torch.zeros(2)], ids=repr)
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(PlasticityError, match=r"model must be a torch.nn.Module. Got"):
        measure_plasticity(model, IMAGES)


def test_candidates_may_come_from_a_generator() -> None:
    report = measure_plasticity(MODEL, criterion="random")
    assert report.select(candidates=(kind for kind in ("MHA", "FC1"))).units[0] in ("MHA", "FC1")
    with pytest.raises(ConfigError, match="candidates must be"):
        report.select(candidates=iter(lambda: "MHA", None))  # endless


# ---------------------------------------------------------------------------------------------------- reports

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
COUNTS = st.integers(2, 10**9)
MEANS = st.floats(0, 1e12, allow_nan=False)
NAMES = st.text(st.characters(categories=["L", "N"], include_characters="._-"), min_size=1, max_size=12)


@st.composite
def reports(draw: st.DrawFn) -> PlasticityReport:
    samples = draw(COUNTS)
    stages = draw(st.none() | st.lists(st.integers(1, 2), min_size=1, max_size=2))
    blocks = [(None, block) for block in range(draw(st.integers(1, 3)))]
    if stages:
        blocks = [(stage, block) for stage, count in enumerate(stages) for block in range(count)]
    scores = []
    for stage, block in blocks:
        for kind in KINDS:
            linear = not kind.startswith("LN")
            modules = tuple(f"{draw(NAMES)}{number}" for number in range(4 if kind == "MHA" else 1))
            scores.append(
                Score(
                    stage=stage, block=block, kind=kind, path=modules[0], modules=modules,
                    parameters=draw(st.integers(1, 10**6)), features=((8, 8),) * len(modules) if linear else (),
                    mean=draw(MEANS), std=draw(MEANS), samples=samples,
                )
            )  # fmt: skip
    kinds = tuple(KindScore(kind=kind, mean=draw(MEANS), std=draw(MEANS), samples=samples) for kind in KINDS)
    return PlasticityReport(
        scores=tuple(scores), kinds=kinds, model_type=draw(NAMES), model_parameters=10**8,
        inputs=draw(st.sampled_from(["embedding", "activation", None])), samples=samples,
        skipped=draw(st.integers(0, 10**6)), seed=draw(st.integers(0, 2**64 - 1)), uses_source=draw(st.booleans()),
        versions=draw(st.dictionaries(NAMES, NAMES, max_size=3)), observed=draw(st.sampled_from(["pairs", "images"])),
        title=draw(NAMES), criterion=draw(NAMES), input_std=draw(st.none() | MEANS),
    )  # fmt: skip


def load_text(text: str | bytes) -> PlasticityReport:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plasticity.json")
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return PlasticityReport.load(path)


@settings(max_examples=20)
@given(report=reports())
def test_a_report_comes_back_as_it_was(report: PlasticityReport) -> None:
    values = report.to_dict()
    again = PlasticityReport.from_dict(json.loads(json.dumps(values)))
    assert again == report
    assert again.to_dict() == values
    assert load_text(json.dumps(values)) == report
    usable(again)


@pytest.mark.filterwarnings("ignore:.*ranks high because a layer norm:UserWarning")
def usable(report: PlasticityReport) -> None:
    """What was accepted can be printed, ranked and chosen from."""
    assert str(report)
    for granularity in ("kind", "component"):
        assert len(report.ranking(granularity)) in (5, len(report.scores))
        chosen = report.select(top_k=1, granularity=granularity)
        assert json.loads(json.dumps(dataclasses.asdict(chosen)))


@settings(max_examples=100)
@given(values=JSON, whole=st.booleans())
def test_any_json_is_refused_with_a_reason(values: Any, whole: bool) -> None:
    given_values = {"format": "plasticity_peft", "format_version": 2, **values} if isinstance(values, dict) else values
    for load in (PlasticityReport.from_dict, lambda v: load_text(json.dumps(v))):
        with pytest.raises(ReportError) as refused:
            load(given_values)
        assert str(refused.value)


STRANGE = st.one_of(
    JSON,
    st.sampled_from([math.nan, math.inf, 10**19, -1, 10**400, "\ud800", "x" * 10_000, 1e309, 0, "", [[]] * 3, True]),
)


def paths_in(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(values, dict):
        for key, value in values.items():
            yield from paths_in(value, (*path, key))
    elif isinstance(values, (list, tuple)):
        for index, value in enumerate(values):
            yield from paths_in(value, (*path, index))


VALID = json.loads(json.dumps(measure_plasticity(MODEL, IMAGES, criterion="rate_of_change", max_samples=4).to_dict()))
PATHS = list(paths_in(VALID))


@settings(max_examples=150)
@given(data=st.data(), how=st.sampled_from(["drop", "double", "replace"]), path=st.sampled_from(PATHS))
@pytest.mark.filterwarnings("ignore:.*ranks high because a layer norm:UserWarning")
def test_a_changed_report_is_refused_or_used_as_it_is(data: st.DataObject, how: str, path: tuple[Any, ...]) -> None:
    values = copy.deepcopy(VALID)
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    if how == "drop":
        del parent[path[-1]]
    elif how == "double" and isinstance(parent, list):
        parent.insert(path[-1], parent[path[-1]])
    else:
        parent[path[-1]] = data.draw(STRANGE)
    loaders: list[Callable[[Any], PlasticityReport]] = [PlasticityReport.from_dict, lambda v: load_text(json.dumps(v))]
    for load in loaders:
        try:
            report = load(values)
        except ReportError as error:
            assert str(error)  # noqa: PT017
            continue
        usable(report)
        assert PlasticityReport.from_dict(report.to_dict()) == report


VALID_TEXT = json.dumps(VALID)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (VALID_TEXT.replace('"seed": 0', '"seed": 0, "seed": 1'), "'seed' twice"),
        (VALID_TEXT.replace('"seed": 0', '"seed": 1' + "0" * 5000), "not a whole JSON"),
        (VALID_TEXT.replace('"seed": 0', '"seed": 1' + "0" * 1000), "seed"),
        (VALID_TEXT.replace('"seed": 0', '"seed": NaN'), "NaN"),
        (VALID_TEXT.replace('"seed": 0', '"other": -Infinity, "seed": 0'), "Infinity"),
        (VALID_TEXT.replace('"vit"', '"\\ud800"'), "surrogate|hex escape"),
        (VALID_TEXT.replace('"vit"', '"vit\\u001b[31m"'), "model_type"),
        ("[" * 100_000 + "]" * 100_000, "not a whole JSON|not a plasticity report"),
        (
            VALID_TEXT.replace('"seed": 0', '"other": ' + "[" * 100_000 + "]" * 100_000 + ', "seed": 0'),
            "not a whole JSON",
        ),
        (b"\xff\xfe", "not a whole JSON"),
        (b"\0" * 100, "not a whole JSON"),
    ],
)
def test_a_damaged_text_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ReportError, match=reason):
        load_text(text)


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(ReportError, match="larger than"):
        PlasticityReport.load("/dev/zero")


@pytest.mark.parametrize("path", ["", "\0", ".", "/", "x" * 5000])
def test_a_path_that_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(ReportError, match="Cannot read the report"):
        PlasticityReport.load(path)


@pytest.mark.parametrize(
    "extra",
    [{"x": {1}}, {"x": object()}, {("a",): 1}, {"x": b""}, {"x": 10**5000}, {"x": math.nan}],
    ids=["set", "object", "key", "bytes", "long", "nan"],
)
def test_a_mapping_that_is_no_json_is_refused(extra: dict[Any, Any]) -> None:
    with pytest.raises(ReportError):
        PlasticityReport.from_dict({**VALID, **extra})
    circular: dict[str, Any] = dict(VALID)
    circular["x"] = circular
    with pytest.raises(ReportError):
        PlasticityReport.from_dict(circular)


# --------------------------------------------------------------------------------------------------- datasets


class Lazy(torch.utils.data.Dataset):
    """A thousand million images, which must not be counted one by one."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize("criterion", ["rate_of_change", "parameter_plasticity", "feature_norm"])
def test_a_huge_dataset_is_not_enumerated(criterion: str) -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
    room = pages * os.sysconf("SC_PAGE_SIZE") + 2**30  # the permutation alone would take 8 GB
    resource.setrlimit(resource.RLIMIT_AS, (room, limit[1]))
    try:
        report = measure_plasticity(MODEL, Lazy(), criterion=criterion, max_samples=8)
        with_source = measure_plasticity(MODEL, Lazy(), Lazy(), inputs="embedding", max_samples=8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert report.scores
    assert with_source.samples == 8


@settings(max_examples=6)
@given(images=st.integers(2**24 + 1, 2**62), seed=st.integers(0, 2**32), pairs=st.integers(2, 500))
def test_pairs_of_a_huge_dataset_are_drawn_as_from_any_other(images: int, seed: int, pairs: int) -> None:
    for source in (None, images - 1):
        drawn = draw_pairs(pairs, target=images, source=source, seed=seed)
        assert drawn.shape == (pairs, 2)
        assert drawn.min() >= 0
        assert drawn.max() < images
        columns = [drawn.flatten()] if source is None else [drawn[:, 0], drawn[:, 1]]
        assert all(len(set(column.tolist())) == len(column) for column in columns)
        assert (drawn == draw_pairs(pairs, target=images, source=source, seed=seed)).all()


@settings(max_examples=20)
@given(images=st.integers(2, 60), seed=st.integers(0, 2**32), count=st.integers(2, 80))
def test_images_are_drawn_without_repetition(images: int, seed: int, count: int) -> None:
    data = Images(torch.arange(images).float().reshape(-1, 1, 1, 1), "target_data", read_at_most=count)
    sampler = SingleImages(
        target=data, max_samples=count, batch_size=4, seed=seed, device=torch.device("cpu"), dtype=torch.float32
    )
    batch = sampler.load(range(sampler.available(count)))
    assert len(set(batch.places)) == len(batch.places) == min(images, count)
    assert batch.images["pixel_values"].flatten().tolist() == [float(place) for place in batch.places]


ITEMS = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.integers() | st.floats(),
    st.sampled_from(
        [10**400, [10**400], [[[10**400]]], object(), [[1.0], [1.0, 2.0]], [], {}, (), {"pixel_values": None}]
    ),
    st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 9), max_size=5),
        st.sampled_from([torch.float32, torch.float16, torch.float64, torch.uint8, torch.bool, torch.complex64]),
    ),
    st.builds(
        lambda shape, dtype: np.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 9), max_size=5),
        st.sampled_from(["float32", "float16", "uint8", "int64", "bool", "complex64", "U3", "O", "datetime64[s]"]),
    ),
    st.sampled_from(
        [
            torch.ones(3, 8, 8).to(torch.float8_e4m3fn),
            torch.ones(3, 8, 8).to_sparse(),
            torch.ones(3, 8, 8, device="meta"),
            torch.full((3, 8, 8), math.nan),
            torch.full((3, 8, 8), -math.inf),
            torch.rand(1, 8, 8),
            torch.rand(4, 8, 8),
            torch.rand(3, 9, 9),
            torch.rand(3, 8, 8),
            torch.rand(8, 8),
        ]
    ),
)
WRAPPERS = st.sampled_from(
    [lambda item: item, lambda item: {"pixel_values": item}, lambda item: (item, 1), lambda item: {"image": item}]
)


@settings(max_examples=120)
@given(items=st.lists(st.builds(lambda wrap, item: wrap(item), WRAPPERS, ITEMS), max_size=4), stream=st.booleans())
def test_any_dataset_is_measured_or_refused(items: list[Any], stream: bool) -> None:
    before = snapshot(MODEL)
    try:
        report = measure_plasticity(MODEL, iter(items) if stream else items, inputs="embedding", max_samples=3)
    except (DataError, NonFiniteError) as error:
        assert says_which(error)  # noqa: PT017
    else:
        assert report.samples >= 2
    assert_same(before, snapshot(MODEL))


def says_which(error: Exception) -> bool:
    """Returns whether an error says which data, or which image, or how many."""
    text = str(error)
    return any(word in text for word in ("target", "refused", "images", "pairs"))


LABELS = st.one_of(
    st.integers(-5, 5),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=2),
    st.sampled_from([10**30, -(10**30), np.int64(2), np.zeros(3), [], object()]),
    st.sampled_from([torch.tensor(1), torch.tensor([0, 1]), torch.tensor(1.5)]),
)


@settings(max_examples=12)
@given(labels=st.lists(LABELS, min_size=2, max_size=2))
def test_a_label_is_a_whole_number_or_refused(labels: list[Any]) -> None:
    data = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, labels, strict=False)]
    try:
        measure_plasticity(MODEL, data, criterion="gradient_norm", batch_size=2)
    except DataError as error:
        assert "abel" in str(error)  # noqa: PT017
        return
    # Numbers are float32, as in transformers; or a label has one number of each class.
    assert all(np.size(label) == 3 or float(np.float32(label)) in (0.0, 1.0, 2.0) for label in labels)


class HalfWayError(Exception):
    """What a dataset of the user raises."""


def raising(good: int) -> Iterator[torch.Tensor]:
    yield from IMAGES[:good]
    raise HalfWayError


@pytest.mark.parametrize("good", range(6))
@pytest.mark.parametrize("options", [{"inputs": "embedding"}, {}, {"criterion": "feature_norm"}], ids=str)
def test_an_iterator_that_raises_half_way_leaves_the_model(good: int, options: dict[str, Any]) -> None:
    before = snapshot(MODEL)
    with pytest.raises(HalfWayError):
        measure_plasticity(MODEL, raising(good), max_samples=6, batch_size=2, **options)
    assert_same(before, snapshot(MODEL))


# ------------------------------------------------------------------------------------------------------ names


@given(stage=st.none() | st.integers(0, 10**6), block=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
def test_a_canonical_id_says_stage_block_and_kind(stage: int | None, block: int, kind: str) -> None:
    part = Component(stage=stage, block=block, kind=kind, path="x", modules=("x",), parameters=1)
    *numbers, last = part.id.split(".")
    assert last == kind
    assert [int(number) for number in numbers] == ([block] if stage is None else [stage, block])


ARCHITECTURE = None


def vit_architecture() -> Any:
    from plasticity_peft.components.architecture import find_architecture

    global ARCHITECTURE
    ARCHITECTURE = ARCHITECTURE or find_architecture(MODEL)
    return ARCHITECTURE


@settings(max_examples=60)
@given(
    name=st.one_of(
        st.text(max_size=30),
        st.lists(
            st.sampled_from(["vit", "encoder", "layer", "layers", "0", "1", "٣", "q_proj", ".*", "(a+)+$", "", "["]),
            max_size=8,
        ).map(".".join),
        st.sampled_from(["a" * 10**6, "layers." * 10**5 + "0", "layers.0." * 10**5, f"layers.{'1' * 5000}.mlp.fc1"]),
    )
)
def test_any_module_name_is_found_or_refused(name: str) -> None:
    """Names of modules are text, whatever characters they hold."""
    layers = {name: Layer(full={"weight": torch.zeros(1)})}
    modules = [path for path, _ in MODEL.named_modules()]
    try:
        renamed = rename(layers, vit_architecture(), modules)
    except PlasticityError:
        return
    assert set(renamed) <= set(modules)


@settings(max_examples=20)
@given(name=st.text(min_size=1, max_size=12))
def test_a_backbone_of_any_name_is_found_or_refused(name: str) -> None:
    assume(name != "vit")
    with pytest.raises(PlasticityError, match="has no module"):
        measure_plasticity(MODEL, criterion="random", backbone=name)
