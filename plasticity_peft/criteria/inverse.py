"""The paper's ranking reversed. If the paper's measure is informative, this ranking should select the worst
components.

The score is 1 / mean(rate of change). PLoP's authors also compare their criterion with its inverse.
"""

from __future__ import annotations

from plasticity_peft.criteria.rate_of_change import RateOfChange


class Inverse(RateOfChange):
    """Smooth components first."""

    name = "inverse"
    title = "1 / rate of change"
    power = -1.0
