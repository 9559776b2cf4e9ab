from .criterion import Criterion as Criterion
from .criterion import Observations as Observations
from .criterion import WeightCriterion as WeightCriterion
from .registry import register_criterion as register_criterion
