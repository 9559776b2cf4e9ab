"""From data to samples: a criterion looks at pairs of images, at single images or at batches of images.

Which images a sample contains depends on the seed alone, not on the number of processes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
