"""What the README and the pages of docs/ show runs as it stands, and what they name exists."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from peft import get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessor,
)
from typer.main import get_command
from typer.testing import CliRunner

from plasticity_peft import PlasticityConfig, PlasticityReport
from plasticity_peft.cli.app import app
from plasticity_peft.components.layouts import LAYOUTS
from plasticity_peft.criteria.registry import CRITERIA
from tests.support.families import FIVE
from tests.support.models import random_images, tiny_model
from tests.support.pages import PAGES, README, REPOSITORY, anchors, blocks, commands, inline_code, links
from tests.support.pictures import one_picture_is_drawn, pages_have_no_library  # noqa: F401

NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
NOT_RUN = {"docs/publishing.md": ["publishes to the Hub"]}
"""The blocks of Python that no test runs, with their reasons."""
WIDTH = 88
"""Columns of a block of code that a screen of 1,280 pixels shows without scrolling."""
OURS = (["plasticity-peft"], ["accelerate", "launch", "-m", "plasticity_peft"])


def processor(size: int) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size})


def save_images(folder: Path, *classes: str, count: int = 6) -> None:
    """Writes random images into a subfolder for each class."""
    pixels = np.random.default_rng(0).integers(0, 255, (len(classes), count, 20, 24, 3), dtype=np.uint8)
    for name, images in zip(classes, pixels, strict=True):
        (folder / name).mkdir(parents=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{index}.jpg")


def save_model(folder: str) -> ViTForImageClassification:
    """Writes a small model and its image processor, and returns it as it is loaded from there."""
    tiny_model().save_pretrained(folder)
    processor(8).save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder)


def model_and_images() -> dict[str, Any]:
    """Writes what the command line is shown to measure."""
    save_model("path/to/model")
    save_images(Path("path/to/images"), "healthy", "rust", "spot")
    return {}


def save_adapter(folder: str, base: str = "base") -> None:
    """Writes an adapter of the model in the folder `base`, with its image processor."""
    labels = {"id2label": {0: "daisy", 1: "tulip", 2: "rose"}}
    model = AutoModelForImageClassification.from_pretrained(base, ignore_mismatched_sizes=True, **labels)
    get_peft_model(model, PlasticityConfig(training="lora", criterion="bound")).save_pretrained(folder)
    processor(model.config.image_size).save_pretrained(folder)


def shared() -> dict[str, Any]:
    """Returns the names that pages use without making them."""
    base = save_model("base")
    rows = [{"pixel_values": image, "labels": 0} for image in random_images(12)]
    arguments = TrainingArguments("outputs", use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    adapted = get_peft_model(save_model("base"), PlasticityConfig(training="lora", criterion="bound"))
    return {
        "model": base,
        "base_model": ViTForImageClassification.from_pretrained("base"),
        "train_dataset": rows,
        "trainer": Trainer(adapted, arguments, train_dataset=rows),
    }


def getting_started() -> dict[str, Any]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(
        "facebook/dinov2-small"
    )
    processor(28).save_pretrained("facebook/dinov2-small")
    for part in ("train", "test"):
        save_images(Path("flowers", part), "daisy", "tulip")
    save_adapter("outputs/flowers", "facebook/dinov2-small")
    return {}


def concepts() -> dict[str, Any]:
    return {"pretraining_images": random_images(12, seed=2)}


def publishing() -> dict[str, Any]:
    model_and_images()
    save_model("google/vit-base-patch16-224-in21k")
    save_images(Path("beans"), "healthy", "rust", "spot")
    for name in ("adapter", "user/repo", "path/to/adapter"):
        save_adapter(name)
    measured = CliRunner().invoke(app, ["measure", "path/to/model", "--criterion", "bound", "--output", "other.json"])
    assert measured.exit_code == 0, measured.output
    fresh = {name: ViTForImageClassification.from_pretrained("base") for name in ("fresh", "another")}
    return {f"{name}_base_model": model for name, model in fresh.items()}


def architectures() -> dict[str, Any]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8))
    return {"clip": clip, "larger_images": random_images(8, size=16)}


def distributed() -> dict[str, Any]:
    return {
        **model_and_images(),
        "model": get_peft_model(save_model("base"), PlasticityConfig(training="lora", criterion="bound")),
    }


def large_models() -> dict[str, Any]:
    # Four bits need inputs of a multiple of 64 features on some CPUs.
    config = tiny_model().config
    config.update({"hidden_size": 64, "intermediate_size": 128})
    ViTForImageClassification(config).save_pretrained("base")
    return {}


def extending() -> dict[str, Any]:
    page = blocks(REPOSITORY / "docs/extending.md")
    criteria = [block.text for block in page if "@register_criterion" in block.text]
    Path("my_criteria.py").write_text("\n\n".join(criteria))
    return model_and_images()


SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/getting-started.md": getting_started,
    "docs/concepts.md": concepts,
    "docs/publishing.md": publishing,
    "docs/architectures.md": architectures,
    "docs/tasks.md": architectures,
    "docs/distributed.md": distributed,
    "docs/large-models.md": large_models,
    "docs/extending.md": extending,
}
"""What a page needs beside `shared`: files in the current folder, and names."""


@contextmanager
def nothing_registered() -> Iterator[None]:
    """Inside there are only built-in criteria and architectures; afterwards those that were registered before."""
    registries: tuple[ChainMap[str, Any], ...] = (CRITERIA, LAYOUTS)
    before = [dict(registry.maps[0]) for registry in registries]
    for registry in registries:
        registry.maps[0].clear()
    yield
    for registry, registered in zip(registries, before, strict=True):
        registry.maps[0].clear()
        registry.maps[0].update(registered)


@pytest.fixture
def only_built_in() -> Iterator[None]:
    with nothing_registered():
        yield


def run_command(words: list[str]) -> None:
    """Runs a command of this package, in this process and without a launcher, and writes where `>` points to."""
    start = next(start for start in OURS if words[: len(start)] == start)
    arguments = words[len(start) :]
    arguments, target = (arguments[:-2], arguments[-1]) if ">" in arguments else (arguments, None)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{' '.join(words)}: {result.output}"
    if target:
        Path(target).write_text(result.stdout)


def is_ours(words: list[str]) -> bool:
    return any(words[: len(start)] == start for start in OURS)


# A Trainer without an accelerator pins memory by default, and torch warns of it.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.usefixtures("only_built_in", "pages_have_no_library")
@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "docs/large-models.md" and not FIVE:
        pytest.skip("transformers 4 loads 4-bit models in float16, which torch does not autocast to bfloat16 on a CPU")
    page = REPOSITORY / name
    wanted = [block for block in blocks(page) if block.language in ("python", "bash")]
    assert [block.reason for block in wanted if block.reason] == NOT_RUN.get(name, [])
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    names = {**shared(), **SETUPS.get(name, dict)()}
    for block in wanted:
        if block.language == "bash":
            for words in filter(is_ours, commands(block)):
                with nothing_registered():  # a command is a process of its own
                    run_command(words)
        else:
            # Blank lines, so that a traceback names the line of the page.
            code = compile("\n" * (block.line - 1) + block.text, name, "exec")
            if block.reason is None:
                exec(code, names)
    plt.close("all")
    if name == "docs/getting-started.md":
        written = {path.name for path in Path("flowers-adapter").iterdir()}
        assert {"adapter_model.safetensors", "plasticity.json", "README.md", "preprocessor_config.json"} <= written
    if name == "docs/choosing.md":
        assert names["config"].load_report() == names["report"] == PlasticityReport.load("plasticity.json")


def test_every_page_is_looked_at() -> None:
    assert len(PAGES) > 10
    python = [block for page in PAGES for block in blocks(page) if block.language == "python"]
    assert len(python) > 30
    assert {block.language for page in PAGES for block in blocks(page)} == {"python", "bash", "text"}
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(blocks(page)), f"{page.name} has a block that is not seen"


@cache
def train_options() -> argparse.ArgumentParser:
    """Returns what parses the command line of examples/train.py."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    try:
        train = importlib.import_module("train")
    finally:
        sys.path.pop(0)
    return HfArgumentParser(
        (train.ModelArguments, train.DataArguments, train.PlasticityArguments, train.FinetuningArguments)
    )


@cache
def task_options(name: str) -> argparse.ArgumentParser:
    """Returns what parses the command line of a script in examples/tasks."""
    sys.path.insert(0, str(REPOSITORY / "examples" / "tasks"))
    try:
        script, running = importlib.import_module(name), importlib.import_module("running")
    finally:
        sys.path.pop(0)
    kinds = [one for one in vars(script).values() if isinstance(one, type) and issubclass(one, running.TaskArguments)]
    own = max([*kinds, running.TaskArguments], key=lambda one: len(one.__mro__))
    return HfArgumentParser((own, running.FinetuningArguments))


@pytest.mark.parametrize("name", NAMES)
def test_commands_name_options_targets_extras_and_files_that_exist(name: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    extras = re.findall(r"^(\w+) = \[$", (REPOSITORY / "pyproject.toml").read_text(), flags=re.M)
    lines = [words for block in blocks(REPOSITORY / name) if block.language == "bash" for words in commands(block)]
    lines += [text.split() for text in inline_code(REPOSITORY / name) if re.match(r"(make|pip|pytest|python) ", text)]
    for words in lines:
        line = " ".join(words)
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert extra in extras, line
        for path in re.findall(r"(?:tests|examples|model_cards)/\S+\.py|\S+\.txt", line):
            assert (REPOSITORY / path).is_file(), line
        for module in re.findall(r"-m (tests\.\S+)", line):
            assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), line
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, line
        elif "examples/train.py" in words:
            train_options().parse_args(words[words.index("examples/train.py") + 1 :])
        elif words[1:] and words[1].startswith("examples/tasks/"):
            task_options(Path(words[1]).stem).parse_args(words[2:])
        else:
            known = is_ours(words) or words[0] in ("pip", "pytest") or re.match(r"python (\S+\.py|-m tests\.)", line)
            assert known, f"{line}: no test knows this command"


def test_options_in_prose_exist() -> None:
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    parameters = [parameter for command in commands for parameter in command.params]
    known = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
    scripts = [path.stem for path in (REPOSITORY / "examples" / "tasks").glob("*.py") if "main()" in path.read_text()]
    parsers = [train_options(), *map(task_options, scripts)]
    known |= {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {
        "--install-completion",
        "--config_file",
        "--stages",
        "--cpu",
        "--multi_gpu",
        "--num_processes",
        "--rounds",
        "--pairs",
        "--inputs",
    }
    for page in PAGES:
        for text in inline_code(page):
            options = set(re.findall(r"(?<!\S)--[\w-]+", text))
            assert options <= known, f"{page.name}: {text}"


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "tests/README.md"], ids=lambda page: page.name)
def test_files_modules_and_links_exist(page: Path) -> None:
    for text in inline_code(page):
        if re.fullmatch(r"(tests|examples|plasticity_peft|model_cards|docs)/[\w./-]+|[\w-]+\.(txt|toml)", text):
            assert (REPOSITORY / text).exists(), text
        if re.fullmatch(r"plasticity_peft(\.\w+)+", text):
            assert resolve(text) is not None
    for target in links(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_file(), target
        assert not anchor or anchor in anchors(place), target


def resolve(name: str) -> Any:
    """Returns the module, or the attribute of a module, that a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), attribute)


def test_every_known_architecture_is_in_the_table() -> None:
    text = (REPOSITORY / "docs/architectures.md").read_text()
    rows = [line.split("|")[2] for line in text.splitlines() if re.match(r"\| [a-z]", line)]
    listed = [name.split()[0] for row in rows for name in row.split(",")]
    assert sorted(listed) == sorted(LAYOUTS)
    assert f"the {len(LAYOUTS)} supported model types" in README.read_text()


def test_every_criterion_is_described() -> None:
    page = REPOSITORY / "docs/criteria.md"
    rows = {path: re.findall(r"^\| \[?`(\w+)`", path.read_text(), flags=re.M) for path in (README, page)}
    assert sorted(rows[README]) == sorted([*CRITERIA, "criterion"])
    assert set(rows[page]) == {*CRITERIA, "criterion"}
    assert set(CRITERIA) <= anchors(page)


def test_every_folder_of_tests_is_described() -> None:
    folders = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tests").glob("[a-z]*/")}
    described = inline_code(REPOSITORY / "tests/README.md")
    assert sorted(path for path in described if path.startswith("tests/")) == sorted(folders)


def test_no_page_names_a_folder_of_somebodys_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/(work|home|root|Users)/", page.read_text()), page.name


def test_code_fits_into_the_column_of_a_page() -> None:
    for page in PAGES:
        wide = [line for block in blocks(page) for line in block.text.splitlines() if len(line) > WIDTH]
        assert page == README or not wide, f"{page.name}: {wide}"


def test_blocks_links_and_anchors_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A b: `c`\n<!-- not run: why -->\n```python\na\n```\n[d](e.md#f)\n```bash\ng \\\n    h  # i\n```\n"
    )
    first, second = blocks(page)
    assert (first.text, first.line, first.reason) == ("a\n", 4, "why")
    assert (second.reason, commands(second)) == (None, [["g", "h"]])
    assert (inline_code(page), links(page), anchors(page)) == (["c"], ["e.md#f"], {"a-b-c"})
