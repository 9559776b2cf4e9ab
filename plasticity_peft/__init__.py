"""Measure, rank, select and train the components of a vision transformer that finetune best, as a PEFT method."""

import plasticity_peft.adapters.model  # noqa: F401 - registers PlasticityConfig with PEFT
from plasticity_peft.adapters.callback import PlasticityCallback
from plasticity_peft.adapters.config import PlasticityConfig
from plasticity_peft.adapters.loading import load_adapter
from plasticity_peft.adapters.pretrained import load_pretrained
from plasticity_peft.components.architecture import find_components
from plasticity_peft.components.layouts import BlockLayout, register_architecture
from plasticity_peft.errors import PlasticityError
from plasticity_peft.measuring.measure import measure_plasticity
from plasticity_peft.report.report import PlasticityReport

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "PlasticityCallback",
    "PlasticityConfig",
    "PlasticityError",
    "PlasticityReport",
    "find_components",
    "load_adapter",
    "load_pretrained",
    "measure_plasticity",
    "register_architecture",
]
