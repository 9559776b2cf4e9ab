"""The part that works with PEFT: the config, the tuner and the adapted model, and loading of saved adapters.

Importing this package registers `PlasticityConfig` with PEFT.
"""

import lazy_loader

from plasticity_peft.adapters.model import register

register()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
