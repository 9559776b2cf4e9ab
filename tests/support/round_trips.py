"""A small model is adapted, trained one step, saved, and loaded by stock PEFT and by `load_adapter`.

Before an adapter is loaded, all that is fresh when a class is made from a checkpoint of its backbone is drawn anew: an
adapter that lacks a part of the head then answers otherwise. transformers says what that is: `base_model_prefix`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from plasticity_peft import PlasticityConfig, load_adapter
from tests.support.forking import STOCK, run_code
from tests.support.models import moved
from tests.support.outputs import answers, difference
from tests.support.stock import WITHOUT_US
from tests.support.tasks import Batch, Task

SCRIPT = (
    WITHOUT_US
    + """
import pathlib, sys, warnings
import torch, transformers
from peft import PeftModel
from tests.support.outputs import answers, difference

torch.set_num_threads(1)
for folder in map(pathlib.Path, sys.argv[1:]):
    name, config, state, batch, expected = torch.load(folder / "case.pt", weights_only=False)
    base = getattr(transformers, name)(config)
    base.load_state_dict(state)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            found = difference(answers(PeftModel.from_pretrained(base, folder / "adapter"), batch), expected)
    except Exception as error:
        found = f"{type(error).__name__}: {error}".replace("\\n", " ")
    print(folder.name, found or "equal", sep="\\t", flush=True)
"""
)


def adapt(task: Task, model: PreTrainedModel, training: str, **options: Any) -> PeftModel:
    """Returns the model with an adapter on some components of each kind."""
    settings = {"criterion": "random", "granularity": "component", "top_k": 4, "r": 2, "lora_dropout": 0.0}
    named = list(task.named) or None
    config = PlasticityConfig(
        **{**settings, "modules_to_save": named, "backbone": task.backbone, **options},
        target_data=task.data(), training=training,
    )  # fmt: skip
    return get_peft_model(model, config)


def one_step(model: PeftModel, batch: Batch) -> list[str]:
    """Trains one step if the model has a loss of its own, and returns which heads got no gradient at all."""
    torch.manual_seed(0)
    loss = getattr(model.train()(**batch), "loss", None)
    if loss is None:
        return []
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=1e-3).step()
    modules = dict(model.get_base_model().named_modules())
    saved = [modules[name] for name in model.peft_config["default"].modules_to_save or () if name in modules]
    chosen = model.peft_config["default"].selection.modules
    heads = {path for path, module in modules.items() if module in saved and path not in chosen}
    return [path for path in heads if not any(_moves(p) for p in modules[path].parameters())]


def _moves(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def fresh_base(task: Task, model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of the model in which all that is no part of its backbone in transformers has other weights."""
    model = copy.deepcopy(model)
    inner = getattr(model, model.base_model_prefix, None)
    kept = set(inner.parameters()) if isinstance(inner, nn.Module) else set(model.parameters())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter not in kept if task.fresh is None else name.startswith(task.fresh):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def save_case(task: Task, training: str, folder: Path, **options: Any) -> str | None:
    """Writes an adapter that was trained one step and what a loader needs; returns what `load_adapter` gets wrong."""
    model = task.build()
    fresh = fresh_base(task, model)
    plain = task.images()
    batch = {**plain, **(task.labels() if task.labels else {})}
    adapted = adapt(task, model, training, **options)
    untouched = one_step(adapted, batch)
    moved(adapted, scale=0.05)
    adapted.save_pretrained(folder / "adapter")
    expected = answers(adapted, batch)
    torch.save((task.model, fresh.config, fresh.state_dict(), batch, expected), folder / "case.pt")
    loaded = load_adapter(copy.deepcopy(fresh), folder / "adapter", backbone=task.backbone)
    problem = difference(answers(loaded, batch), expected)
    without = difference(answers(fresh, batch), expected)
    if without is None:
        return "the adapter changes nothing"
    idle = [path for path in untouched if path not in task.idle]
    return f"heads without a gradient: {idle}" if idle else problem


def stock_answers(folders: list[Path]) -> dict[str, str]:
    """Returns what stock PEFT makes of each case, in one process without this package: "equal" or why not."""
    result = run_code(SCRIPT, *folders, folder=folders[0], parent=STOCK, timeout=1200)
    assert result.returncode == 0, result.stderr
    return dict(line.split("\t", 1) for line in result.stdout.splitlines())
