"""Models whose weights are spread over processes: by FSDP, DeepSpeed ZeRO-3 or tensor parallelism."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plasticity_peft import PlasticityReport, fit_head, measure_plasticity
from plasticity_peft.components.sharding import HOOKS, whole
from tests.support.forking import run_script
from tests.support.models import random_images, tiny_model
from tests.support.processes import python

IMAGES = random_images(40)
LABELED = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(IMAGES)]
MEASURING: dict[str, dict[str, Any]] = {
    "images": {"settle": None, "max_samples": 17},
    "pairs": {"inputs": "embedding", "max_samples": 47},
    "weights": {"criterion": "condition_number"},
}


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Returns the blocks, which have another name in transformers 4."""
    return model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in blocks_of(model):
        fully_shard(layer)
    return fully_shard(model)


def fsdp2_checkpointed(model: nn.Module) -> nn.Module:
    """Wraps the blocks as Accelerate does for `fsdp_activation_checkpointing`."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for name, layer in list(blocks_of(model).named_children()):
        blocks_of(model)._modules[name] = checkpoint_wrapper(layer)
    return fsdp2(model)


def fsdp1(model: nn.Module, use_orig_params: bool = True) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(blocks_of(model)[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    first, second = ("mlp.fc1", "mlp.fc2") if hasattr(model.vit, "layers") else ("intermediate.dense", "output.dense")
    for layer in blocks_of(model):
        parallelize_module(layer, init_device_mesh("cpu", (2,)), {first: ColwiseParallel(), second: RowwiseParallel()})
    return model


HELD: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": ddp,
    "FSDP2": fsdp2,
    "FSDP2, activation checkpointing": fsdp2_checkpointed,
    "FSDP1": fsdp1,
    "FSDP1, flat parameters": partial(fsdp1, use_orig_params=False),
    "tensor parallel": tensor_parallel,
}
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from peft import get_peft_model
from plasticity_peft import PlasticityConfig, fit_head, measure_plasticity
from plasticity_peft.components.sharding import whole
from plasticity_peft.measuring.processes import this_process
from tests.measuring.test_sharded import HELD, IMAGES, LABELED, MEASURING, state_of
from tests.support.models import tiny_model

folder = Path(sys.argv[1])
rank, world_size = this_process()
assert world_size == 2
for number, (name, hold) in enumerate(HELD.items()):
    model = hold(tiny_model())
    logits = model(IMAGES[:4]).logits.detach().clone()
    for part in model.modules():
        getattr(part, "reshard", lambda: None)()  # what FSDP2 keeps of the last forward pass
    before = state_of(model)
    found = {case: measure_plasticity(model, IMAGES, batch_size=5, **options).to_dict()
             for case, options in MEASURING.items()}
    try:
        measure_plasticity(model, IMAGES * (torch.nan if rank == 1 else 1))
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    try:
        get_peft_model(model, PlasticityConfig(target_data=IMAGES))
    except Exception as error:
        found["adapted"] = f"{type(error).__name__}: {error}"
    assert state_of(model) == before, name
    assert torch.equal(model(IMAGES[:4]).logits, logits), name
    fit_head(model, LABELED)
    with whole(model) as inner:
        torch.save(inner.classifier.state_dict(), folder / f"head-{number}-{rank}.pt")
    found["changed"] = not torch.equal(model(IMAGES[:4]).logits, logits)
    (folder / f"{number}-{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""
REFUSED = {
    "DDP": r"ModelError: .*DistributedDataParallel\(get_peft_model\(model, config\)\)",
    "FSDP2": r"ModelError: .* is spread over processes \(DTensor\). Adapt a model before fully_shard",
    "FSDP1": r"ModelError: .*FullyShardedDataParallel\(get_peft_model\(model, config\), ...\)",
    "tensor": r"ModelError: .* is spread over processes \(DTensor\). Adapt a model before .*parallelize_module",
}


def state_of(model: nn.Module) -> list[Any]:
    """Returns what measuring must leave as it was: modules, their hooks, and this process's part of the weights."""
    parts = [(name, type(part).__name__, [list(getattr(part, hooks)) for hooks in HOOKS])
             for name, part in model.named_modules()]  # fmt: skip
    weights = [(name, type(held).__name__, held.requires_grad, getattr(held, "_local_tensor", held).detach().tolist())
               for name, held in model.named_parameters()]  # fmt: skip
    return [parts, weights, model.training]


@cache
def alone(case: str) -> PlasticityReport:
    return measure_plasticity(tiny_model(), IMAGES, batch_size=5, **MEASURING[case])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder into which two processes wrote what they measured."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    result = run_script(script, folder, cwd=folder, processes=2, timeout=120)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("held", HELD)
def test_the_report_is_that_of_one_process_however_the_model_is_held(held: str, two: Path) -> None:
    first, second = (json.loads((two / f"{list(HELD).index(held)}-{rank}.json").read_text()) for rank in range(2))
    for case in MEASURING:
        assert first[case] == second[case]
        check_equal(PlasticityReport.from_dict(first[case]), alone(case))
    assert re.search(r"PlasticityError: .*process 1 of 2: NonFiniteError", first["failed"])
    assert re.search(r"NonFiniteError: target_data\[.*\] contains NaN", second["failed"])
    assert re.search(REFUSED[next(name for name in REFUSED if held.startswith(name))], first["adapted"])
    assert first["adapted"] == second["adapted"]


def check_equal(found: PlasticityReport, expected: PlasticityReport) -> None:
    assert (found.samples, found.model_parameters) == (expected.samples, expected.model_parameters)
    assert found.costs == expected.costs
    for row, due in zip([*found.scores, *found.kinds], [*expected.scores, *expected.kinds], strict=True):
        assert row.mean == pytest.approx(due.mean, rel=1e-6)
        assert row.std == pytest.approx(due.std, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("held", HELD)
def test_a_fitted_head_stays_in_a_model_that_is_spread(held: str, two: Path) -> None:
    model = tiny_model()
    fit_head(model, LABELED)
    number = list(HELD).index(held)
    assert json.loads((two / f"{number}-0.json").read_text())["changed"]
    for rank in range(2):
        found = torch.load(two / f"head-{number}-{rank}.pt", weights_only=True)
        for name, value in model.classifier.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def test_what_is_not_spread_is_not_copied() -> None:
    model = tiny_model()
    before = state_of(model), [id(held) for held in model.parameters()]
    with whole(nn.DataParallel(model)) as inner:
        assert inner is model
        assert [id(held) for held in model.parameters()] == before[1]
    assert state_of(model) == before[0]


ZERO = """
import sys, warnings
warnings.simplefilter("ignore")  # DeepSpeed uses what torch has renamed
from tests.support.as_gpus import take_cpus_for_gpus
take_cpus_for_gpus()
from pathlib import Path
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, ViTForImageClassification
from plasticity_peft import PlasticityConfig, PlasticityReport, measure_plasticity
from plasticity_peft.components.sharding import whole
from tests.measuring.test_sharded import IMAGES, LABELED, MEASURING, check_equal
from tests.support.models import tiny_model
from tests.support.training import Labelled

folder, stage, order = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
deepspeed = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
             "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
             "train_batch_size": "auto", "zero_allow_untested_optimizer": True}

def arguments():
    return TrainingArguments(str(folder / "out"), max_steps=2, per_device_train_batch_size=4, report_to="none",
                             disable_tqdm=True, deepspeed=deepspeed, save_strategy="no")

made = arguments() if order == "arguments first" else None
model = ViTForImageClassification.from_pretrained(folder / "base")
made = made or arguments()
rank = made.process_index
assert made.world_size == 2
partitioned = model.classifier.weight.numel() == 0
assert partitioned == (stage == 3 and order == "arguments first"), (stage, order)

def check(measured):
    for case, options in MEASURING.items():
        found = measure_plasticity(measured, IMAGES, batch_size=5, **options)
        check_equal(found, PlasticityReport.load(folder / f"{case}.json"))

check(model)
assert (model.classifier.weight.numel() == 0) == partitioned
for training in ("lora", "full"):
    model = ViTForImageClassification.from_pretrained(folder / "base")
    config = PlasticityConfig(target_data=LABELED, training=training, fit_head=True, max_samples=16)
    adapted = get_peft_model(model, config)
    with whole(adapted) as inner:
        head = inner.classifier.modules_to_save["default"].weight
        torch.testing.assert_close(head, torch.load(folder / "head.pt", weights_only=True), rtol=1e-4, atol=1e-7)
trainer = Trainer(adapted, made, train_dataset=Labelled())
trainer.train()
engine = trainer.model_wrapped
assert type(engine).__name__ == "DeepSpeedEngine"
found = measure_plasticity(engine, IMAGES, settle=None, max_samples=17)
with whole(engine) as inner:
    values = {name: value.detach().clone() for name, value in inner.state_dict().items()}
if rank == 0:
    torch.save(values, folder / "trained.pt")
    found.save(folder / "trained.json")
torch.distributed.barrier()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("order", ["arguments first", "model first"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_has_the_report_of_one_process(stage: int, order: str, tmp_path: Path) -> None:
    """The model is measured, adapted and fitted as it is born, and measured again when DeepSpeed trains it."""
    from peft import get_peft_model

    from plasticity_peft import PlasticityConfig
    from tests.support.processes import environment

    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    for case in MEASURING:
        alone(case).save(tmp_path / f"{case}.json")
    fit_head(model, LABELED)
    torch.save(model.classifier.weight.detach(), tmp_path / "head.pt")
    script = tmp_path / "script.py"
    script.write_text(ZERO)
    result = python(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "127.0.0.1:0", script, tmp_path, stage, order,
        env=environment(DS_ACCELERATOR="cpu"), cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]

    config = PlasticityConfig(target_data=LABELED, training="full", max_samples=16)
    again = get_peft_model(tiny_model(), config)
    again.base_model.model.load_state_dict(torch.load(tmp_path / "trained.pt", weights_only=True))
    expected = measure_plasticity(again, IMAGES, settle=None, max_samples=17)
    check_equal(PlasticityReport.load(tmp_path / "trained.json"), expected)
