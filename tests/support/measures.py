"""The paper's measure in both of its protocols, and the default: what most laws are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from plasticity_peft import PlasticityReport
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.calls import Inputs
from plasticity_peft.criteria.protocols.activation import ActivationProtocol
from plasticity_peft.criteria.protocols.distances import Distances
from plasticity_peft.criteria.protocols.embedding import EmbeddingProtocol

PROTOCOLS = {"embedding": EmbeddingProtocol, "activation": ActivationProtocol}

MEASURES: dict[str, dict[str, Any]] = {
    "embedding": {"inputs": "embedding"},
    "activation": {"inputs": "activation"},
    "parameter_plasticity": {"criterion": "parameter_plasticity"},
}
"""Arguments of `measure_plasticity`, by name."""

every_measure = pytest.mark.parametrize("measure", MEASURES)


def means(report: PlasticityReport) -> list[float]:
    """Returns the scores of the components, and then those of the kinds."""
    return [row.mean for row in (*report.scores, *report.kinds)]


def distances(model: nn.Module, inputs: str) -> Callable[[Inputs, Inputs], Distances]:
    """Returns the function from the images x and y of some pairs to what a protocol of the package measures."""
    protocol = PROTOCOLS[inputs](model, find_architecture(model))
    return lambda x, y: protocol({name: torch.cat([x[name], y[name]]) for name in x})


def rates(model: nn.Module, inputs: str, x: Inputs, y: Inputs) -> torch.Tensor:
    """Returns what the package takes for the rates of change of some pairs: float64 of shape (pairs, components)."""
    with torch.no_grad():
        found = distances(model, inputs)(x, y)
    return found.outputs / found.inputs
