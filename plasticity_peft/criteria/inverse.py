"""The paper's ranking turned round: what it trains should finetune worst, if the paper's measure tells anything.

The score is 1 / mean(rate of change). A criterion is judged beside its inverse, as PLoP's authors did with theirs.
"""

from __future__ import annotations

from plasticity_peft.criteria.rate_of_change import RateOfChange


class Inverse(RateOfChange):
    """Smooth components first."""

    name = "inverse"
    title = "1 / rate of change"
    power = -1.0
