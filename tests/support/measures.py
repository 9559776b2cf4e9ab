"""The paper's measure in both of its protocols, and the default: what most laws are tested on."""

from __future__ import annotations

from typing import Any

import pytest

from plasticity_peft import PlasticityReport

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
