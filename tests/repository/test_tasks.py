"""The examples of tasks beside classification: what trains, what that gives, and that stock PEFT loads it."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.forking import EXAMPLES, STOCK, run_code
from tests.support.models import REPOSITORY
from tests.support.stock import WITHOUT_US
from tests.support.tasks import TASKS as ALL

TASKS = REPOSITORY / "examples" / "tasks"
SCRIPTS = ("segmentation", "contrastive", "video", "depth", "vision_language")
MOST_LINES = 150
SHORT = {
    "max_train_samples": 48, "max_eval_samples": 24, "max_samples": 8, "per_device_train_batch_size": 8,
    "warmup_steps": 2, "disable_tqdm": "true", "logging_steps": 100,
}  # fmt: skip
HEADS = {
    "segmentation": ("decode_head", "auxiliary_head"),
    "contrastive": ("text_model", "vision_model.head"),
    "video": ("classifier", "fc_norm"),
    "depth": ("neck", "head"),
    "vision_language": ("model.multi_modal_projector",),
}
"""What trains beside the selected components."""
NEVER_CALLED = ("neck.fusion_stage.layers.0.residual_layer1.",)
"""A part of the decoder of Depth Anything that its forward pass leaves out."""
SCRIPT = """
import pathlib, runpy, sys, torch
script = pathlib.Path(sys.argv.pop(1))
sys.path.insert(0, str(script.parent))
import running
import plasticity_peft.card
from tests.support.outputs import answers

plasticity_peft.card.DRAWN.update(dict.fromkeys(plasticity_peft.card.DRAWN, lambda *_: False))  # pictures take long
torch.set_num_threads(1)
finish = running.finish


def kept(trainer, *rest):
    finish(trainer, *rest)
    batch = next(iter(trainer.get_eval_dataloader()))
    batch = {name: value for name, value in batch.items() if name not in ("labels", "return_loss")}
    folder, model = pathlib.Path(trainer.args.output_dir), trainer.model
    torch.save((batch, answers(model, batch)), folder / "live.pt")
    if (folder / "base").is_dir():  # the small model
        torch.save(type(model.get_base_model()).from_pretrained(folder / "base").state_dict(), folder / "base.pt")


running.finish = kept
runpy.run_path(str(script), run_name="__main__")
"""
"""Runs an example, and keeps what the trained model answers."""
LOADING = (
    WITHOUT_US
    + """
import json, pathlib, torch, transformers
from peft import PeftModel
from tests.support.outputs import answers, difference

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / "adapter_config.json").read_text())
base = getattr(transformers, config["auto_mapping"]["base_model_class"])
base = base.from_pretrained(config["base_model_name_or_path"], **json.loads(sys.argv[2]))
batch, expected = torch.load(folder / "live.pt", weights_only=False)
print(difference(answers(PeftModel.from_pretrained(base, folder), batch), expected) or "equal")
"""
)


def run(name: str, folder: Path, **options: object) -> tuple[dict[str, tuple[float, float]], str]:
    """Returns the metrics of an example before and after training, by name, and what it wrote."""
    given = {**SHORT, "output_dir": folder / "out", **options}
    words = [word for option, value in given.items() for word in (f"--{option}", *str(value).split())]
    result = run_code(SCRIPT, TASKS / f"{name}.py", *words, folder=folder, parent=EXAMPLES)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^(\w+): ([\d.]+) before training, ([\d.]+) after$", result.stderr, flags=re.MULTILINE)
    return {metric: (float(before), float(after)) for metric, before, after in found}, result.stderr


def loaded_by_stock_peft(folder: Path, **options: object) -> str:
    """Returns whether an adapter that stock PEFT loads answers as the trained model did: "equal", or what differs."""
    result = run_code(LOADING, folder, json.dumps(options), folder=folder, parent=STOCK)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def check_what_trained(name: str, folder: Path) -> None:
    """Fails unless the selected components and the heads are in the adapter, trained, and nothing else."""
    kept = load_file(folder / "adapter_model.safetensors")
    trained = {key.removeprefix("base_model.model."): value for key, value in kept.items()}
    base = torch.load(folder / "base.pt")
    written = json.loads((folder / "plasticity.json").read_text())["adapter"]
    assert written["training"] == "full"
    expected = tuple(f"{path}." for path in (*written["modules"], *HEADS[name]))
    assert set(trained) == {key for key in base if key.startswith(expected)}
    for path in expected:
        assert any(key.startswith(path) for key in trained), path
    still = [key for key, value in trained.items() if torch.equal(value, base[key])]
    assert all(key.startswith(NEVER_CALLED) for key in still)


GAINS = {
    "segmentation": ({"max_steps": 12}, {"mean_iou": 0.04}),
    "contrastive": ({"max_steps": 20}, {"accuracy": 0.1}),
    "video": ({"max_steps": 8, "learning_rate": 0.0003}, {"accuracy": 0.0}),
    "depth": ({"max_steps": 16, "learning_rate": 0.003}, {"abs_rel": -0.1, "delta_1_25": 0.3}),
    "vision_language": ({"max_steps": 16}, {"accuracy": 0.1}),
}
"""How long an example trains here, and how much its metrics gain at least."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("video", "depth") else ()) for name in SCRIPTS]
)
def test_a_task_is_learned_saved_and_loaded_by_stock_peft(name: str, tmp_path: Path) -> None:
    options, least = GAINS[name]
    metrics, log = run(name, tmp_path, **options)
    for metric, gain in least.items():
        before, after = metrics[metric]
        assert (after - before) * (1 if gain > 0 else -1) >= abs(gain), (metric, before, after)
    assert "Without --model_name_or_path, a small model is made" in log
    check_what_trained(name, tmp_path / "out")
    assert loaded_by_stock_peft(tmp_path / "out") == "equal"


def test_scripts_are_short_and_described() -> None:
    page, readme = ((REPOSITORY / path).read_text() for path in ("docs/tasks.md", "examples/README.md"))
    for name in SCRIPTS:
        assert len((TASKS / f"{name}.py").read_text().splitlines()) <= MOST_LINES
        assert f"examples/tasks/{name}.py" in page
        assert f"tasks/{name}.py" in readme


OTHERS = {
    "segmentation": ("segformer-semantic", "SegformerImageProcessor", 32, {"num_labels": 11}),
    "depth": ("dpt-depth", "DPTImageProcessor", 16, {"inverse": "true"}),
}
"""A small model of another architecture, its image processor, the size of its images, and options."""


@pytest.mark.slow
@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_and_a_dataset_of_the_users(
    name: str, training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, processor, size, options = OTHERS[name]
    ALL[task].build().save_pretrained(tmp_path / "model")
    getattr(transformers, processor)(size={"height": size, "width": size}).save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(TASKS)
    for split, data in getattr(importlib.import_module("scenes"), name)(24, 8).items():
        (tmp_path / "data").mkdir(exist_ok=True)
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    given = {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data", "training": training}
    metrics, log = run(name, tmp_path, max_steps=2, **given, **options)
    assert metrics
    assert "a small model is made" not in log
    labels = {key: value for key, value in options.items() if key == "num_labels"}
    loading = {**labels, "ignore_mismatched_sizes": True} if labels else {}
    assert loaded_by_stock_peft(tmp_path / "out", **loading) == "equal"
