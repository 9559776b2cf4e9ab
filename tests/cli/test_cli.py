"""The command line: what it prints, writes and answers, in this process where that can be, else in real ones."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging as transformers_logging
from typer.main import get_command
from typer.testing import CliRunner

import plasticity_peft
from plasticity_peft import (
    PlasticityConfig,
    PlasticityReport,
    find_components,
    forecast_finetuning,
    measure_plasticity,
)
from plasticity_peft.cli import card, compare, forecast, measure, select, show
from plasticity_peft.cli.app import app
from plasticity_peft.components.component import KINDS
from plasticity_peft.report.forecast import Forecast
from tests.support.forking import STOCK, run_code
from tests.support.models import REPOSITORY, random_images, tiny_model
from tests.support.processes import launch, python

COMMANDS = {"measure": measure, "forecast": forecast, "show": show, "select": select, "compare": compare, "card": card}
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, images in several forms, and two reports."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(folder / "model")
    processor = json.loads((REPOSITORY / "examples/fashion-mnist-vit/preprocessor_config.json").read_text())
    processor["size"] = {"height": 8, "width": 8}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    pixels = np.random.default_rng(0).integers(0, 255, (14, 10, 12, 3), dtype=np.uint8)
    for index, values in enumerate(pixels):
        place = folder / "images" / ("dark" if index % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(place / f"{index}.png")
    load_dataset("imagefolder", data_dir=str(folder / "images"))["train"].to_parquet(folder / "images.parquet")
    for name, seed in (("first", 0), ("second", 1)):
        report = measure_plasticity(
            tiny_model(), random_images(seed=seed), max_samples=8, criterion="parameter_plasticity"
        )
        report.save(folder / f"{name}.json")
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(*arguments: object, code: int = 0, **options: Any) -> Any:
    """Returns what a command left: stdout, stderr, exit_code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def by_hand(data: str, **options: Any) -> PlasticityReport:
    """Returns what the library measures of the model on the images, without the command line."""
    model = AutoModelForImageClassification.from_pretrained("model", num_labels=2, ignore_mismatched_sizes=True)
    processor = AutoImageProcessor.from_pretrained("model")
    form = {"data_files": data} if data.endswith("parquet") else {"data_dir": data}
    images = load_dataset("parquet" if data.endswith("parquet") else "imagefolder", **form)["train"]["image"]
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    source = pixels if options.pop("source", False) else None
    return measure_plasticity(model, pixels, source, **options)


CASES: dict[str, tuple[list[object], dict[str, Any]]] = {
    "the default": ([], {}),
    "the paper's": (
        [
            "--criterion",
            "rate_of_change",
            "--inputs",
            "activation",
            "--max_samples",
            9,
            "--batch_size",
            4,
            "--settle",
            0,
        ],
        {"criterion": "rate_of_change", "inputs": "activation", "max_samples": 9, "batch_size": 4, "settle": None},
    ),
    "source": (["--source", "images", "--inputs", "embedding", "--seed", 3], {"inputs": "embedding", "seed": 3}),
    "a choice by components": (
        ["--granularity", "component", "--candidates", "MHA,FC1", "--top_k", 2, "--training", "full", "--settle", 0.5],
        {"granularity": "component", "candidates": ("MHA", "FC1"), "top_k": 2, "training": "full", "settle": 0.5},
    ),
    "half precision and a budget": (
        ["--dtype", "bfloat16", "--budget", 0.2, "--r", 2, "--backbone", "vit"],
        {"dtype": "bfloat16", "budget": 0.2, "r": 2, "backbone": "vit"},
    ),
}


@pytest.mark.parametrize(("case", "data"), [*((case, "images") for case in CASES), ("the default", "images.parquet")])
def test_measures_as_the_library_does(case: str, data: str) -> None:
    arguments, options = CASES[case]
    result = run("measure", "model", data, *arguments, "--json")
    found = PlasticityReport.from_dict(json.loads(result.stdout))
    expected = by_hand(data, source=case == "source", **options)
    assert (found.ending, found.samples, found.seed, found.uses_source) == (
        expected.ending,
        expected.samples,
        expected.seed,
        expected.uses_source,
    )
    for row, own in zip([*found.scores, *found.kinds], [*expected.scores, *expected.kinds], strict=True):
        assert row.mean == pytest.approx(own.mean, rel=1e-5)


def test_every_argument_of_measuring_is_an_option() -> None:
    import inspect

    others = {
        "target_data",
        "source_data",
        "rank_pattern",
        "use_dora",
        "lora_bias",
        "forecast",
    }  # three have other names
    arguments = set(inspect.signature(measure_plasticity).parameters) - others
    assert arguments <= set(inspect.signature(measure.measure).parameters)


@pytest.mark.parametrize("form", ["png", "pdf", "svg"])
def test_writes_report_and_picture_and_prints_only_the_table(form: str, tmp_path: Path) -> None:
    result = run("measure", "model", "images", "--output", tmp_path / "a.json", "--plot", tmp_path / f"a.{form}")
    report = PlasticityReport.load(tmp_path / "a.json")
    assert result.stdout == f"{report}\n"
    assert "Measuring plasticity" in result.stderr
    start = {"png": PNG, "pdf": b"%PDF", "svg": b"<?xml"}[form]
    assert (tmp_path / f"a.{form}").read_bytes().startswith(start)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", f"a.{form}"}


def test_labels_of_the_dataset_reach_criteria_that_need_them() -> None:
    first, second = (run("measure", "model", "images", "--criterion", "gradient_norm", "--json") for _ in range(2))
    assert first.stdout == second.stdout
    assert json.loads(first.stdout)["criterion"] == "gradient_norm"


def test_weights_are_measured_without_images() -> None:
    found = json.loads(run("measure", "model", "--criterion", "bound", "--json").stdout)
    assert (found["observed"], found["samples"]) == ("weights", 0)


def test_shows_a_report_or_an_adapter(tmp_path: Path) -> None:
    report = PlasticityReport.load("first.json")
    assert run("show", "first.json").stdout == f"{report}\n"
    model = get_peft_model(tiny_model(), PlasticityConfig(training="lora", report="first.json"))
    model.save_pretrained(tmp_path / "adapter")
    (unit,) = model.peft_config["default"].selection.units
    told = rf"Selected: {unit} \(lora, [\d,]+ parameters without the head\)\nCost: .*\n"
    told += r"Confidence of the selection: .*\n"
    for place in (tmp_path / "adapter", tmp_path / "adapter" / "plasticity.json"):
        shown = run("show", place).stdout
        assert shown.startswith(f"{report}\n")
        assert re.fullmatch(told, shown.removeprefix(f"{report}\n"))
    shown = run("show", tmp_path / "adapter", "--json", "--plot", tmp_path / "a.png")
    assert PlasticityReport.from_dict(json.loads(shown.stdout)) == report
    run("show", tmp_path / "adapter", "--plot", tmp_path / "b.png", "--view", "heatmap")
    first, second = ((tmp_path / f"{name}.png").read_bytes() for name in "ab")
    assert first.startswith(PNG)
    assert second.startswith(PNG)
    assert first != second


def test_shows_what_lies_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_peft_model(tiny_model(), PlasticityConfig(training="lora", report="first.json")).save_pretrained(tmp_path)
    asked = []

    def download(repo: str, name: str, **options: object) -> str:
        asked.append((repo, name, options))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert run("show", "user/repo", "--revision", "v1").stdout == run("show", tmp_path).stdout
    assert asked == [("user/repo", "plasticity.json", {"revision": "v1"})]


def test_an_adapter_that_does_not_say_how_it_trains(tmp_path: Path) -> None:
    get_peft_model(tiny_model(), PlasticityConfig(training="lora", report="first.json")).save_pretrained(tmp_path)
    path = tmp_path / "plasticity.json"
    values = json.loads(path.read_text())
    values["adapter"]["training"] = ["lora"]
    path.write_text(json.dumps(values))
    assert "adapter.training must be a valid string, got ['lora']" in run("show", tmp_path, code=1).stderr


def test_writes_the_card_of_an_adapter_anew(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), PlasticityConfig(training="lora", report="first.json"))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "README.md"
    path.write_text("---\nlibrary_name: peft\n---\n\n# Mine\n\nA person wrote this.\n")
    metric = ["--metric", "accuracy=0.94", "--dataset", "digits", "--split", "test"]
    assert run("card", tmp_path / "adapter", *metric).stdout == f"{path}\n"
    text = path.read_text()
    assert "A person wrote this." in text
    assert "| digits | test | accuracy | 0.94 |" in text
    run("card", tmp_path / "adapter")
    assert path.read_text() == text
    message = run("card", tmp_path / "adapter", "--metric", "accuracy", code=2).stderr
    assert "--metric must be name=value" in message


TRAINED_BY_STOCK = """
import json, pathlib, sys
sys.modules["plasticity_peft"] = None
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification
found = {}
for name, text in json.loads(pathlib.Path("texts.json").read_text()).items():
    config = LoraConfig(**(json.loads if name.startswith("json") else yaml.safe_load)(text))
    model = get_peft_model(AutoModelForImageClassification.from_pretrained("model"), config)
    found[name] = {
        "trained": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        "target_modules": sorted(config.target_modules) if not isinstance(config.target_modules, str) else None,
        "modules_to_save": config.modules_to_save,
        "lora_alpha": config.lora_alpha,
        "parameters": model.get_nb_trainable_parameters()[0],
    }
json.dump(found, sys.stdout)
"""


def test_stock_peft_trains_what_was_selected() -> None:
    texts, expected = {}, {}
    for training, granularity, top_k, naming in product(
        ("lora", "full"), ("kind", "component"), (1, 4), (["--model", "model"], ["--head", "classifier"])
    ):
        form = "json" if top_k == 1 else "yaml"
        name = " ".join([form, training, granularity, *naming])
        chosen = {"training": training, "granularity": granularity, "top_k": top_k, "r": 3, "lora_alpha": 5}
        options = [part for key, value in chosen.items() for part in (f"--{key}", value)]
        result = run("select", "first.json", *options, *naming, "--format", form)
        assert not result.stderr
        texts[name] = result.stdout
        config = PlasticityConfig(report="first.json", **{"training": "lora", **chosen})
        model = get_peft_model(tiny_model(), config)
        linears = config.target_modules
        expected[name] = {
            "trained": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
            "target_modules": None if isinstance(linears, str) else sorted(linears),
            "modules_to_save": config.modules_to_save,
            "lora_alpha": 5,
            "parameters": model.get_nb_trainable_parameters()[0],
        }
    Path("texts.json").write_text(json.dumps(texts))
    result = run_code(TRAINED_BY_STOCK, folder=Path.cwd(), parent=STOCK)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected
    assert any(row["target_modules"] is None for row in expected.values())


def test_select_names_modules_as_the_model_at_hand_does(tmp_path: Path) -> None:
    values = json.loads(Path("first.json").read_text())
    for row in values["scores"]:
        row["modules"] = [f"old.names.{path}" for path in row["modules"]]
    (tmp_path / "old.json").write_text(json.dumps(values))
    candidates = ["--candidates", "MHA", "--training", "lora"]
    here = [path for part in find_components(tiny_model()) if part.kind == "MHA" for path in part.modules]
    config = yaml.safe_load(run("select", tmp_path / "old.json", *candidates, "--model", "model").stdout)
    assert (config["target_modules"], config["modules_to_save"]) == (here, ["classifier"])
    result = run("select", tmp_path / "old.json", *candidates)
    config = yaml.safe_load(result.stdout)
    assert (config["target_modules"], config["modules_to_save"]) == ([f"old.names.{path}" for path in here], None)
    assert "no head will train" in result.stderr
    both = run("select", "first.json", "--model", "model", "--head", "vit.layernorm, classifier", "--format", "json")
    assert json.loads(both.stdout)["modules_to_save"][-2:] == ["classifier", "vit.layernorm"]


def with_scores(path: Path, scores: Any) -> Path:
    """Writes the first report with other scores, block by block and in the order of the kinds."""
    values = json.loads(Path("first.json").read_text())
    for row, score in zip(values["scores"], scores, strict=True):
        row["mean"] = float(score)
    for index, row in enumerate(values["kinds"]):
        row["mean"] = float(np.mean(scores[index :: len(KINDS)]))
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("second", "rho", "tau", "shared"),
    [
        ([1, 2, 3, 4, 5], 1, 1, {1: 1, 2: 2, 5: 5}),
        ([5, 4, 3, 2, 1], -1, -1, {1: 0, 2: 0, 3: 1, 5: 5}),
        ([2, 1, 3, 4, 5], 0.9, 0.8, {1: 1, 2: 2, 4: 3, 5: 5}),
        ([7, 7, 7, 7, 7], None, None, {1: 0, 5: 5}),
    ],
)
def test_compare_tells_how_rankings_agree(
    second: list[int], rho: float | None, tau: float | None, shared: dict[int, int], tmp_path: Path
) -> None:
    first = with_scores(tmp_path / "a.json", [1, 2, 3, 4, 5] * 2)
    other = with_scores(tmp_path / "b.json", second * 2)
    for top_k, count in shared.items():
        result = run("compare", first, other, "--top_k", top_k, "--granularity", "kind", "--json")
        (row,) = json.loads(result.stdout)["agreement"]
        assert (row["units"], row["top_k"], row["shared"], row["overlap"]) == (5, top_k, count, count / top_k)
        assert (row["spearman"], row["kendall"]) == (
            rho if rho is None else pytest.approx(rho),
            tau if tau is None else pytest.approx(tau),
        )


def test_compare_by_kind_and_by_component() -> None:
    ranks = []
    for name in ("first.json", "second.json"):
        scores = np.array([row.mean for row in PlasticityReport.load(name).scores])
        ranks.append(scores.argsort().argsort())
    result = run("compare", "first.json", "second.json", "--json")
    kind, component = json.loads(result.stdout)["agreement"]
    assert (kind["granularity"], kind["units"], kind["top_k"]) == ("kind", 5, 1)
    assert (component["granularity"], component["units"], component["top_k"]) == ("component", 10, 2)
    assert component["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    signs = [np.sign(np.subtract.outer(own, own))[np.triu_indices(10, 1)] for own in ranks]
    assert component["kendall"] == pytest.approx(np.mean(signs[0] * signs[1]))
    table = run("compare", "first.json", "second.json").stdout
    assert re.search(rf"\| component \| +10 \| +{component['spearman']:.4f} \| +{component['kendall']:.4f} \|", table)


def test_compare_draws_both_reports(tmp_path: Path) -> None:
    for granularity in ([], ["--granularity", "kind"]):
        run("compare", "first.json", "second.json", *granularity, "--plot", tmp_path / f"{len(granularity)}.png")
    widths = []
    for name in (0, 2):
        with Image.open(tmp_path / f"{name}.png") as picture:
            widths.append(picture.size[0])
    assert widths[0] > widths[1]


def errors() -> Iterator[tuple[str, int, str]]:
    """Yields arguments, exit code and what the error says."""
    yield "show missing.json", 1, r"Cannot read the report missing.json: No such file"
    yield "show model/config.json", 1, 'it is not a plasticity report: "format" must be'
    yield "show images", 1, "No plasticity.json in images. This adapter was not trained with plasticity_peft"
    yield "show first.json --plot a.txt", 1, r"--plot must end with one of .*\.png.* Got a.txt"
    yield "show first.json --plot missing/a.png", 1, "--plot must be a file in a folder that exists"
    yield "measure nobody/nothing images", 1, "Cannot load the model nobody/nothing"
    yield "measure images images", 1, "Cannot load the model images"
    yield "measure model nobody/nothing", 1, "Cannot read the dataset nobody/nothing"
    yield "measure model model/config.parquet", 1, "Cannot read the dataset model/config.parquet"
    yield "measure model images --split test", 1, "The dataset images has no split 'test'. It has: 'train'"
    yield "measure model images --image_column x", 1, "no column 'x'. It has: 'image', 'label'"
    yield "measure model", 1, "criterion='parameter_plasticity' needs images to measure on"
    yield "measure model images --output missing/a.json", 1, "--output must be a file in a folder that exists"
    yield "measure model images --max_samples 1", 1, "max_samples must be a whole number .* Got 1"
    yield "measure model images --top_k 9", 1, "top_k must be a whole number from 1 to 5"
    yield "measure model images --candidates MHA,XY", 1, "candidates must be one or more of LN1"
    yield "measure model images --backbone nowhere", 1, "nowhere"
    yield "select first.json --top_k 1 --budget 0.1", 1, "Give top_k or budget, not both"
    yield "select first.json --model nobody/nothing", 1, "Cannot build the model nobody/nothing"
    yield "compare first.json other.json", 1, "models with different components.*10 components.*15 components"
    yield "compare first.json second.json --top_k 6", 1, "from 1 to 5, the number of units by kind"
    yield "card images", 1, "plasticity.json"
    yield "measure model images --inputs sideways", 2, "'sideways' is not one of embedding, activation"
    yield "measure model images --plugin missing.py", 1, "--plugin must be the path of a .py file.*missing.py"
    yield "measure model images --plugin no.such.module", 1, "--plugin must be the name of a module.*no.such.module"
    yield (
        "measure model images --view sideways",
        2,
        "'sideways' is not one of overview, depth, ranking, heatmap, forecast",
    )
    yield "select first.json --lora_alpha 0", 2, "Invalid value for '--lora_alpha'"
    yield "measure model images --criterion magic", 2, "'magic' is not one of parameter_plasticity"
    yield "measure model images --max_samples many", 2, "Invalid value for '--max_samples'"
    yield "select first.json --r 0", 2, "Invalid value for '--r'"
    yield "measure", 2, "Missing"
    yield "show first.json second.json", 2, "second.json"
    yield "show first.json --what", 2, "No such option"
    yield "nothing", 2, "No such command"


@pytest.mark.parametrize(("arguments", "code", "message"), list(errors()))
def test_errors(arguments: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "other.json" in arguments and not Path("other.json").exists():
        measure_plasticity(tiny_model(num_hidden_layers=3), criterion="bound").save("other.json")
    before = sorted(Path().rglob("*"))
    result = run(*shlex.split(arguments), code=code)
    assert result.stdout == ""
    assert re.search(message, result.stderr, re.DOTALL), result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert result.stderr.endswith(f"{line}\n")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        ("measure model images", "datasets", "datasets"),
        ("measure model images", "PIL", "datasets"),
        ("show first.json --plot a.png", "matplotlib.figure", "plot"),
        ("measure model images --plot a.png", "matplotlib.figure", "plot"),
        ("compare first.json second.json --plot a.png", "matplotlib.figure", "plot"),
        ("show first.json --html a.html", "vl_convert", "html"),
    ],
)
def test_an_extra_that_is_missing(arguments: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run(*shlex.split(arguments), code=1)
    assert f"needs {module}, which cannot be imported" in result.stderr
    assert f'pip install "plasticity_peft[{extra}]"' in result.stderr
    assert "Error: " in result.stderr.splitlines()[-1]


def test_what_nobody_expected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("plasticity_peft.measuring.measure.measure_plasticity", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        run("measure", "model", "images")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_its_examples_are_right(command: str) -> None:
    text = run(command, "--help").stdout
    parser = get_command(app).commands[command]  # type: ignore[attr-defined]
    shown = [parameter for parameter in parser.params if not getattr(parameter, "hidden", False)]
    for parameter in shown:
        for option in parameter.opts:
            assert option in (text if option.startswith("-") else text.lower())
    examples = re.findall(r"^ *(?:plasticity-peft|accelerate launch -m plasticity_peft) (.*)$", text, re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        name, *arguments = shlex.split(example.split(">")[0])
        assert name == command
        parser.make_context(name, arguments)
    assert command in run("--help").stdout


@pytest.mark.parametrize("command", ["measure", "show"])
def test_help_lists_the_views(command: str) -> None:
    assert "--view overview|depth|ranking|heatmap|forecast" in run(command, "--help").stdout


def test_a_picture_of_measuring_has_the_view_that_is_asked_for(tmp_path: Path) -> None:
    pictures = []
    for view in ("heatmap", "ranking"):
        run("measure", "model", "--criterion", "bound", "--plot", tmp_path / f"{view}.png", "--view", view)
        pictures.append((tmp_path / f"{view}.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_a_picture_of_measuring_marks_what_is_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("plasticity_peft.cli.reports.save_picture", lambda *arguments: drawn.append(arguments))
    options = ["--granularity", "component", "--top_k", "3", "--candidates", "MHA,FC1", "--training", "full"]
    run("measure", "model", "--criterion", "bound", "--plot", tmp_path / "a.png", *options)
    ((report, path, view, selection),) = drawn
    assert (path, view) == (tmp_path / "a.png", "overview")
    assert selection == report.select(3, granularity="component", candidates=("MHA", "FC1"), training="full")


@pytest.mark.parametrize(
    ("former", "new"),
    [
        ("measure model images --pairs 8 --json", "measure model images --max_samples 8 --json"),
        ("select first.json --granularity block --head a", "select first.json --granularity component --head a"),
        (
            "compare first.json second.json --granularity block",
            "compare first.json second.json --granularity component",
        ),
    ],
)
def test_former_names_are_accepted_with_a_warning(former: str, new: str) -> None:
    with pytest.warns(
        FutureWarning, match=r"^--\w+( block)? is deprecated .* Use --\w+( component)? instead"
    ) as caught:
        found = run(*shlex.split(former)).stdout
    assert len(caught) == 1
    assert found == run(*shlex.split(new)).stdout


@pytest.mark.parametrize("option", ["--r", "--lora_alpha"])
def test_an_option_of_lora_asks_for_lora_though_its_value_is_the_usual_one(option: str) -> None:
    asked, lora, full = (
        run("select", "first.json", *options, "--head", "classifier").stdout
        for options in ((option, 8), ("--training", "lora"), ())
    )
    assert asked == lora != full


def test_both_spellings_of_an_option() -> None:
    outputs = {
        run("select", "first.json", option, 2, "--head", "classifier").stdout for option in ("--top_k", "--top-k")
    }
    assert len(outputs) == 1


def test_version_and_nothing() -> None:
    assert run("--version").stdout == f"{plasticity_peft.__version__}\n"
    result = CliRunner().invoke(app, [])
    assert "Usage:" in result.output


def test_the_shell_completes_commands_and_values() -> None:
    def completed(words: str) -> set[str]:
        environment = {
            "_PLASTICITY_PEFT_COMPLETE": "complete_bash",
            "COMP_WORDS": f"plasticity-peft {words}",
            "COMP_CWORD": str(len(words.split(" "))),
        }
        result = CliRunner().invoke(app, [], prog_name="plasticity-peft", env=environment)
        return set(result.stdout.split())

    assert completed("s") == {"show", "select"}
    assert completed("select first.json --training f") == {"full"}
    assert "parameter_plasticity" in completed("measure model images --criterion param")


WHO = """
import os, pathlib
if "RANK" in os.environ:
    pathlib.Path(os.environ["WHO"], f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}").touch()
"""


def test_only_the_main_process_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
    result = run(
        "measure", "model", "--criterion", "bound", "--output", tmp_path / "a.json", "--plot", tmp_path / "a.png"
    )
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_print_and_write_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WHO)
    (tmp_path / "who").mkdir()
    arguments = ["measure", "model", "images", "--settle", "0", "--batch_size", "3", "--output", tmp_path / "a.json"]
    paths = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    (result,) = launch("-m", "plasticity_peft", *arguments, "--json", PYTHONPATH=paths, WHO=str(tmp_path / "who"))
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "who").iterdir()} == {"0 of 2", "1 of 2"}
    found = PlasticityReport.from_dict(json.loads(result.stdout))
    assert found == PlasticityReport.load(tmp_path / "a.json")
    for row, own in zip(found.scores, by_hand("images", settle=None).scores, strict=True):
        assert row.mean == pytest.approx(own.mean, rel=1e-5)


@pytest.fixture
def unread() -> Iterator[int]:
    """The end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    with suppress(OSError):
        os.close(writing)


def test_a_reader_that_has_enough(
    unread: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with suppress(BrokenPipeError), open(unread, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit, match="1"):
            app(["show", "first.json", "--json"])
    monkeypatch.undo()
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_reader_of_a_process_that_has_enough(unread: int) -> None:
    options = {"capture_output": False, "stdout": unread, "stderr": subprocess.PIPE}
    result = python("-m", "plasticity_peft", "show", "first.json", "--json", **options)
    assert (result.returncode, result.stderr) == (1, "")


def test_importing_the_library_does_not_import_the_command_line() -> None:
    package = REPOSITORY / "plasticity_peft"
    for path in package.rglob("*.py"):
        if path.parent.name != "cli" and path.stem != "__main__":
            assert not re.search(r"import typer|from typer|plasticity_peft\.cli", path.read_text()), path


def test_the_head_is_fitted_before_a_criterion_with_gradients() -> None:
    options = ["measure", "model", "images", "--criterion", "gradient_norm", "--json"]
    fitted, fresh = run(*options, "--fit_head"), run(*options)
    assert json.loads(fitted.stdout)["scores"] != json.loads(fresh.stdout)["scores"]
    assert re.search(r"^head fitted on \d+ images: leave-one-out accuracy [\d.]+ %$", fitted.stderr, re.MULTILINE)
    assert "--fit_head needs labeled images" in run("measure", "model", "--fit_head", code=1).output


def test_what_is_random_is_said_unless_it_is_a_new_head(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own report, of a head that nobody expects in a checkpoint, is for those who ask for it."""
    saved = tmp_path / "model"
    shutil.copytree(folder / "model", saved)
    weights = load_file(saved / "model.safetensors")
    head = [name for name in weights if name.startswith("classifier")]
    (bias,) = [name for name in weights if name.endswith("projection.bias")]
    for gone, said, options in (
        (head, [], []),
        (head, ["classifier.weight"], ["--verbose"]),
        ([*head, bias], [f"has no weights for {bias}, which are random."], []),
    ):
        save_file({name: weight for name, weight in weights.items() if name not in gone},
                  saved / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        records: list[logging.LogRecord] = []
        monkeypatch.setattr(transformers_logging._default_handler, "emit", records.append)
        verbosity = transformers_logging.get_verbosity()
        try:
            run("measure", saved, "images", "--criterion", "random", *options)
        finally:
            transformers_logging.set_verbosity(verbosity)
        logged = "".join(record.getMessage() for record in records)
        assert all(text in logged for text in said), logged
        assert bool(said) == ("classifier.weight" in logged or bias in logged)


def test_forecasts_as_the_library_does(tmp_path: Path) -> None:
    written, sets = tmp_path / "a.json", ["--set", "MHA", "--set", "0.FC1, 1.FC1"]
    result = run("forecast", "model", "images", *sets, "--json", "--output", written)
    found = Forecast.from_dict(json.loads(result.stdout))
    assert found == Forecast.from_dict(json.loads(written.read_text()))
    model = AutoModelForImageClassification.from_pretrained("model", num_labels=2, ignore_mismatched_sizes=True)
    processor = AutoImageProcessor.from_pretrained("model")
    rows = load_dataset("imagefolder", data_dir="images")["train"]
    pixels = processor(images=[image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
    items = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, rows["label"], strict=True)]
    expected = forecast_finetuning(model, items, sets=["MHA", ("0.FC1", "1.FC1")])
    assert [(one.name, one.components) for one in found.sets] == [(one.name, one.components) for one in expected.sets]
    for one, other in zip(found.sets, expected.sets, strict=True):
        assert (one.gain, one.error, one.cost) == (pytest.approx(other.gain), pytest.approx(other.error), other.cost)
    assert "Forecast of vit, 14 images" in run("forecast", "model", "images", "--set", "MHA").stdout
    assert "kinds" in run("forecast", "model", "images", "--set", "MHB", code=1).output
