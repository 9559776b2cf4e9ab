"""What a score is: one short file per criterion, with its formula and its source.

A criterion of your own is a subclass of `Criterion`, or of `WeightCriterion` if it needs no images, given to
`register_criterion`. `CRITERIA` (in `registry`) has all criteria by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
