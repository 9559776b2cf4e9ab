"""From a model to its components: which modules belong to which component, and how the model calls them.

`layouts` has the names of the layers of each architecture, `structure` validates them, and `architecture` combines the
two. To add an architecture, pass one `BlockLayout` to `register_architecture`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
