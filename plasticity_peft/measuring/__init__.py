"""The measurement: samples go through a model and a criterion until the selection is settled, on all processes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
