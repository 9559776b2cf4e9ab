"""A score, of one component or of one kind: mean and spread over what a criterion observed."""

from __future__ import annotations

from dataclasses import dataclass

from plasticity_peft.components.component import Component


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score, which has no unit, and how well what was observed determines it.

    It is the mean over pairs of images, for a criterion that looks at pairs; `PlasticityReport.observed` tells.
    """

    mean: float
    std: float
    """Sample standard deviation over pairs."""
    pairs: int
    """How many pairs; 0 for a criterion that reads only weights, whose scores are exact."""

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`: std / sqrt(pairs)."""
        return float(self.std / self.pairs**0.5) if self.pairs else 0.0


@dataclass(frozen=True, kw_only=True)
class Score(Estimate, Component):
    """The plasticity of one component."""


@dataclass(frozen=True, kw_only=True)
class KindScore(Estimate):
    """The plasticity of a kind: the mean over its blocks. `std` is over pairs of the per-pair mean over blocks.

    Blocks share their pairs, so that the standard error is not that of independent blocks.
    """

    kind: str
