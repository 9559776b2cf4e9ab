"""Model cards: true, valid, the same twice, beside what PEFT and Trainer write; their snippets run."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    ViTModel,
)

from plasticity_peft import PlasticityConfig, load_adapter, measure_plasticity
from plasticity_peft.adapters.peft_model import PlasticityPeftModel
from plasticity_peft.card import DRAWN, update_card
from plasticity_peft.errors import AdapterError, ConfigError, ReportError
from plasticity_peft.report.plotting import png
from plasticity_peft.report.provenance import Provenance, provenance_of
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.saved.trained import TrainedAdapter
from tests.support.forking import STOCK, hub_cache, run_code
from tests.support.models import REPOSITORY, backbone, moved, random_images, tiny_model
from tests.support.outputs import answers, difference
from tests.support.round_trips import adapt
from tests.support.tasks import TASKS

# PEFT looks on the Hub, which is out of reach, whether the base model's vocabulary has changed; ours has none.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in org/base:UserWarning")

IMAGES = random_images()
LABELS = {0: "cat", 1: "dog", 2: "owl"}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"top_k": 2},
    "full": {"training": "full", "criterion": "rate_of_change", "candidates": ("MHA", "FC1", "FC2")},
    "block": {"granularity": "component", "top_k": 3},
    "norms": {"candidates": ("LN1", "MHA"), "top_k": 2},
    "candidates": {"candidates": ("FC1",), "top_k": 1},
    "weights": {"criterion": "bound", "target_data": None, "candidates": ("MHA", "FC1", "FC2")},
    "many": {},
    "headless": {"training": "full"},
}


@pytest.fixture(autouse=True, scope="module")
def pictures_are_drawn_once() -> Iterator[None]:
    """Of all reports of this file: the package keeps the last four, and drawing takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plasticity_peft.card._png", lru_cache(maxsize=None)(png))
        yield


def config(**options: Any) -> PlasticityConfig:
    return PlasticityConfig(
        **{"training": "lora", "target_data": IMAGES, "max_samples": 8, "r": 2, "lora_alpha": 4, **options}
    )


def cached(cache: Path, name: str) -> Path:
    """Returns the folder in which the Hub's cache keeps the files of a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """A cache of the Hub with a base model, "org/base", and an adapter of each case, "user/<case>"."""
    folder = hub_cache()
    base = cached(folder, "org/base")
    tiny_model().save_pretrained(base)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(base)
    for case, options in CASES.items():
        adapted(folder, case, **options).save_pretrained(cached(folder, f"user/{case}"))
    yield folder
    for repository in folder.iterdir():
        shutil.rmtree(repository)


def base_of(folder: Path, case: str) -> PreTrainedModel:
    if case == "headless":
        return ViTModel.from_pretrained("org/base", cache_dir=folder, add_pooling_layer=False)
    labels = {index: f"label {index}" for index in range(25)} if case == "many" else LABELS
    return AutoModelForImageClassification.from_pretrained(
        "org/base", cache_dir=folder, id2label=labels, label2id={label: index for index, label in labels.items()},
        ignore_mismatched_sizes=True,
    )  # fmt: skip


def adapted(folder: Path, case: str, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return moved(get_peft_model(base_of(folder, case), config(**options))).eval()


def card_of(cache: Path, case: str) -> ModelCard:
    return ModelCard.load(adapter_in(cache, case) / "README.md")


def adapter_in(cache: Path, case: str) -> Path:
    return cache / f"models--user--{case}" / "snapshots" / ("0" * 40)


def without_our_part(text: str) -> str:
    return re.sub(r"<!-- plasticity_peft: begin.*end default -->\n\n", "", text, flags=re.DOTALL)


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("case", CASES)
def test_a_card_tells_what_was_trained_and_why(cache: Path, case: str) -> None:
    card, adapter = card_of(cache, case), TrainedAdapter.from_folder(adapter_in(cache, case))
    report, selection, text = adapter.report, adapter.selection, card.text
    rows = re.findall(r"^\| (\d+) \| ([\w.]+) \| ([\w.+-]+) \| ([\w.+-]+) \| (\w*) *\|$", text, flags=re.MULTILINE)
    ranking = report.ranking(selection.granularity)
    assert [row[1] for row in rows] == [row.unit for row in ranking]
    assert {row[1] for row in rows if row[4] == "yes"} == set(selection.units)
    for (_, _, score, error, _), row in zip(rows, ranking, strict=True):
        assert float(score) == pytest.approx(row.score, rel=1e-3)
        assert error == "exact" if case == "weights" else float(error) == pytest.approx(row.standard_error, rel=0.1)
    saved = sum(value.numel() for value in load_file(adapter_in(cache, case) / "adapter_model.safetensors").values())
    trainable, _ = adapted(cache, case, **CASES[case]).get_nb_trainable_parameters()
    assert adapter.saved_parameters == saved == trainable
    assert f"contains {saved:,} trained parameters, {100 * saved / selection.model_parameters:.2f} %" in text
    first = {row.unit for row in ranking[: len(selection.units)]} == set(selection.units)
    assert ("the best of those that were candidates" in text) == (not first)
    assert ("in full." in text) == (case in ("full", "headless"))
    assert ("layer norms, which LoRA cannot adapt, in full" in text) == (case == "norms")
    for word in (f"**{', '.join(selection.units)}**", f"| seed | {report.seed} |", report.title, "2602.06883"):
        assert word in text
    assert ("| target images | Tensor: 12 images |" in text) == (case != "weights")
    assert ("| inputs (protocol) | embedding |" in text) == (case == "full")
    assert "![" in text
    assert (adapter_in(cache, case) / "plasticity.png").stat().st_size > 5_000


@pytest.mark.parametrize("case", CASES)
def test_the_metadata_are_valid_and_say_what_is_known(cache: Path, case: str) -> None:
    data = card_of(cache, case).data
    assert (data.library_name, data.base_model) == ("peft", "org/base")
    assert data.pipeline_tag == (None if case == "headless" else "image-classification")
    assert {"lora", "plasticity_peft", "base_model:adapter:org/base"} <= set(data.tags)
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()


RUNNER = """
import os, sys, torch
os.chdir(sys.argv[1])
if sys.argv[2] == "stock":
    sys.modules["plasticity_peft"] = None
from safetensors.torch import load_file, save_file
images, outputs = load_file("images.safetensors")["images"], {}
for case in sys.argv[3:]:
    names = {}
    exec(compile(open(f"{case}-{sys.argv[2]}.py").read(), case, "exec"), names)
    with torch.no_grad():
        outputs[case] = names["model"].eval()(pixel_values=images)[0]
save_file(outputs, f"outputs-{sys.argv[2]}.safetensors")
"""


@pytest.mark.parametrize("how", ["stock", "ours"])
def test_the_snippets_run_as_they_stand(cache: Path, how: str, tmp_path: Path) -> None:
    """Their repository is the only thing in them that is replaced; it is in the cache of the Hub."""
    save_file({"images": IMAGES}, tmp_path / "images.safetensors")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    for case in CASES:
        both = snippets(card_of(cache, case).text)
        assert len(both) == 2
        text = both[0 if how == "stock" else 1]
        assert text.count('"user/repo"') == 1
        (tmp_path / f"{case}-{how}.py").write_text(text.replace("user/repo", f"user/{case}"))
    result = run_code(RUNNER, tmp_path, how, *CASES, folder=tmp_path, parent=STOCK)
    assert result.returncode == 0, result.stderr
    outputs = load_file(tmp_path / f"outputs-{how}.safetensors")
    for case, options in CASES.items():
        with torch.no_grad():
            torch.testing.assert_close(outputs[case], adapted(cache, case, **options)(pixel_values=IMAGES)[0])
    if how == "stock":
        answers = result.stdout.split("\n")
        assert len([answer for answer in answers if answer in LABELS.values()]) == 6
        assert len([answer for answer in answers if answer.startswith("label ")]) == 1


@pytest.mark.parametrize("when", ["before the card", "after the card"])
def test_the_stock_snippet_loads_the_image_processor_of_the_adapter(cache: Path, when: str, tmp_path: Path) -> None:
    """Trainer saves the image processor after the adapter, whose card is then written already."""
    repository = f"user/processor-{when.replace(' ', '-')}"
    folder, model = cached(cache, repository), adapted(cache, "lora")
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)
    if when == "before the card":
        processor.save_pretrained(folder)
    model.save_pretrained(folder)
    code = snippets(ModelCard.load(folder / "README.md").text)[0]
    assert ("except OSError" in code) == (when == "after the card")
    if when == "after the card":
        processor.save_pretrained(folder)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    code = code.replace("user/repo", repository) + "print(image_processor.do_normalize)\n"
    result = run_code(code, folder=tmp_path, parent=STOCK)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "False"
    update_card(folder)
    assert "except OSError" not in snippets(ModelCard.load(folder / "README.md").text)[0]


def test_a_picture_is_drawn_once_for_a_report_and_a_selection(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr("plasticity_peft.card._png", lru_cache(lambda *given: drawn.append(given) or b"picture"))
    for case, name in (("lora", "first"), ("lora", "again"), ("full", "other")):
        update_card(shutil.copytree(adapter_in(cache, case), tmp_path / name))
    assert len(drawn) == 2
    assert (tmp_path / "other" / "plasticity.png").read_bytes() == b"picture"


def trainer_of(model: PeftModel, folder: Path) -> Trainer:
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True)
    return Trainer(model=model, args=arguments)


def stock_lora(cache: Path) -> PeftModel:
    return get_peft_model(base_of(cache, "lora"), LoraConfig(target_modules=["mlp.fc1", "intermediate.dense"]))


@pytest.mark.parametrize("writer", ["peft", "trainer"])
def test_what_peft_and_trainer_write_stays(cache: Path, writer: str, tmp_path: Path) -> None:
    cards = []
    for name, model in (("stock", stock_lora(cache)), ("ours", adapted(cache, "lora"))):
        model.save_pretrained(tmp_path / name / "card")
        if writer == "trainer":
            about = {"dataset": "digits", "tasks": "image-classification", "license": "mit"}
            trainer_of(model, tmp_path / name / "card").create_model_card(**about)
        cards.append(ModelCard.load(tmp_path / name / "card" / "README.md"))
    stock, ours = cards
    assert without_our_part(ours.text).split("\n") == stock.text.split("\n")
    assert "plasticity" not in without_our_part(ours.text)
    found = ours.data.to_dict()
    for key, value in stock.data.to_dict().items():
        assert found[key] == value or (key == "tags" and set(value) < set(found[key])), key


def test_saving_twice_gives_the_same_card_and_keeps_what_people_wrote(cache: Path, tmp_path: Path) -> None:
    model = adapted(cache, "lora")
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    edited = first.replace("# Model Card for Model ID", "# Owls\n\nMine.").replace("### Ranking", "### Overwritten")
    (tmp_path / "README.md").write_text(edited + "\nMine too.\n")
    update_card(tmp_path)
    expected = first.replace("# Model Card for Model ID", "# Owls\n\nMine.") + "\nMine too."
    assert (tmp_path / "README.md").read_text().strip() == expected.strip()


def test_the_live_model_and_its_folder_give_the_same_card(cache: Path) -> None:
    for case in CASES:
        path = adapter_in(cache, case) / "README.md"
        before = path.read_text()
        update_card(path.parent)
        assert path.read_text() == before


@pytest.mark.parametrize("writer", ["peft", "trainer"])
def test_no_path_of_this_machine_is_in_a_card(writer: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    info = DatasetInfo(dataset_name=str(tmp_path / "data"), builder_name=str(tmp_path))
    data = Dataset.from_dict({"pixel_values": IMAGES.tolist()}, info=info)
    model = get_peft_model(base, config(target_data=data))
    model.save_pretrained(tmp_path / "adapter")
    update_card(tmp_path / "adapter", metrics={"accuracy": 0.5}, dataset=data, split="test")
    if writer == "trainer":
        trainer = trainer_of(model, tmp_path / "adapter")
        (tmp_path / "base").rename(tmp_path / "gone")  # what is no folder, Trainer takes for a name on the Hub
        trainer.create_model_card()
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert str(tmp_path.parent.parent) not in str(card)
    assert card.data.base_model is None
    assert not [tag for tag in card.data.tags if tag.startswith("base_model")]
    assert "| Dataset | test | accuracy | 0.5 |" in card.text
    assert str(tmp_path) not in json.dumps(model.peft_config["default"].report.to_dict())


def test_metrics_are_in_the_card_and_stay_with_the_weights(cache: Path, tmp_path: Path) -> None:
    model, folder = adapted(cache, "lora"), tmp_path / "owls"
    trainer = trainer_of(model, folder)
    trainer.save_model()
    update_card(folder, metrics={"accuracy": 0.25, "f1": 0.5}, dataset="user/birds", split="test")
    update_card(folder, metrics={"accuracy": 0.75}, dataset="digits", split="test")
    update_card(folder, metrics={"accuracy": 0.875, "f1": 0.5}, dataset="user/birds", split="test")

    def check() -> None:
        card = ModelCard.load(folder / "README.md")
        found = {(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results}
        birds = {("user/birds", "test", "accuracy", 0.875), ("user/birds", "test", "f1", 0.5)}
        assert found == {*birds, ("digits", "test", "accuracy", 0.75)}
        assert len(card.data.eval_results) == 3
        assert card.data.datasets == ["user/birds"]
        index = card.data.to_dict()["model-index"]
        name, results = model_index_to_eval_results(index)
        assert name == "owls"
        assert eval_results_to_model_index(name, results) == index
        assert "| user/birds | test | accuracy | 0.875 |" in card.text
        assert PlasticityReport.load(folder / "plasticity.json") == model.peft_config["default"].report

    check()
    trainer.save_model()  # as in trainer.push_to_hub(), which saves,
    check()
    trainer.create_model_card(dataset="digits", tasks="image-classification")  # and writes another card over ours
    check()
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).add_(1)
    trainer.save_model()
    for _ in range(2):
        card = ModelCard.load(folder / "README.md")
        assert not card.data.eval_results
        assert "### Results" not in card.text
        assert "results" not in json.loads((folder / "plasticity.json").read_text())
        trainer.create_model_card()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"metrics": {"accuracy": float("nan")}, "dataset": "digits"},
            "accuracy must be a finite number, got nan",
        ),
        ({"metrics": {"accuracy": "0.5"}, "dataset": "digits"}, "metrics.accuracy must be a valid number, got '0.5'"),
        ({"metrics": [0.5], "dataset": "digits"}, r"metrics must be an object, got \[0.5\]"),
        ({"metrics": {"accuracy": 0.5}}, "dataset must be the dataset .* Got None"),
        ({"metrics": {"accuracy": 0.5}, "dataset": "a/b/c"}, "dataset.repo_id must be the id of a dataset on the Hub"),
        ({"metrics": {"accuracy": 0.5}, "dataset": "digits", "split": "a\nb"}, "dataset.split must be printable text"),
    ],
)
def test_metrics_that_cannot_be_are_refused(cache: Path, arguments: dict[str, Any], text: str) -> None:
    before = card_of(cache, "lora").content
    with pytest.raises(ConfigError, match=text):
        update_card(adapter_in(cache, "lora"), **arguments)
    assert card_of(cache, "lora").content == before


def test_what_is_no_adapter_of_ours_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"No plasticity\.json in .*not trained with plasticity_peft"):
        update_card(tmp_path)
    with pytest.raises(AdapterError, match=r"The folder .*missing does not exist"):
        update_card(tmp_path / "missing")
    report = tmp_path / "plasticity.json"
    adapted(cache, "lora").save_pretrained(tmp_path)
    for value, text in (
        ({"adapter": None}, "adapter is missing"),
        ({"adapter": 3}, "adapter must be an object, got 3"),
        ({"adapter": {"units": 1}}, "adapter.granularity is missing"),
        ({"results": [{"metrics": "none"}]}, "results.0.metrics must be an object, got 'none'"),
    ):
        saved = report.read_text()
        report.write_text(json.dumps({**json.loads(saved), **value}))
        with pytest.raises(ReportError, match=rf"Cannot read plasticity\.json of .*: {text}"):
            update_card(tmp_path)
        report.write_text(saved)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"Cannot read adapter_model\.safetensors"):
        update_card(tmp_path)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged below the logger of transformers, which passes nothing on as a rule."""
    logger = logging.getLogger("transformers")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(caplog.handler)
    logger.setLevel("INFO")
    logger.propagate = False  # it is True where the variable CI is set: everything would come twice
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate


def test_without_matplotlib_a_card_has_no_picture_and_says_nothing_wrong(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    model = adapted(cache, "lora", seed=3)  # a report whose picture was not drawn before
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "### Ranking" in text
    assert "plasticity.png" not in text
    assert not (tmp_path / "plasticity.png").exists()
    (record,) = (record for record in log.records if "no picture" in record.message)
    assert record.levelname == "INFO"
    assert "plasticity_peft[plot]" in record.message


def test_a_card_that_fails_costs_no_training_and_is_no_secret(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("plasticity_peft.saved.card_section.TEMPLATE", tmp_path / "missing.md")
    adapted(cache, "lora").save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    (record,) = (record for record in log.records if "model card" in record.message)
    assert record.levelname == "WARNING"
    assert "missing.md" in record.getMessage()


def test_what_load_adapter_does_not_read_is_not_said_to_load_with_it(cache: Path, tmp_path: Path) -> None:
    adapted(cache, "lora", bias="lora_only").save_pretrained(tmp_path)
    assert "load_pretrained" not in (tmp_path / "README.md").read_text()
    assert "PeftModel.from_pretrained(base, adapter)" in (tmp_path / "README.md").read_text()
    with pytest.raises(AdapterError, match="bias='lora_only' is not supported by load_adapter"):
        load_adapter(base_of(cache, "lora"), tmp_path)


HOSTILE = {0: "a|b", 1: "x\n```\n# y", 2: "<!-- plasticity_peft: end default -->", 3: "'\"\\`"}


def test_labels_cannot_break_the_card(tmp_path: Path) -> None:
    model = tiny_model(num_labels=4)
    model.config.id2label = HOSTILE
    model = get_peft_model(model, config())
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    assert first.count("<!-- plasticity_peft: end default -->") == 1
    line = next(line for line in snippets(first)[0].split("\n") if line.startswith("id2label = "))
    assert eval(line.removeprefix("id2label = ")) == HOSTILE


def test_each_adapter_of_a_model_has_its_part(cache: Path, tmp_path: Path) -> None:
    model = adapted(cache, "lora", candidates=("MHA",))
    model.add_adapter("second", config(candidates=("FC1",), seed=2))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert re.findall(r"begin (\w+) -->", text) == re.findall(r"end (\w+) -->", text) == ["default", "second"]
    assert "![Parameter plasticity of vit, 8 images](second/plasticity.png)" in text
    assert (tmp_path / "second" / "plasticity.png").exists()
    assert ', subfolder="second")' in snippets(text)[2]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


# The seam


def test_our_class_is_found_and_what_is_saved_is_what_stock_peft_saves(cache: Path, tmp_path: Path) -> None:
    ours, stock = adapted(cache, "lora"), stock_lora(cache)
    assert type(ours) is PlasticityPeftModel
    assert ours.peft_config["default"].task_type is None
    written = []
    for name, model in (("ours", ours), ("stock", stock)):
        model.save_pretrained(tmp_path / name)
        written.append(json.loads((tmp_path / name / "adapter_config.json").read_text()))
    assert written[0].keys() == written[1].keys()
    different = {key for key, value in written[0].items() if value != written[1][key]}
    assert different == {"target_modules", "modules_to_save", "r", "lora_alpha"}
    assert written[0]["auto_mapping"]["base_model_class"] == "ViTForImageClassification"
    loaded = load_adapter(base_of(cache, "lora"), tmp_path / "ours")
    assert type(loaded) is PlasticityPeftModel
    loaded.save_pretrained(tmp_path / "again")
    first, again = ((tmp_path / name / "README.md").read_text() for name in ("ours", "again"))
    assert first == again
    assert type(PeftModel.from_pretrained(base_of(cache, "lora"), tmp_path / "ours")) is PeftModel


def test_a_task_type_of_the_users_wins(tmp_path: Path) -> None:
    model = get_peft_model(backbone(), config(task_type="FEATURE_EXTRACTION"))
    assert type(model).__name__ == "PeftModelForFeatureExtraction"
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["task_type"], written["auto_mapping"]) == ("FEATURE_EXTRACTION", None)
    with pytest.raises(ValueError, match="Invalid task type"):
        config(task_type="PLASTIC")


def test_an_open_config_is_saved_copied_and_pickled_without_our_task_type(tmp_path: Path) -> None:
    chosen = config(report=measure_plasticity(tiny_model(), IMAGES, max_samples=4), target_data=None, top_k=2)
    chosen.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    again = [PeftConfig.from_pretrained(tmp_path), copy.deepcopy(chosen), pickle.loads(pickle.dumps(chosen))]
    for one in (*again, copy.copy(chosen)):
        model = get_peft_model(tiny_model(), one)
        assert type(model) is PlasticityPeftModel
        assert one.task_type is None


def test_an_adapted_model_is_copied_and_pickled(cache: Path) -> None:
    model = adapted(cache, "lora")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is PlasticityPeftModel
        with torch.no_grad():
            torch.testing.assert_close(twin(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits)


def test_the_card_that_push_to_hub_puts_over_ours_is_completed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = {}

    def upload(self: PeftModel, working_dir: str, repo_id: str, **options: Any) -> str:
        uploaded.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})
        return repo_id

    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    model = adapted(cache, "lora")
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\nlicense: mit\n---\n\n# Owls\n\nMine.\n")
    assert model._upload_modified_files(str(tmp_path), "user/repo") == "user/repo"
    card = ModelCard(uploaded["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("peft", "mit")
    assert card.text.strip().startswith("# Owls\n\n<!-- plasticity_peft: begin default -->")
    assert "Mine." in card.text
    assert "plasticity.png" in uploaded


# Where images came from


def test_where_images_came_from_is_known_as_far_as_they_tell() -> None:
    rows = {"pixel_values": IMAGES.tolist()}
    info = DatasetInfo(dataset_name="birds", download_checksums={"hf://datasets/user/birds@0f/a.parquet": {}})
    named = Dataset.from_dict(rows, info=info, split="train")
    known = Provenance(form="Dataset", images=12, name="birds", split="train", repo_id="user/birds")
    assert provenance_of(named) == known
    assert provenance_of(torch.utils.data.DataLoader(named, batch_size=5)) == known
    assert str(known) == "user/birds, split train: 12 images"
    assert provenance_of(Dataset.from_dict(rows)) == Provenance(form="Dataset", images=12)
    assert provenance_of(torch.utils.data.Subset(named, [0, 1])) == Provenance(form="Subset", images=2)
    stream = torch.utils.data.DataLoader(named.to_iterable_dataset())
    assert provenance_of(stream).images is None
    assert provenance_of(image for image in IMAGES) == Provenance(form="generator")
    assert provenance_of(None) is None


def test_a_report_keeps_where_images_came_from_and_old_ones_load(tmp_path: Path) -> None:
    report = measure_plasticity(tiny_model(), IMAGES, random_images(5), criterion="rate_of_change", max_samples=4)
    assert (str(report.target_provenance), str(report.source_provenance)) == ("Tensor: 12 images", "Tensor: 5 images")
    assert "Target images: Tensor: 12 images. Source images: Tensor: 5 images." in report._repr_html_()
    report.save(tmp_path / "report.json")
    assert PlasticityReport.load(tmp_path / "report.json") == report
    values = json.loads((tmp_path / "report.json").read_text())
    del values["target_provenance"], values["source_provenance"]
    assert PlasticityReport.from_dict(values) == replace(report, target_provenance=None, source_provenance=None)
    for wrong in ({"images": 0}, {"name": "a\nb"}, {"name": ""}, {"repo_id": "/home/me/birds"}, {"split": "x" * 101}):
        values["target_provenance"] = {"form": "Dataset", **wrong}
        with pytest.raises(ReportError, match=r"target_provenance\.\w+ must"):
            PlasticityReport.from_dict(values)


# The cards of this repository


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in REPOSITORY.glob("model_cards/*/README.md")))
def test_the_cards_of_this_repository_are_valid_and_have_what_they_show(folder: str) -> None:
    path = REPOSITORY / "model_cards" / folder
    card = ModelCard.load(path / "README.md")
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    (result,) = card.data.eval_results
    assert f"| {result.dataset_name} | test | accuracy | {result.metric_value:.4g} |" in card.text
    assert "(plasticity.png)" in card.text
    with Image.open(path / "plasticity.png") as picture:
        assert picture.size[0] > 1000
    assert not re.search(r"/(tmp|home|root|work)\b", card.content)


def test_every_card_of_this_repository_can_be_made_anew() -> None:
    text = (REPOSITORY / "model_cards" / "regenerate.py").read_text()
    names = {path.parent.name for path in REPOSITORY.glob("model_cards/*/README.md")}
    assert len(names) == 4
    assert names == set(re.findall(r'^    "([\w-]+)": \[', text, flags=re.MULTILINE))


LABELED = ("image-segmentation", "object-detection", "video-classification")
OTHER_TASKS = {
    "segformer-semantic": "image-segmentation",
    "videomae": "video-classification",
    "yolos": "object-detection",
    "dpt-depth": "depth-estimation",
    "clip-towers": "zero-shot-image-classification",
    "llava": "image-text-to-text",
}
RELABELED = 5
"""Labels of an adapter on a base model with three."""


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_the_card_of_another_task_names_it_and_its_code_loads_its_head(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plasticity_peft.card.DRAWN", dict.fromkeys(DRAWN, lambda *_: False))  # pictures take long
    task = TASKS[name]
    task.build().save_pretrained(tmp_path / "base")
    labels = {f"label {number}": number for number in range(RELABELED)}
    options = {"id2label": {number: label for label, number in labels.items()}, "label2id": labels}
    given = {**options, "ignore_mismatched_sizes": True} if OTHER_TASKS[name] in LABELED else {}
    base = getattr(transformers, task.model).from_pretrained(tmp_path / "base", **given)
    model = moved(adapt(task, base, "full"), scale=0.05)
    model.save_pretrained(tmp_path / "adapter")
    update_card(tmp_path / "adapter", metrics={"score": 0.5}, dataset="scenes", split="test")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.pipeline_tag == OTHER_TASKS[name]
    assert [result.task_type for result in card.data.eval_results] == [OTHER_TASKS[name]]
    assert ("label 4" in card.text) == bool(given)
    for code in snippets(card.text):
        code = code.replace("user/repo", str(tmp_path / "adapter"))
        names: dict[str, Any] = {}
        exec(re.sub(r"path/to/the/\w+/that/was/adapted", str(tmp_path / "base"), code), names)
        assert difference(answers(names["model"], task.images()), answers(model, task.images())) is None
