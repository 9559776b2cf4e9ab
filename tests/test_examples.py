"""The examples run, from the commands that they name, and write what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageClassification

from plasticity_peft import PlasticityReport
from tests.conftest import REPOSITORY

TRAIN = REPOSITORY / "examples" / "train.py"
MODEL = REPOSITORY / "examples" / "fashion-mnist-vit"
SHORT = ["--num_train_epochs", "1", "--max_train_samples", "96", "--pairs", "16", "--disable_tqdm", "true"]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH_REST = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def run(*arguments: object, launch: bool = False) -> str:
    """Returns what train.py logged, from a folder that is not the repository."""
    command = [sys.executable, *(LAUNCH + LAUNCH_REST if launch else []), str(TRAIN), *map(str, arguments)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=REPOSITORY.parent,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout


def test_without_arguments_it_compares_with_the_head_alone(tmp_path: Path) -> None:
    log = run(*SHORT, "--output_dir", tmp_path)
    assert "| rank | kind | rate of change |" in log
    assert "pairs of a source and a target image" in log
    for name in ("head only", "head + FC1"):
        assert f"{name} " in log
    assert log.count("test accuracy") == 2
    report = PlasticityReport.load(tmp_path / "plasticity.json")
    assert (report.pairs, report.source) == (16, True)
    written = json.loads((tmp_path / "plasticity.json").read_text())
    assert list(written["adapter"]["id2label"].values()) == [str(digit) for digit in range(10)]
    base = AutoModelForImageClassification.from_pretrained(MODEL, num_labels=10)
    PeftModel.from_pretrained(base, tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).size == AutoImageProcessor.from_pretrained(MODEL).size


def test_resumes_with_the_report_of_the_checkpoint(tmp_path: Path) -> None:
    short = [*SHORT, "--head_only", "false", "--output_dir", tmp_path, "--save_strategy", "steps", "--save_steps", "1"]
    short += ["--load_best_model_at_end", "false", "--save_total_limit", "10"]
    run(*short, "--training", "full", "--granularity", "block", "--top_k", "3")
    log = run(
        *short, "--training", "full", "--granularity", "block", "--top_k", "3",
        "--resume_from_checkpoint", tmp_path / "checkpoint-2",
    )  # fmt: skip
    assert "Measuring plasticity" not in log
    assert "| rank | kind |" in log


def test_chooses_again_from_a_report(tmp_path: Path) -> None:
    short = [*SHORT, "--head_only", "false", "--max_steps", "1"]
    first = run(*short, "--output_dir", tmp_path / "first")
    log = run(
        *short, "--output_dir", tmp_path / "second", "--report", tmp_path / "first" / "plasticity.json",
        "--top_k", "2", "--candidates", "MHA", "FC2",
    )  # fmt: skip
    assert "Selected: FC1 (lora)" in first
    assert "Selected: FC2, MHA (lora)" in log
    assert "Measuring plasticity" not in log


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_images_of_the_user(form: str, tmp_path: Path) -> None:
    if form == "folder":
        for index in range(40):
            folder = tmp_path / "images" / ("dark" if index % 2 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 30), 40 + 150 * (1 - index % 2) + index).save(folder / f"{index}.png")
        name = tmp_path / "images"
    else:
        name = REPOSITORY / "examples" / "data" / "fashion_mnist.parquet"
    log = run(
        *SHORT, "--dataset_name", name, "--budget", "0.05", "--horizontal_flip", "true", "--output_dir", tmp_path
    )
    assert "pairs of two target images" in log
    assert "head only" not in log
    labels = json.loads((tmp_path / "plasticity.json").read_text())["adapter"]["id2label"]
    assert labels["0"] == ("dark" if form == "folder" else "T-shirt/top")


def test_launched_by_accelerate(tmp_path: Path) -> None:
    log = run(*SHORT, "--head_only", "false", "--output_dir", tmp_path, launch=True)
    assert log.count("test accuracy") == 1
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_help_names_every_option_of_ours() -> None:
    text = run("--help")
    for option in ("--training", "--top_k", "--budget", "--report", "--push_to_hub", "--dataset_name", "--inputs"):
        assert option in text


def test_the_model_of_the_demo_is_small_and_clean() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size < 4 * 2**20
    with safe_open(weights, "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float32"}  # noqa: SIM118
    assert "/" not in json.loads((MODEL / "config.json").read_text()).get("_name_or_path", "")
    assert not [name for name in json.loads((MODEL / "config.json").read_text()) if name.startswith("_")]


def test_pretraining_gives_the_same_weights_twice(tmp_path: Path) -> None:
    data = Path("/usr/share/datasets/fashion-mnist")
    if not data.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    digests = set()
    for name in ("first", "second"):
        subprocess.run(
            [
                sys.executable, str(REPOSITORY / "examples" / "pretrain.py"), "--destination", str(tmp_path / name),
                "--max_steps", "2", "--max_train_samples", "64", "--per_device_train_batch_size", "8",
                "--max_eval_samples", "64", "--disable_tqdm", "true", "--use_cpu", "true",
            ],
            check=True, capture_output=True, timeout=240,
        )  # fmt: skip
        digests.add((tmp_path / name / "fashion-mnist-vit" / "model.safetensors").read_bytes())
    assert len(digests) == 1
    committed = REPOSITORY / "examples" / "data" / "fashion_mnist.parquet"
    tables = [parquet.read_table(path) for path in (tmp_path / "first" / "data" / committed.name, committed)]
    assert tables[0].equals(tables[1])
    assert len(tables[0]) == 512
