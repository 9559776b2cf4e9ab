"""The ordinary Trainer: evaluation, checkpoints, the best model, resuming, loggers, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from plasticity_peft import PlasticityConfig
from tests.support.forking import run_script
from tests.support.models import logits, saved_base, tiny_model
from tests.support.training import IMAGES, trained_weights, trainer_of


@pytest.mark.parametrize("training", ["lora", "full"])
def test_trains_evaluates_and_ends_with_the_best_checkpoint(training: str, tmp_path: Path) -> None:
    model = get_peft_model(
        saved_base(tmp_path / "base"), PlasticityConfig(target_data=IMAGES, max_samples=4, training=training)
    )
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = trained_weights(model)
    trainer = trainer_of(model, tmp_path / "out")
    trainer.train()

    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.evaluate()["eval_accuracy"] == trainer.state.best_metric
    moved = [name for name, value in trained_weights(model).items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())
    assert json.loads((best / "plasticity.json").read_text())["adapter"]["training"] == training
    loaded = PeftModel.from_pretrained(type(tiny_model()).from_pretrained(tmp_path / "base"), best).eval()
    torch.testing.assert_close(logits(loaded, IMAGES), logits(model, IMAGES))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_resumed_is_the_same_as_uninterrupted_without_probing(
    training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"load_best_model_at_end": False}
    torch.manual_seed(0)
    config = PlasticityConfig(target_data=IMAGES, max_samples=4, training=training)
    whole = get_peft_model(saved_base(tmp_path / "base"), config)
    trainer_of(whole, tmp_path / "out", **options).train()
    checkpoint = tmp_path / "out" / "checkpoint-12"

    monkeypatch.setattr("plasticity_peft.adapters.model.measure_by", lambda *args, **kwargs: pytest.fail("measured"))
    torch.manual_seed(1)
    config = PlasticityConfig(report=checkpoint / "plasticity.json", training=training)
    resumed = get_peft_model(type(tiny_model()).from_pretrained(tmp_path / "base"), config)
    trainer = trainer_of(resumed, tmp_path / "out2", **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))

    assert trainer.state.global_step == 24
    expected = trained_weights(whole)
    for name, value in trained_weights(resumed).items():
        torch.testing.assert_close(value, expected[name])


def test_loggers_that_write_down_configs_take_ours(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = get_peft_model(
        saved_base(tmp_path / "base"), PlasticityConfig(training="lora", target_data=IMAGES, max_samples=4)
    )
    trainer_of(model, tmp_path / "out", report_to="tensorboard", num_train_epochs=1).train()
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


CHOICE = {
    "lora": {"criterion": "parameter_plasticity"},
    "full": {"criterion": "rate_of_change", "candidates": ("MHA", "FC1", "FC2")},
}
DISTRIBUTED = """
import os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import TrainingArguments
from plasticity_peft import PlasticityConfig
from tests.adapters.test_trainer import CHOICE
from tests.support.models import saved_base
from tests.support.training import IMAGES, trained_weights, trainer_of

rank = os.environ["RANK"]
# Once the processes know of each other, transformers saves in the first one alone.
bases = {training: saved_base(Path(sys.argv[1]) / training / f"base-{rank}") for training in CHOICE}
names = TrainingArguments.__dataclass_fields__
name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)  # 5.23, before
for training, choice in CHOICE.items():
    folder = Path(sys.argv[1]) / training
    torch.manual_seed(0)
    config = PlasticityConfig(target_data=IMAGES, max_samples=7, batch_size=2, training=training, **choice)
    model = get_peft_model(bases[training], config)
    assert PartialState().num_processes == 2, PartialState()
    config.report.save(folder / f"report-{rank}.json")
    options = {name: True, f"{name}_kwargs": {"use_reentrant": False}} if training == "full" else {}
    trainer = trainer_of(model, folder / "out", ddp_find_unused_parameters=False, num_train_epochs=2, **options)
    assert trainer.args.world_size == 2
    trainer.train()
    torch.save(trained_weights(model), folder / f"weights-{rank}.pt")
    PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which two processes chose and trained, by LoRA and then in full."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "distributed.py"
    script.write_text(DISTRIBUTED)
    result = run_script(script, folder, cwd=folder, processes=2)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("training", CHOICE)
def test_two_processes_choose_the_same_and_train_together(training: str, two: Path) -> None:
    folder = two / training
    first, second = (json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = PlasticityConfig(
        target_data=IMAGES, max_samples=7, batch_size=2, **{"training": "lora", **CHOICE[training]}
    )
    get_peft_model(tiny_model(), alone)
    assert first["samples"] == 7
    for row, expected in zip(first["scores"], alone.report.scores, strict=True):
        assert row["mean"] == pytest.approx(expected.mean, rel=1e-6)
        assert row["std"] == pytest.approx(expected.std, rel=1e-6)
    trained = [torch.load(folder / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
