"""A config that was used before: what it still knows, and for which model that holds.

A config lets go of its data once a model is measured. Used for a second model it may not pass on the first choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plasticity_peft.adapters.config import PEFT_TYPE, PlasticityConfig
from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.heads import within
from plasticity_peft.components.offloading import onloaded
from plasticity_peft.components.quantized import holds_plain_weights
from plasticity_peft.components.wrappers import walk
from plasticity_peft.criteria import CRITERIA
from plasticity_peft.criteria.criterion import WeightCriterion
from plasticity_peft.errors import ConfigError
from plasticity_peft.measuring.measure import Settings
from plasticity_peft.report.report import PlasticityReport

USED = "_used"
"""Attribute of a config that has chosen: what it was asked for before. It is no field, so that it is never saved."""


@dataclass(frozen=True)
class Use:
    """What a config was asked for, and what came of it."""

    report: PlasticityReport
    settings: Settings | None
    """How the report was measured; None if the user gave it."""
    weights: tuple[int, ...]
    """Checksums of the weights that were measured."""
    given: list[str] | None
    """`modules_to_save` as the user gave them."""
    resolved: list[str] | None
    """`modules_to_save` of the choice."""


def given_modules(config: PlasticityConfig) -> list[str] | None:
    """Returns `modules_to_save` as the user gave them, also if the config has chosen before."""
    use = vars(config).get(USED)
    names: list[str] | None = config.modules_to_save
    return use.given if use is not None and names == use.resolved else names


def report_at_hand(model: nn.Module, architecture: Architecture, config: PlasticityConfig) -> PlasticityReport | None:
    """Returns the report that the config was given or holds for this very model; None if it has to be measured.

    Raises:
        ConfigError: the config has measured another model, or was changed since, and has let go of its data.
    """
    use = vars(config).get(USED)
    if use is None or config.report is not use.report or use.settings is None:
        return config.load_report()
    if config.target_data is not None or isinstance(CRITERIA[config.settings.criterion], WeightCriterion):
        return None
    if use.settings != config.settings:
        raise ConfigError(
            "This config was used before and has let go of its data, and how to measure was changed since. Give it "
            "target_data again, or make a new PlasticityConfig."
        )
    if use.weights != checksums(model, architecture):
        raise ConfigError(
            f"This config was used before, for a model with other weights than this {type(model).__name__}, and has "
            "let go of its data. A choice holds for one model: give it target_data again, or make a new "
            "PlasticityConfig for each model."
        )
    return use.report


def remember(
    config: PlasticityConfig,
    chosen: PlasticityConfig,
    settings: Settings | None,
    weights: tuple[int, ...],
    given: list[str] | None,
) -> None:
    """Shows in the user's config what was chosen, and keeps it a config that chooses."""
    assert isinstance(chosen.report, PlasticityReport)
    names: list[str] | None = chosen.modules_to_save
    kept: dict[str, Any] = {"peft_type": PEFT_TYPE, "task_type": config.task_type}
    vars(config).update({**vars(chosen), **kept, USED: Use(chosen.report, settings, weights, given, names)})


def checksums(model: nn.Module, architecture: Architecture) -> tuple[int, ...]:
    """Returns a number for each parameter of the backbone, without heads and adapters: other weights have others."""
    sums = []
    for path, module in walk(model.get_submodule(architecture.backbone), architecture.backbone):
        if any(within(path, head) for head in architecture.heads):
            continue
        with onloaded(module):
            for parameter in module.parameters(recurse=False):
                sums.append(_checksum(parameter) if holds_plain_weights(module) else parameter.numel())
    return tuple(sums)


def _checksum(parameter: torch.Tensor) -> int:
    """Returns the sum of the bits of a tensor, read as whole numbers: no order of adding changes it."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().contiguous().view(whole).sum(dtype=torch.int64))
