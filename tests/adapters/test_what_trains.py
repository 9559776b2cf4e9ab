"""After `get_peft_model` every parameter is chosen, of a head, named, or frozen, and nothing passes in silence."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, ViTForImageClassification, ViTModel

from plasticity_peft import PlasticityConfig, find_components
from plasticity_peft.adapters.what_trains import peft_names
from plasticity_peft.components.wrappers import walk
from plasticity_peft.errors import ConfigError, ModelError
from tests.support.families import PLAIN
from tests.support.forking import STOCK, run_code
from tests.support.models import REPOSITORY, backbone, random_images, tiny_model
from tests.support.tasks import TASKS

IMAGES = random_images()
LOGGER = "transformers.plasticity_peft.adapters.what_trains"


def config(**options: object) -> PlasticityConfig:
    """Returns a config that needs no images."""
    return PlasticityConfig(
        **{"training": "lora", "criterion": "bound", "candidates": ("MHA", "FC1", "FC2"), "r": 2, **options}
    )


def adapt(model: nn.Module, **options: object) -> PeftModel:
    return get_peft_model(model, config(**options))


def saved(model: PeftModel) -> list[str]:
    return model.peft_config["default"].modules_to_save


def trained(model: nn.Module) -> set[str]:
    """Returns the parameters of the base model that train in full."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name)
    return {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in names}


def quietly(model: nn.Module, **options: object) -> PeftModel:
    """Returns the adapted model. Fails if there is a warning of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        return adapt(model, **options)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """The log lines on what a model consists of."""
    caplog.set_level(logging.INFO, logger=LOGGER)
    transformers.logging.get_logger("transformers").addHandler(caplog.handler)

    def found() -> list[logging.LogRecord]:
        records = {id(record): record for record in caplog.records if record.name == LOGGER}
        return list(records.values())

    yield found
    transformers.logging.get_logger("transformers").removeHandler(caplog.handler)


class Own(nn.Module):
    """A backbone with a head of the user's, and whatever else."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.net = backbone()
        torch.manual_seed(5)
        self.head = nn.Linear(16, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        head = self.head[0] if isinstance(self.head, nn.ModuleList) else self.head
        return head(self.net(pixel_values=pixel_values).last_hidden_state[:, 0])


class Around(nn.Module):
    """A module around a whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(pixel_values=x).logits


class OtherName(Own):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().forward(batch["pixel_values"])


FOUND = {
    "a class for a task": (tiny_model, ["classifier"]),
    "around it": (Around, ["net.classifier"]),
    "parallel": (lambda: nn.DataParallel(tiny_model()), ["module.classifier"]),
    "the user's": (Own, ["head"]),
    "called with a dictionary": (OtherName, ["head"]),
    "a list": (lambda: Own(head=nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 2)])), ["head.0", "head.1"]),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_head_trains_and_is_saved(name: str, lines: Callable[[], list[logging.LogRecord]]) -> None:
    build, heads = FOUND[name]
    model = quietly(build())
    assert saved(model) == heads
    assert trained(model) == {f"{head}.{weight}" for head in heads for weight in ("weight", "bias")}
    (line,) = lines()
    assert line.levelno == logging.INFO
    assert all(head in line.getMessage() for head in heads)
    assert "Frozen: " in line.getMessage()


def test_every_parameter_is_chosen_a_head_named_or_frozen(lines: Callable[[], list[logging.LogRecord]]) -> None:
    extra = nn.Linear(16, 16)
    model = adapt(Own(extra=extra.requires_grad_(False)), modules_to_save=["layernorm"], candidates="LN2")
    chosen = {
        f"{part}.{name}" for part in model.peft_config["default"].selection.modules for name in ("weight", "bias")
    }
    beside = {f"{part}.{name}" for part in ("head", "net.layernorm") for name in ("weight", "bias")}
    assert trained(model) == chosen | beside
    message = lines()[0].getMessage()
    assert message.startswith("Own: LN2 train (LoRA on 0 layers, 2 modules in full). Also in full: head, ")
    assert message.endswith("Frozen: net.embeddings, extra, the rest of the blocks.")


class Twice(Own):
    """A student and a teacher."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__(teacher=teacher)


def test_what_the_user_froze_stays_frozen(lines: Callable[[], list[logging.LogRecord]]) -> None:
    for part in (tiny_model(), nn.Conv2d(3, 4, 2)):
        model = quietly(Twice(part.requires_grad_(False)), backbone="net")
        assert trained(model) == {"head.weight", "head.bias"}
        assert "teacher" in lines()[-1].getMessage().partition("Frozen: ")[2]


def test_a_second_model_that_was_not_frozen_is_no_head_and_is_reported(
    lines: Callable[[], list[logging.LogRecord]],
) -> None:
    with pytest.warns(
        UserWarning, match=r"stay frozen and are not saved: teacher\. List those that should train in modules_to_save"
    ):
        model = adapt(Twice(tiny_model()), backbone="net")
    assert trained(model) == {"head.weight", "head.bias"}
    assert lines()[0].levelno == logging.WARNING
    quietly(Twice(tiny_model()), backbone="net", modules_to_save=["teacher"])


def test_a_frozen_head_of_a_class_for_a_task_is_respected_and_reported(
    lines: Callable[[], list[logging.LogRecord]],
) -> None:
    model = tiny_model()
    model.classifier.requires_grad_(False)
    assert trained(quietly(model, candidates="MHA")) == set()
    assert lines()[0].levelno == logging.WARNING
    assert (
        "No head of ViTForImageClassification trains. If it should, list it in modules_to_save"
        in lines()[0].getMessage()
    )
    model = tiny_model()
    model.classifier.requires_grad_(False)
    assert saved(quietly(model, modules_to_save=["classifier"])) == ["classifier"]


def test_where_all_is_frozen_the_flags_say_nothing() -> None:
    assert saved(quietly(tiny_model().requires_grad_(False))) == ["classifier"]
    assert saved(quietly(Own().requires_grad_(False))) == ["head"]


def test_a_part_of_a_head_that_was_frozen_stays_frozen() -> None:
    head = nn.Sequential(nn.Linear(16, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 3))
    assert saved(quietly(Own(head=head))) == ["head.2"]
    half = nn.Linear(16, 3)
    half.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"head\.weight: frozen before, but trainable now"):
        assert saved(adapt(Own(head=half))) == ["head"]


class Scaled(nn.Module):
    """A head with a frozen layer, a list of layers, and a parameter outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16).requires_grad_(False)
        self.rest = nn.ModuleList([nn.Linear(16, 8), nn.Linear(8, 3)])
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.rest[1](self.rest[0](self.first(tokens) * self.scale))


def test_a_list_of_layers_in_a_head_that_was_frozen_in_part_trains_by_its_items() -> None:
    with pytest.warns(UserWarning, match=r"^head\.scale: parameters outside of any layer, .* as a whole"):
        model = adapt(Own(head=Scaled()))
    assert saved(model) == ["head.rest.0", "head.rest.1"]
    assert saved(adapt(Own(head=Scaled()), modules_to_save=["head"])) == ["head"]


def test_a_second_adapter_has_the_head_of_the_first() -> None:
    model = quietly(Twice(nn.Conv2d(3, 4, 2).requires_grad_(False)), backbone="net")
    model.add_adapter("second", config(backbone="net"))
    assert model.peft_config["second"].modules_to_save == ["head"]
    part = find_components(tiny_model())[1].modules[0]
    stock = get_peft_model(tiny_model(), LoraConfig(target_modules=[part], r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of any second adapter that is added in this way
        both = get_peft_model(stock.get_base_model(), config(candidates="FC1"), adapter_name="default")
    assert saved(both) == ["classifier"]


@pytest.mark.parametrize("where", [{"scale": nn.Parameter(torch.ones(3))}, {"head": None, "weight": None}])
def test_a_parameter_of_its_own_is_named(where: dict[str, Any]) -> None:
    class Bare(Own):
        def __init__(self) -> None:
            super().__init__()
            if "head" in where:
                del self.head
            self.scale = nn.Parameter(torch.ones(16, 3))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.net(pixel_values=pixel_values).last_hidden_state[:, 0] @ self.scale

    with pytest.warns(UserWarning, match=r"^scale: parameters outside of any layer, which PEFT cannot train or save"):
        adapt(Bare())


def test_a_name_that_matches_nothing_is_refused_with_the_nearest_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("plasticity_peft.adapters.model._measure", lambda *_: pytest.fail("measured"))
    for name, text in {
        "net.clasifier": "Did you mean 'net.classifier'",
        "classifer": "Did you mean 'classifier'",
        "qqqq": "Its parts are net",
        "cls_token": r"net\.vit\.embeddings\.cls_token is a parameter\. PEFT trains and saves only modules",
    }.items():
        with pytest.raises(ConfigError, match=f"modules_to_save contains '{name}'.*{text}"):
            adapt(Around(), modules_to_save=[name])


def test_names_that_peft_adds_by_itself_are_no_typos() -> None:
    assert set(saved(adapt(tiny_model(), task_type="SEQ_CLS"))) == {"classifier"}


def test_a_named_list_of_modules_is_named_by_its_items() -> None:
    model = Own(
        extra=nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.Linear(2, 2)])}).requires_grad_(False)
    )
    assert saved(quietly(model, modules_to_save=["extra"])) == ["head", "extra.a", "extra.b.0"]


def test_a_module_and_a_part_of_it_are_never_named_both() -> None:
    assert saved(quietly(tiny_model(), modules_to_save=["embeddings"])) == ["classifier", "vit.embeddings"]
    both = quietly(tiny_model(), modules_to_save=["vit.embeddings", "patch_embeddings", "classifier"])
    assert saved(both) == ["vit.embeddings", "classifier"]
    with pytest.raises(ModelError, match=r"so embeddings.patch_embeddings would be saved twice if embeddings trains"):
        adapt(backbone(), modules_to_save=["embeddings"])


def test_a_named_module_must_not_hold_chosen_ones() -> None:
    block = tiny_model().vit
    name = "layers.0" if hasattr(block, "layers") else "layer.0"
    with pytest.raises(ConfigError, match=rf"modules_to_save contains vit\S*{name}, but its module .* was selected"):
        adapt(tiny_model(), modules_to_save=[name])


def classes_for_a_task() -> dict[str, Callable[[], PreTrainedModel]]:
    """Small models whose head lies in a head, in a list, or beside several others."""
    glpn = {"depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
            "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2],
            "decoder_hidden_size": 8}  # fmt: skip
    dpt = {**PLAIN, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4, 4, 4, 4],
           "fusion_hidden_size": 4, "num_labels": 3, "reassemble_factors": [4, 2, 1, 0.5]}  # fmt: skip
    return {
        "GLPNForDepthEstimation": lambda: transformers.GLPNForDepthEstimation(transformers.GLPNConfig(**glpn)),
        "DPTForSemanticSegmentation": lambda: transformers.DPTForSemanticSegmentation(transformers.DPTConfig(**dpt)),
        "DPTForDepthEstimation": lambda: transformers.DPTForDepthEstimation(transformers.DPTConfig(**dpt)),
    }


@pytest.mark.parametrize("name", classes_for_a_task())
def test_no_module_is_saved_within_another(name: str) -> None:
    data = {} if name != "GLPNForDepthEstimation" else {"target_data": random_images(4, size=32), "criterion": None}
    model = quietly(classes_for_a_task()[name](), **data)
    wrapped = [path for path, module in model.named_modules() if hasattr(module, "original_module")]
    assert wrapped
    assert not [path for path in wrapped if any(path != other and path.startswith(other) for other in wrapped)]
    heads = {path for path, _ in walk(model.get_base_model())}
    assert set(saved(model)) <= heads


def test_names_are_taken_apart_only_where_they_have_to_be() -> None:
    head = nn.ModuleDict({"head": nn.Linear(2, 2), "other": nn.Linear(2, 2), "norm": nn.Dropout()})
    model = nn.ModuleDict({"head": head, "neck": nn.Sequential(nn.Linear(2, 2))})
    assert peft_names(model, ["head", "neck"]) == ["head.head", "head.other", "neck"]


LOADING = """
import pathlib, sys, torch
sys.modules["plasticity_peft"] = None
from peft import PeftModel
sys.path.insert(0, sys.argv[2])
folder = pathlib.Path(sys.argv[1])
base, images, expected = torch.load(folder / "base.pt", weights_only=False)
model = PeftModel.from_pretrained(base, folder / "adapter").eval()
with torch.no_grad():
    output = model(images)
torch.testing.assert_close(getattr(output, "logits", output), expected)
"""


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(IMAGES)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("name", [*(name for name in FOUND if "dictionary" not in name and "list" not in name)])
def test_stock_peft_loads_it_into_a_model_with_another_head(name: str, training: str, tmp_path: Path) -> None:
    """The base is written as torch writes it: classes of this file are found, and this package is not."""
    model = FOUND[name][0]()
    fresh = copy.deepcopy(model)
    for path in FOUND[name][1]:
        for parameter in fresh.get_submodule(path).parameters():
            nn.init.normal_(parameter)
    adapted = disturbed_where_it_trains(adapt(model, training=training))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not torch.allclose(answer(fresh), answer(adapted), atol=1e-3)
    if name in ("a class for a task", "parallel"):
        torch.save((fresh, IMAGES, answer(adapted)), tmp_path / "base.pt")
        result = run_code(LOADING, tmp_path, REPOSITORY, folder=tmp_path, parent=STOCK)
        assert result.returncode == 0, result.stderr
    torch.testing.assert_close(answer(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), answer(adapted))


def disturbed_where_it_trains(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


class Pooled(nn.Module):
    """A head on the pooler of a backbone that was loaded without one."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vit = ViTModel.from_pretrained(folder)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.vit(pixel_values=x).pooler_output)


def test_a_pooler_that_the_checkpoint_lacks_is_named(
    tmp_path: Path, lines: Callable[[], list[logging.LogRecord]]
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"^vit\.pooler: initialized at random .* modules_to_save=\['vit\.pooler'\]"):
        adapt(Pooled(tmp_path / "base"))
    assert lines()[0].levelno == logging.WARNING
    assert "vit.pooler: initialized at random" in lines()[0].getMessage()
    with pytest.warns(UserWarning, match=r"^vit\.pooler: initialized at random"):
        adapt(copy.deepcopy(Pooled(tmp_path / "base")))
    model = disturbed_where_it_trains(quietly(Pooled(tmp_path / "base"), modules_to_save=["pooler"]))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(Pooled(tmp_path / "base", seed=1), tmp_path / "adapter")
    torch.testing.assert_close(answer(loaded), answer(model))


def test_a_fresh_head_that_trains_is_no_reason_to_warn(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    quietly(ViTForImageClassification.from_pretrained(tmp_path))
    quietly(ViTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True))


def llava(taken: int | list[int] = -1) -> PreTrainedModel:
    text = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(**PLAIN)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=31, vision_feature_layer=taken)
    )


def test_a_model_that_answers_in_text_trains_its_vision_part_alone_and_says_so(
    lines: Callable[[], list[logging.LogRecord]],
) -> None:
    assert trained(quietly(llava(), candidates="MHA")) == set()
    assert lines()[0].levelno == logging.WARNING
    assert "No head of LlavaForConditionalGeneration trains" in lines()[0].getMessage()


@pytest.mark.parametrize("taken", [-1, -2, -3, 2, 3, [0, 1], [1, -1]])
def test_components_behind_the_tokens_that_a_model_takes_are_named(
    taken: int | list[int], lines: Callable[[], list[logging.LogRecord]]
) -> None:
    """They are those without a gradient."""
    adapted = quietly(llava(taken), candidates=("MHA", "FC1"), top_k=2)
    tokens = torch.tensor([[1, 31, 31, 31, 31, 2]])  # an image has four patches
    adapted(input_ids=tokens, pixel_values=torch.rand(1, 3, 16, 16)).logits.sum().backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    idle = {re.search(r"layers\.(\d)", name)[1] for name, parameter in trained.items() if parameter.grad is None}
    names = ", ".join(f"{block}.{kind}" for block in sorted(idle) for kind in ("MHA", "FC1"))
    pattern = r"No head of .* modules_to_save\.(?: (.*): no gradient, because Llava)?"
    assert (re.search(pattern, lines()[0].getMessage())[1] or "") == names


def test_a_class_for_a_task_whose_head_cannot_be_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "can_generate", classmethod(lambda cls: False))
    with pytest.raises(
        ModelError, match=r"its head could not be found\. List the modules .* in modules_to_save.*lm_head"
    ):
        adapt(llava())
    assert trained(quietly(llava(), candidates="MHA", modules_to_save=[])) == set()


class Distributed(DistributedDataParallel):
    """DistributedDataParallel without a process group."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_wrapped_for_several_processes_is_adapted_before(inside: bool) -> None:
    model = Distributed(tiny_model())
    with pytest.raises(ModelError, match=r"DistributedDataParallel\(get_peft_model\(model, config\)\)"):
        adapt(nn.ModuleDict({"model": model}) if inside else model)


def test_a_model_compiled_in_place_is_adapted() -> None:
    model = tiny_model()
    model.compile(backend="eager")
    assert saved(quietly(model)) == ["classifier"]


@pytest.mark.parametrize("labels", [{1: "cat", 2: "dog", 3: "owl"}, {0: "cat", 2: "owl"}, {-1: "cat"}])
def test_labels_that_are_not_numbered_as_the_outputs_are_refused_before_measuring(
    labels: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.config.id2label = labels
    monkeypatch.setattr("plasticity_peft.adapters.model._measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=r"must number its \d labels from 0 to \d.*model\.config\.id2label"):
        adapt(model)


def test_a_wrapped_model_has_the_labels_of_its_own() -> None:
    for build in (lambda: nn.DataParallel(tiny_model()), Around):
        assert adapt(build()).peft_config["default"].id2label == {index: f"LABEL_{index}" for index in range(3)}


def test_a_head_with_a_parameter_of_its_own_trains_as_a_whole() -> None:
    """The decoder of ViTMAE holds a mask token that trains, a table that does not, and a list of layers."""
    model = TASKS["vit_mae-pretraining"].build()
    assert not model.decoder.decoder_pos_embed.requires_grad
    with pytest.warns(UserWarning, match=r"decoder\.decoder_pos_embed: frozen before, but trainable now"):
        adapted = adapt(model)
    assert saved(adapted) == ["decoder"]
    model = Own(head=nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 3).requires_grad_(False)]))
    assert saved(quietly(model)) == ["head.0"]


def test_a_head_in_the_inner_model_of_a_class_for_a_task_is_not_passed_over() -> None:
    """The decoder of OneFormer lies in its inner model, which takes text, so that it is not found."""
    task = TASKS["oneformer"]
    with pytest.raises(ModelError, match=r"its head could not be found\. .*, model\.transformer_module, "):
        adapt(task.build(), criterion="random", target_data=task.data())


class Normed(nn.Module):
    """A head with a batch norm, on a part with another one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm2d(3).requires_grad_(False)
        self.net = tiny_model()
        self.head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(pixel_values=self.stem(pixel_values)).logits)


def test_frozen_batch_norms_keep_their_statistics_and_those_of_a_head_are_saved(tmp_path: Path) -> None:
    fresh = copy.deepcopy(model := Normed())
    adapted = quietly(model).train()
    norms = {path: part.training for path, part in adapted.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert list(norms.values()) == [False]
    adapted(IMAGES)
    assert torch.equal(model.stem.running_mean, fresh.stem.running_mean)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert not torch.equal(loaded.base_model.model.head.modules_to_save["default"][0].running_mean, torch.zeros(3))
    torch.testing.assert_close(answer(loaded), answer(adapted))
    assert adapted.train().base_model.model.head.modules_to_save["default"][0].training
