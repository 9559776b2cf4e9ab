"""What fitting a head in closed form found; see `plasticity_peft.fit_head`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from plasticity_peft.constraints import STRICT, one_of

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
"""Values of `config.problem_type` in transformers."""


@dataclass(frozen=True)
class HeadFit:
    """What `fit_head` found.

    Examples:
        >>> found = HeadFit("single_label_classification", score=0.684, loss=0.91, penalty=31.6, temperature=4.1,
        ...                 images=640, features=96, outputs=10)
        >>> print(found)
        head fitted on 640 images: leave-one-out accuracy 68.4 %
    """

    problem_type: Annotated[str, one_of(PROBLEM_TYPES)]
    """"single_label_classification", "multi_label_classification" or "regression", as in transformers."""
    score: float
    """Leave-one-out accuracy (of single labels, or mean over the labels of a multi-label problem), from 0 to 1; R
    squared of a regression. It is the score of a linear probe, which finetuning has to beat."""
    loss: float
    """Leave-one-out cross-entropy in nats per image, or mean squared error of a regression."""
    penalty: float
    """Penalty of ridge regression on standardized features."""
    temperature: float
    """Factor of the logits that fits the cross-entropy; 1 for a regression."""
    images: int
    """Number of images that the head was fitted on."""
    features: int
    """Number of features that the head receives."""
    outputs: int
    """Number of outputs of the head."""

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT

    @property
    def metric(self) -> str:
        """Name of `score`: "accuracy" or "R squared"."""
        return "R squared" if self.problem_type == "regression" else "accuracy"

    def __str__(self) -> str:
        score = f"{self.score:.3f}" if self.problem_type == "regression" else f"{100 * self.score:.1f} %"
        return f"head fitted on {self.images} images: leave-one-out {self.metric} {score}"
