"""A score, of one component or of one kind: mean and spread over pairs of images."""

from __future__ import annotations

from dataclasses import dataclass

from plasticity_peft.components import Component


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean over pairs of a rate of change, which has no unit, and how well the pairs determine it."""

    mean: float
    std: float
    """Sample standard deviation over pairs."""
    pairs: int

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`: std / sqrt(pairs)."""
        return float(self.std / self.pairs**0.5)


@dataclass(frozen=True, kw_only=True)
class Score(Estimate, Component):
    """The plasticity of one component."""


@dataclass(frozen=True, kw_only=True)
class KindScore(Estimate):
    """The plasticity of a kind: the mean over its blocks. `std` is over pairs of the per-pair mean over blocks.

    Blocks share their pairs, so that the standard error is not that of independent blocks.
    """

    kind: str
