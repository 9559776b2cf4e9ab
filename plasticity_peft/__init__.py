"""Measure, rank, select and train the components of a vision transformer that finetune best, as a PEFT method."""

from plasticity_peft.architectures import find_components
from plasticity_peft.callback import PlasticityCallback
from plasticity_peft.config import PlasticityConfig
from plasticity_peft.errors import PlasticityError
from plasticity_peft.layouts import BlockLayout, register_architecture
from plasticity_peft.loading import load_adapter
from plasticity_peft.measure import measure_plasticity
from plasticity_peft.report import PlasticityReport
from plasticity_peft.selection import Selection
from plasticity_peft.tuner import PlasticityModel

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "PlasticityCallback",
    "PlasticityConfig",
    "PlasticityError",
    "PlasticityModel",
    "PlasticityReport",
    "Selection",
    "find_components",
    "load_adapter",
    "measure_plasticity",
    "register_architecture",
]
