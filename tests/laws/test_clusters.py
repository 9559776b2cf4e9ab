"""examples/train.py in processes among which FSDP2 or DeepSpeed ZeRO-3 spreads the weights, on CPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from plasticity_peft.checkpoints import why_not_whole
from tests.support.models import REPOSITORY
from tests.support.processes import environment, free_port

pytestmark = pytest.mark.slow
TRAIN = REPOSITORY / "examples" / "train.py"
RUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node")
AS_GPUS = REPOSITORY / "tests" / "support" / "run_as_gpus.py"
SMALL = (
    "--num_train_epochs", "3", "--max_train_samples", "256", "--max_samples", "64", "--eval_on_start", "false",
    "--test_fraction", "0.1", "--disable_tqdm", "true", "--random_crop", "1",
)  # fmt: skip
LAYERS = {"version": 2, "transformer_layer_cls_to_wrap": ["ViTLayer"]}
ZERO_3 = {
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}
SPREAD = {
    "FSDP2": ("--fsdp", "full_shard", "--fsdp_config", json.dumps(LAYERS)),
    "FSDP2, sharded checkpoints": (
        "--fsdp", "full_shard", "--fsdp_config", json.dumps({**LAYERS, "state_dict_type": "SHARDED_STATE_DICT"}),
    ),
    "ZeRO-3": ("--deepspeed", "zero3.json"),
}  # fmt: skip
STOCK = """
import sys
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
base, adapter = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(base, num_labels=10, ignore_mismatched_sizes=True)
loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, adapter))
saved = load_file(adapter + "/adapter_model.safetensors")
assert "plasticity_peft" not in sys.modules
assert loaded.keys() == saved.keys() and len(saved) > 2
assert all(torch.equal(loaded[name], value) for name, value in saved.items())
"""


def needed(spread: str) -> None:
    """Skips the test if a library that it is about is missing."""
    if spread == "ZeRO-3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


def command(processes: int, out: Path, *arguments: str) -> list[str]:
    launcher = (*RUN, str(processes), "--master_port", str(free_port()))
    return [*launcher, str(AS_GPUS), str(TRAIN), "--output_dir", str(out), *SMALL, *arguments]


def trained(processes: int, out: Path, *arguments: str) -> CompletedProcess[str]:
    """Returns how the example ended in so many processes."""
    (out.parent / "zero3.json").write_text(json.dumps(ZERO_3))
    return subprocess.run(
        command(processes, out, *arguments),
        env=environment(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1"),
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )


def results(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "test_results.json").read_text())
    return {name: found[name] for name in ("test_accuracy", "test_loss")}


def best_checkpoint(out: Path) -> Path:
    """Returns the checkpoint that the Trainer ended with."""
    states = [json.loads(path.read_text()) for path in out.glob("checkpoint-*/trainer_state.json")]
    return Path(max(states, key=lambda state: state["global_step"])["best_model_checkpoint"])


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("spread", SPREAD)
def test_ends_with_the_whole_adapter_and_resumes(spread: str, training: str, tmp_path: Path) -> None:
    needed(spread)
    out, arguments = tmp_path / "out", (*SPREAD[spread], "--training", training, "--learning_rate", "1e-3")
    result = trained(2, out, *arguments)
    assert result.returncode == 0, result.stderr[-4000:]
    for name in ("adapter_config.json", "adapter_model.safetensors", "plasticity.json", "README.md", "plasticity.png"):
        assert (out / name).is_file(), name
    whole = results(out)
    assert whole["test_accuracy"] > 0.5
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, str(REPOSITORY / "examples" / "fashion-mnist-vit"), str(out)],
        env={**os.environ, "PYTHONPATH": ""}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert stock.returncode == 0, stock.stderr[-3000:]
    best = best_checkpoint(out)
    assert (out / "adapter_model.safetensors").read_bytes() == (best / "adapter_model.safetensors").read_bytes()

    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in out.glob("checkpoint-*"):
        assert why_not_whole(checkpoint, processes=2, also=("plasticity.json",)) == ""
    of_state = [path for path in last.rglob("*") if path.suffix in (".bin", ".distcp", ".pt")]
    assert len(of_state) >= 3  # weights, optimizer and scheduler
    for path in of_state:
        if path.name == "scheduler.pt" and spread == "ZeRO-3":
            continue
        kept = path.read_bytes()
        path.unlink()
        if path.name != "training_args.bin":
            assert why_not_whole(last, processes=2), path
        path.write_bytes(kept[: len(kept) // 2])
        assert why_not_whole(last, processes=2), path
        path.write_bytes(kept)
    (last / "trainer_state.json").unlink()
    (out / "test_results.json").unlink()
    result = trained(2, out, *arguments, "--resume_from_checkpoint", "True")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Training resumes from" in result.stderr
    assert (out / f"not-whole-{last.name}").is_dir()
    assert results(out) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp2", "zero3"])
def test_launch_files_start_two_processes_that_train(name: str, tmp_path: Path) -> None:
    """As far as CPUs go: only the precision is another one. To spread weights, CPUs are taken for GPUs."""
    on_cpus = name in ("cpu", "ddp")
    needed("ZeRO-3" if name == "zero3" else "")
    file = REPOSITORY / "examples" / "launch" / f"{name}.yaml"
    started = [str(TRAIN)] if on_cpus else [str(AS_GPUS), str(TRAIN)]
    variables = {"ACCELERATE_USE_CPU": "1"} if on_cpus else {"DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--mixed_precision", "no",
         "--main_process_port", str(free_port()), *started,
         "--output_dir", str(tmp_path / "out"), *SMALL, "--num_train_epochs", "1", "--compare", "false",
         "--learning_rate", "1e-3"],
        env=environment(HF_HUB_OFFLINE="1", **variables),
        cwd=tmp_path, capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert why_not_whole(checkpoint, processes=2, also=("plasticity.json",)) == ""
    held = {"fsdp2": "pytorch_model_fsdp.bin", "zero3": "zero_pp_rank_1_mp_rank_00_optim_states.pt"}.get(name)
    assert held is None or list(checkpoint.rglob(held))
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    assert results(tmp_path / "out")["test_accuracy"] > 0.5


@pytest.mark.parametrize("spread", SPREAD)
def test_resumes_on_another_number_of_processes(spread: str, tmp_path: Path) -> None:
    """The images of each step are the same, so that the result is."""
    needed(spread)
    out = tmp_path / "out"
    assert trained(2, out, *SPREAD[spread]).returncode == 0
    whole = results(out)
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint-*/**/*") if path.is_file()}
    for processes in (4, 1):
        copied = tmp_path / str(processes)
        shutil.copytree(out, copied)
        (copied / "test_results.json").unlink()
        batch = ("--per_device_train_batch_size", str(64 // processes), "--per_device_eval_batch_size", "256")
        result = trained(processes, copied, *SPREAD[spread], *batch, "--resume_from_checkpoint", "True")
        if spread == "ZeRO-3":
            assert result.returncode != 0
            assert "by 2 processes with DeepSpeed, which continues only with as many" in result.stderr
        else:
            assert result.returncode == 0, result.stderr[-4000:]
            assert "Training resumes from" in result.stderr
            assert results(copied)["test_accuracy"] == pytest.approx(whole["test_accuracy"], abs=0.02)
        assert not list(copied.glob("not-whole-*"))
    assert kept == {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint-*/**/*") if path.is_file()}


def test_killed_at_random_ten_times(tmp_path: Path) -> None:
    """Two processes under FSDP2 end with the accuracy of an uninterrupted run, and lose nothing that was saved."""
    longer = (*SPREAD["FSDP2"], "--num_train_epochs", "12")
    whole = tmp_path / "whole"
    assert trained(2, whole, *longer).returncode == 0
    out, moments = tmp_path / "out", random.Random(0)
    kills = steps = 0
    while kills < 10:
        log = tmp_path / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command(2, out, *longer, "--resume_from_checkpoint", "True"),
                env=environment(HF_HUB_OFFLINE="1"), cwd=tmp_path, stdout=file, stderr=file,
            )  # fmt: skip
        wait_for(log, "eval_loss", process, 0)
        time.sleep(moments.uniform(0, 6))
        if process.poll() is not None:
            break
        workers = children(process.pid)
        assert len(workers) == 2
        for pid in (process.pid, *workers):  # the launcher first, which would log how the others ended
            os.kill(pid, signal.SIGKILL)
        process.wait()
        wait_until_gone(workers)
        kills += 1
        found = [p for p in out.glob("checkpoint-*") if not why_not_whole(p, processes=2, also=("plasticity.json",))]
        reached = max((int(path.name.split("-")[1]) for path in found), default=0)
        assert reached >= steps, "what was saved is lost"
        steps = reached
    result = trained(2, out, *longer, "--resume_from_checkpoint", "True")
    assert result.returncode == 0, result.stderr[-4000:]
    print(kills, results(out), results(whole))
    assert kills >= 5
    assert results(out)["test_accuracy"] == pytest.approx(results(whole)["test_accuracy"], abs=0.02)


STOPPED = {
    "measuring": (
        "Measuring plasticity",
        ("-m", "plasticity_peft", "measure", str(REPOSITORY / "examples" / "fashion-mnist-vit"),
         str(REPOSITORY / "examples" / "data" / "fashion_mnist.parquet"), "--max_samples", "4000", "--settle", "0"),
        "Error: Process 0 of 2 waited in vain for the results of the others",
    ),
    "training": (
        "Training will take",
        (str(TRAIN), *SMALL, "--num_train_epochs", "50", "--compare", "false"),
        "A process waited in vain for the others.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", STOPPED)
def test_a_process_that_stops_ends_the_others(stage: str, tmp_path: Path) -> None:
    """Neither dead nor alive (SIGSTOP): they end after the timeout, and the launcher within its 30 seconds."""
    begun, arguments, message = STOPPED[stage]
    log = tmp_path / "log"
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    out = ("--output_dir", str(tmp_path / "out")) if stage == "training" else ()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, *arguments, *out, "--ddp_timeout", "8"],
            env=environment(ACCELERATE_USE_CPU="1"), cwd=tmp_path, stdout=file, stderr=file,
        )  # fmt: skip
    wait_for(log, begun, process, None)
    time.sleep(1)
    (second,) = [pid for pid in children(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second, signal.SIGSTOP)
    start = time.monotonic()
    process.wait(120)
    print(stage, f"{time.monotonic() - start:.1f} s after one stopped")
    assert time.monotonic() - start < 8 + 30 + 20
    assert process.returncode != 0
    assert message in log.read_text()
    assert not Path(f"/proc/{second}").exists()


def wait_for(log: Path, text: str, process: subprocess.Popen[Any], otherwise: int | None) -> None:
    """Waits until a process has written a text, or ended so."""
    while not re.search(text, log.read_text()):
        if process.poll() is not None:
            assert process.returncode == otherwise, log.read_text()[-4000:]
            return
        time.sleep(0.1)


def wait_until_gone(pids: list[int]) -> None:
    """Waits until killed processes write no more."""
    while any(map(is_running, pids)):
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Returns whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    return [
        int(path) for task in Path(f"/proc/{pid}/task").iterdir() for path in (task / "children").read_text().split()
    ]
