"""Measure, rank, select and train the components of a vision transformer that finetune best, as a PEFT method.

The sub-packages are the steps, in this order: `components` finds the components of a model, `images` draws samples,
`criteria` score the components, `report` has the ranking and the selection, `measuring` turns a model and images into
a report, `saved` has the files of an adapter, `adapters` has what PEFT sees, and `cli` is the command line.

Every name is imported when it is first used, so that the command line starts without torch.
"""

import lazy_loader

from plasticity_peft.registration import register_when_peft_is_imported

__version__ = "0.2.0"

__getattr__, __dir__, _ = lazy_loader.attach_stub(__name__, __file__)

__all__ = [
    "BlockLayout",
    "PlasticityCallback",
    "PlasticityConfig",
    "PlasticityError",
    "PlasticityReport",
    "create_plasticity_optimizer",
    "find_components",
    "fit_head",
    "forecast_finetuning",
    "load_adapter",
    "load_pretrained",
    "measure_plasticity",
    "register_architecture",
    "register_criterion",
]

register_when_peft_is_imported()
