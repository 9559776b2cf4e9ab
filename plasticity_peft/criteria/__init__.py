"""The criteria: one short file each, with its formula and its source.

To add a criterion, pass a subclass of `Criterion`, or of `WeightCriterion` if it needs no images, to
`register_criterion`. `CRITERIA` (in `registry`) contains all criteria by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
