"""Wrappers are seen through, and heads are found wherever they lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate.utils
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from plasticity_peft import BlockLayout, find_components, measure_plasticity, register_architecture
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.fresh import fresh_weights
from plasticity_peft.components.heads import find_entry
from plasticity_peft.components.layouts import LAYOUTS
from plasticity_peft.components.wrappers import bare, forward_parameters
from plasticity_peft.report.report import PlasticityReport
from tests.support.models import backbone, disturbed, random_images, tiny_model


def in_bfloat16(model: nn.Module) -> nn.Module:
    """Returns the model as Accelerate prepares it for mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of a process is fixed
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


@pytest.fixture(autouse=True)
def _accelerate_as_it_was() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


IMAGES = random_images()
CRITERIA = ("parameter_plasticity", "rate_of_change")


def scores(model: nn.Module, criterion: str = "parameter_plasticity", **options: object) -> PlasticityReport:
    return measure_plasticity(model, IMAGES, criterion=criterion, max_samples=8, **options)


def numbers(report: PlasticityReport) -> list[tuple[str, float, float]]:
    return [(row.id, row.mean, row.std) for row in report.scores]


class HandsOn(nn.Module):
    """A module of the user's that hands on what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_model()

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.net(*args, **kwargs)


class OneArgument(HandsOn):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(pixel_values=x).logits


class OtherName(HandsOn):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net(pixel_values=batch["pixel_values"]).logits


class Distributed(DistributedDataParallel):
    """DistributedDataParallel without a process group: nothing of it runs where it is measured."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


WRAPPERS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": Distributed,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled and parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "parallel and compiled": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "compiled regions": lambda model: accelerate.utils.compile_regions(model, backend="eager"),
    "mixed precision": lambda model: in_bfloat16(model),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_known_wrapper_changes_nothing(name: str, criterion: str) -> None:
    wrapped = WRAPPERS[name](tiny_model())
    assert find_components(wrapped) == find_components(tiny_model())
    assert find_architecture(bare(wrapped)).heads == ("classifier",)
    assert scores(wrapped, criterion) == scores(tiny_model(), criterion)


def test_mixed_precision_is_left_as_it_was() -> None:
    model = in_bfloat16(tiny_model())
    before = vars(model).copy()
    scores(model)
    assert {name: vars(model)[name] for name in before} == before
    assert vars(model)["forward"] is before["forward"]


def test_a_model_compiled_in_place_is_measured_as_it_is() -> None:
    model = tiny_model()
    model.compile(backend="eager")
    assert scores(model) == scores(tiny_model())


@pytest.mark.parametrize("criterion", [*CRITERIA, "gradient_norm"])
@pytest.mark.parametrize("wrapper", [HandsOn, OneArgument, OtherName])
def test_a_module_around_a_model_changes_no_score(wrapper: type[HandsOn], criterion: str) -> None:
    data: object = IMAGES
    if criterion == "gradient_norm":
        if wrapper is OneArgument:
            pytest.skip("its forward pass takes no labels")
        data = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(IMAGES)]
    one, other = (
        measure_plasticity(model, data, criterion=criterion, max_samples=8) for model in (wrapper(), tiny_model())
    )
    assert numbers(one) == numbers(other)
    assert find_architecture(wrapper()).heads == ("net.classifier",)


class WithHead(nn.Module):
    """A backbone of transformers with a head of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = backbone()
        torch.manual_seed(5)
        self.head = nn.Linear(16, 3)

    def answer(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(pixel_values=images).last_hidden_state[:, 0])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.answer(pixel_values)


class WithHeadX(WithHead):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(x)


class WithHeadAnything(WithHead):
    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.answer(*args, *kwargs.values())


class WithHeadBatch(WithHead):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.answer(batch["pixel_values"])


class Features(WithHead):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(pixel_values=x).last_hidden_state[:, 0]


class Deep(nn.Module):
    """A backbone and a head one level down."""

    def __init__(self) -> None:
        super().__init__()
        inner = WithHead()
        self.body = nn.ModuleDict({"vit": inner.net, "head": inner.head})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.body["head"](self.body["vit"](pixel_values=pixel_values).last_hidden_state[:, 0])


def in_sequence() -> nn.Module:
    """Returns a Sequential of a module that returns features, and a head."""
    body = Features()
    head = body.head
    del body.head
    return nn.Sequential(body, head)


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (WithHeadX, ("head",)),
        (WithHeadAnything, ("head",)),
        (Deep, ("body.head",)),
        (in_sequence, ("1",)),
        (lambda: nn.DataParallel(WithHead()), ("head",)),
    ],
    ids=["x", "anything", "deep", "sequence", "parallel"],
)
def test_however_a_model_is_called_its_head_and_scores_are_the_same(
    build: Callable[[], nn.Module], heads: tuple[str, ...]
) -> None:
    model = build()
    assert find_architecture(bare(model)).heads == heads
    assert numbers(scores(model)) == numbers(scores(WithHead()))


def test_where_a_model_cannot_be_called_with_images_its_backbone_is_run_and_the_head_is_found_all_the_same() -> None:
    architecture = find_architecture(WithHeadBatch())
    assert (architecture.entry, architecture.heads, architecture.called_heads) == ("net", ("head",), ())
    assert numbers(scores(WithHeadBatch())) == numbers(scores(backbone()))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(16), Attention(), nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.fc1(self.norm2(x)).relu())


class Whole(nn.Module):
    """A vision transformer as timm writes it: its head lies in the module that holds the blocks."""

    def __init__(self, head: str = "head", *, first: bool = False) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": "whole", "image_size": 8})()
        self.name = head
        if first:
            self.add_module(head, nn.Linear(16, 3))
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(16)
        if not first:
            self.add_module(head, nn.Linear(16, 3))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(pixel_values).flatten(2).mT
        x = self.norm(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)))
        return self.get_submodule(self.name)(x[:, 0])


class Timm(Whole):
    """One that names its head, in the way of timm; another layer after the blocks is none."""

    def __init__(self) -> None:
        super().__init__("fc")
        self.attn_pool = nn.Linear(16, 16)

    def get_classifier(self) -> nn.Module:
        return self.fc


@pytest.fixture
def whole() -> object:
    """Makes the model type of `Whole` known."""
    layout = BlockLayout(
        blocks="blocks.*", LN1="norm1", MHA="attn", projections=("attn.qkv", "attn.proj"), LN2="norm2", FC1="fc1",
        FC2="fc2",
    )  # fmt: skip
    register_architecture("whole", layout)
    yield
    del LAYOUTS["whole"]


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("name", ["head", "classifier", "fc", "mlp_head", "out", "linear", "readout"])
def test_a_head_beside_the_blocks_is_found(name: str) -> None:
    model = disturbed(Whole(name))
    assert find_architecture(model).heads == (name,)
    assert find_architecture(bare(nn.DataParallel(model))).heads == (name,)
    model.blocks, before = nn.Sequential(*model.blocks), numbers(scores(model))
    setattr(model, name, nn.Linear(16, 3))
    assert numbers(scores(model)) == before, "a fresh head enters the scores"


@pytest.mark.usefixtures("whole")
def test_a_head_that_is_made_first_or_named_by_the_model_is_found() -> None:
    assert find_architecture(Whole("classifier", first=True)).heads == ("classifier",)
    assert find_architecture(Timm()).heads == ("fc",)
    outer = nn.Sequential(Timm(), nn.Linear(3, 3))
    assert find_architecture(outer).heads == ("1", "0.fc")


class Several(WithHead):
    """Heads in lists and dictionaries, which are no modules that can be called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleList([nn.Linear(16, 3), nn.ModuleDict({"a": nn.Sequential(nn.Linear(16, 2))})])

    def answer(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.net(pixel_values=images).last_hidden_state[:, 0]
        return torch.cat([self.head[0](tokens), self.head[1]["a"](tokens)], dim=1)


def test_heads_in_lists_are_found_one_by_one() -> None:
    assert find_architecture(Several()).heads == ("head.0", "head.1.a")
    assert len(scores(Several()).scores) == 10


class WithTeacher(WithHead):
    """A second model beside the backbone."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher


@pytest.mark.parametrize(
    "build",
    [
        tiny_model,
        backbone,
        lambda: nn.ModuleDict({"model": tiny_model("dinov2")}),
        lambda: nn.Sequential(tiny_model()),
    ],
)
def test_a_second_model_is_no_head(build: Callable[[], nn.Module]) -> None:
    assert find_architecture(WithTeacher(build()), "net").heads == ("head",)


def test_what_stands_beside_a_second_model_is_a_head() -> None:
    branch = nn.ModuleDict({"cnn": nn.Conv2d(3, 4, 2), "vit": tiny_model()})
    assert find_architecture(WithTeacher(branch), "net").heads == ("head", "teacher.cnn")


def test_frozen_or_not_a_model_has_the_same_scores() -> None:
    expected = numbers(scores(WithHead()))
    for freeze in (lambda model: model, lambda model: model.head, lambda model: model.net):
        model = WithHead()
        freeze(model).requires_grad_(False)
        assert find_architecture(model).heads == ("head",)
        assert numbers(scores(model)) == expected


def test_arguments_are_seen_through_a_method_that_wraps_a_method() -> None:
    model = WithHead()
    forward = model.forward

    def wrapped(self: nn.Module, *args: object, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    wrapped.__wrapped__ = forward  # type: ignore[attr-defined]
    model.forward = wrapped.__get__(model)  # type: ignore[method-assign]
    assert list(forward_parameters(model)) == ["pixel_values"]
    assert find_entry(model, "net") == ""
    assert next(iter(forward_parameters(tiny_model()))) == "pixel_values"


def test_weights_that_a_checkpoint_lacks_are_known(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = ViTModel.from_pretrained(tmp_path)
    assert fresh_weights(model) == ("pooler",)
    assert fresh_weights(nn.ModuleDict({"a": model})) == ("a.pooler",)
    assert fresh_weights(copy.deepcopy(model)) == ("pooler",), "without the marks of transformers"
    assert fresh_weights(ViTForImageClassification.from_pretrained(tmp_path)) == ()
    wider = ViTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert fresh_weights(wider) == ("classifier",)


def test_a_model_that_is_random_as_a_whole_has_no_part_that_stands_out() -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8)
    assert fresh_weights(ViTModel(config)) == ()
    assert fresh_weights(tiny_model()) == ()
    assert fresh_weights(nn.Linear(2, 2)) == ()
