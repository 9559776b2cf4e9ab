"""From scores to a ranking, a selection, a table and a picture. It does not need a model or torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
