"""Plasticity in the Trainer's loggers, and training as it is without it."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, ViTConfig, ViTForImageClassification

from plasticity_peft import PlasticityCallback, PlasticityConfig, PlasticityError, measure_plasticity
from plasticity_peft.components.component import KINDS
from tests.support.models import tiny_model
from tests.support.processes import launch
from tests.support.training import IMAGES, trained_weights, trainer_of

NUMBERS = [f"plasticity/{part}{kind}" for part in ("", "rank/", "standard_error/") for kind in KINDS]


def dropping() -> PreTrainedModel:
    """Returns a small model with dropout wherever it can have it."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )
    return ViTForImageClassification(config)


def adapted(how: str, base: PreTrainedModel | None = None, **options: Any) -> torch.nn.Module:
    """Returns a model that trains in one of the ways in which one can."""
    base = dropping() if base is None else base
    if how == "everything":
        return base
    settings = {"target_data": IMAGES, "max_samples": 8, "training": "full" if how == "full" else "lora", "top_k": 4}
    config = PlasticityConfig(**{**settings, "lora_dropout": 0.2, **options})
    torch.manual_seed(1)
    if how == "add_adapter":
        base.add_adapter(config)
        return base
    return get_peft_model(base, config)


def trained(model: torch.nn.Module, folder: Path, *arguments: Any, **options: Any) -> tuple[Trainer, Any]:
    """Returns the trainer after training, and the callback if there is one; `callback` says how to make it."""
    callback = options.pop("callback", None)
    settings = {"logging_strategy": "epoch", "save_strategy": "no", **SHORT, **options}
    trainer = trainer_of(model, folder, **settings)
    if callback is not None:
        callback = PlasticityCallback(trainer, *arguments, **callback)
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


SHORT = {"load_best_model_at_end": False, "num_train_epochs": 2, "eval_strategy": "epoch"}


def random_states() -> list[bytes]:
    numpy_state = np.random.get_state()
    return [torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode(), repr(numpy_state).encode()]


def losses(trainer: Trainer) -> list[dict[str, float]]:
    """Returns what the Trainer logged by itself, but for how long it took."""
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
        if not any(key.startswith("plasticity/") for key in entry)
    ]


@pytest.mark.parametrize("how", ["lora", "full", "add_adapter", "everything"])
def test_training_is_what_it_is_without_it(how: str, tmp_path: Path) -> None:
    found = []
    for callback in (None, {"every": 1, "max_samples": 8, "settle": None}):
        model = adapted(how)
        trainer, made = trained(model, tmp_path, IMAGES if callback else None, callback=callback)
        found.append((trained_weights(model), random_states(), losses(trainer)))
    assert set(made.reports) == {0.0, 1.0, 2.0}
    scores = [[row.mean for row in report.kinds] for report in made.reports.values()]
    assert scores[1] != scores[2]
    assert found[0][0].keys() == found[1][0].keys()
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name
    assert found[0][1:] == found[1][1:]
    assert [entry["epoch"] for entry in losses(trainer) if "loss" in entry] == [1, 2]


# The first criterion looks at what the model does, the second at its weights as they are.
@pytest.mark.parametrize(
    ("how", "criterion"),
    [("lora", "parameter_plasticity"), ("lora", "bound"), ("full", "bound"), ("add_adapter", "bound")],
)
def test_what_is_measured_again_is_the_model_as_published(how: str, criterion: str, tmp_path: Path) -> None:
    base = dropping()
    base.save_pretrained(tmp_path / "base")
    model = adapted(how, copy.deepcopy(base), candidates=("LN2", "MHA", "FC1"), top_k=3, criterion=criterion)
    _, callback = trained(model, tmp_path, IMAGES, callback={"every": 2, "settle": None}, learning_rate=0.1)
    assert set(callback.reports) == {0.0, 2.0}
    model.save_pretrained(tmp_path / "adapter")
    published = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected = measure_plasticity(
        published.merge_and_unload(), IMAGES, max_samples=8, settle=None, criterion=criterion
    )
    for row, own in zip(callback.reports[2.0].scores, expected.scores, strict=True):
        assert (row.id, row.modules) == (own.id, own.modules)
        assert row.mean == pytest.approx(own.mean, rel=1e-5)
    before = callback.reports[0.0].kinds
    moved = [abs(a.mean / b.mean - 1) for a, b in zip(callback.reports[2.0].kinds, before, strict=True)]
    assert max(moved) > 0.01


def test_tensorboard_gets_ranking_and_selection(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = adapted("lora", top_k=2)
    trainer, callback = trained(model, tmp_path, IMAGES, callback={"every": 1}, report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    config = model.peft_config["default"]
    for kind, row in zip(KINDS, config.report.kinds, strict=True):
        selected = [event.value for event in events.Scalars(f"train/plasticity/selected/{kind}")]
        assert selected == [kind in config.selection.units] * 3
        scores = events.Scalars(f"train/plasticity/{kind}")
        assert [event.step for event in scores] == [0, 6, 12]
        assert scores[0].value == pytest.approx(row.mean)
        assert scores[2].value == pytest.approx(callback.reports[2.0].kinds[KINDS.index(kind)].mean)
        errors = events.Scalars(f"train/plasticity/standard_error/{kind}")
        assert errors[0].value == pytest.approx(row.standard_error)
    ranks = {kind: events.Scalars(f"train/plasticity/rank/{kind}")[0].value for kind in KINDS}
    assert sorted(ranks, key=ranks.get) == [row.unit for row in config.report.ranking()]
    (tag,) = [tag for tag in events.Tags()["tensors"] if "plasticity/report" in tag]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    assert texts == [str(report) for report in callback.reports.values()]
    pictures = events.Images("train/plasticity/picture")
    assert [picture.step for picture in pictures] == [0, 6, 12]
    assert all(picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)
    cost = config.selection.cost
    for name, value in {"time": cost.time, "memory": cost.memory}.items():
        logged = [event.value for event in events.Scalars(f"train/plasticity/cost/{name}")]
        assert logged == pytest.approx([value] * 3)
    (trained_parameters,) = {event.value for event in events.Scalars("train/plasticity/parameters")}
    assert trained_parameters == config.selection.parameters["lora"]
    assert {"train/loss", "eval/loss"} <= set(events.Tags()["scalars"])
    history = [value for entry in trainer.state.log_history for value in entry.values()]
    assert not [value for value in history if isinstance(value, str)]  # which the console and the state would repeat


def test_given_nothing_it_reports_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("lora", granularity="component", top_k=3)
    monkeypatch.setattr(
        "plasticity_peft.adapters.callback.measure_plasticity", lambda *_, **__: pytest.fail("measured")
    )
    trainer, callback = trained(model, tmp_path, callback={})
    config = model.peft_config["default"]
    assert callback.reports == {0.0: config.report}
    (logged,) = [entry for entry in trainer.state.log_history if "plasticity/MHA" in entry]
    assert set(NUMBERS) < set(logged)
    assert {key.split("/")[2] for key, value in logged.items() if "selected" in key and value} == set(
        config.selection.units
    )
    assert logged["plasticity/1.FC2"] == config.report.scores[-1].mean
    assert "plasticity/selected/MHA" not in logged
    assert not [value for value in logged.values() if not isinstance(value, (int, float))]
    trainer.create_model_card(model_name="test")  # reads the log history
    assert "plasticity/" not in (tmp_path / "README.md").read_text()
    json.dumps(trainer.state.log_history)


def test_what_is_not_given_is_as_the_config_says(tmp_path: Path) -> None:
    paper = {"criterion": "rate_of_change", "inputs": "activation", "candidates": ("MHA", "FC1", "FC2")}
    model = adapted("lora", **paper, seed=3, settle=None, top_k=1)
    _, callback = trained(model, tmp_path, IMAGES, callback={"every": 2, "max_samples": 6})
    first, last = callback.reports.values()
    assert (last.criterion, last.inputs, last.seed, last.samples) == ("rate_of_change", "activation", 3, 6)
    assert first.samples == 8
    _, callback = trained(
        adapted("lora"), tmp_path, IMAGES, callback={"every": 2, "criterion": "bound", "budget": 0.9}
    )
    assert callback.reports[2.0].criterion == "bound"


def test_resumed_training_goes_on_measuring(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    model = adapted("lora")
    _, whole = trained(model, folder, IMAGES, callback={"every": 1}, save_strategy="epoch")
    config = PlasticityConfig(
        report=folder / "checkpoint-6" / "plasticity.json", lora_dropout=0.2, top_k=4, max_samples=8
    )
    resumed = get_peft_model(dropping(), config)
    trainer = trainer_of(resumed, tmp_path / "resumed", logging_strategy="epoch", save_strategy="no", **SHORT)
    callback = PlasticityCallback(trainer, IMAGES, every=1)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert set(callback.reports) == {2.0}
    for row, own in zip(callback.reports[2.0].kinds, whole.reports[2.0].kinds, strict=True):
        assert row.mean == pytest.approx(own.mean, rel=1e-5)


def test_training_that_ends_within_an_epoch(tmp_path: Path) -> None:
    _, callback = trained(adapted("lora"), tmp_path, IMAGES, callback={"every": 1}, max_steps=10)
    assert set(callback.reports) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"every": 1}, "give both target_data .* and every .* Got every=1 and no target_data"),
        ((IMAGES,), {}, "Got every=None and target_data"),
        ((), {"max_samples": 3}, "Got every=None and no target_data"),
        ((IMAGES,), {"every": 0}, "every must be a whole number of at least 1. Got 0"),
        ((IMAGES,), {"every": 1.5}, "every must be a whole number"),
        ((IMAGES,), {"every": 1, "pair": 3}, "Measuring takes criterion, .*max_samples, .*r, .* Got pair"),
    ],
)
def test_arguments_that_cannot_be(arguments: Any, options: Any, message: str, tmp_path: Path) -> None:
    trainer = trainer_of(adapted("everything"), tmp_path)
    with pytest.raises(PlasticityError, match=message):
        PlasticityCallback(trainer, *arguments, **options)


def test_a_model_with_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(PlasticityError, match="no active adapter of a PlasticityConfig"):
        trained(adapted("everything"), tmp_path, callback={})


def test_weights_that_are_spread_over_processes(tmp_path: Path) -> None:
    trainer = trainer_of(adapted("lora"), tmp_path, **SHORT)
    trainer.add_callback(PlasticityCallback(trainer, IMAGES, every=1))
    trainer.is_fsdp_enabled = True
    with pytest.raises(PlasticityError, match="DeepSpeed or FSDP has spread its weights"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


DISTRIBUTED = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from tests.adapters.test_callback import adapted, losses, trained
from tests.support.training import IMAGES, trained_weights

folder = Path(sys.argv[1])
for callback in (None, {"every": 1}):
    model = adapted("lora")
    options = {"ddp_find_unused_parameters": False, "callback": callback}
    trainer, made = trained(model, folder, IMAGES if callback else None, **options)
    assert trainer.args.world_size == 2
    name = f"{callback is not None}-{PartialState().process_index}.pt"
    torch.save((trained_weights(model), losses(trainer)), folder / name)
assert set(made.reports) == {0.0, 1.0, 2.0}
made.reports[2.0].save(folder / f"report-{PartialState().process_index}.json")
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_measure_together(tmp_path: Path) -> None:
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    (result,) = launch(script, tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = ((tmp_path / f"report-{rank}.json").read_text() for rank in range(2))
    assert first == second
    for rank in range(2):
        without, beside = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for name in (False, True))
        assert all(torch.equal(value, beside[0][name]) for name, value in without[0].items())
        assert without[1] == beside[1]


def test_a_merged_copy_shares_nothing_with_the_model() -> None:
    from plasticity_peft.adapters.model import merged_copy

    model = adapted("lora", tiny_model())
    before = copy.deepcopy(model.state_dict())
    for parameter in merged_copy(model).parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
