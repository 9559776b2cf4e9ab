"""What a score is: one short file for each criterion, and one line for it here."""

from __future__ import annotations

from plasticity_peft.checks import PROTOCOLS, check_choice
from plasticity_peft.criteria.bound import Bound
from plasticity_peft.criteria.chance import Random
from plasticity_peft.criteria.condition_number import ConditionNumber
from plasticity_peft.criteria.criterion import AnyCriterion
from plasticity_peft.criteria.feature_norm import FeatureNorm
from plasticity_peft.criteria.gradient_norm import GradientNorm
from plasticity_peft.criteria.inverse import Inverse
from plasticity_peft.criteria.parameter_plasticity import ParameterPlasticity
from plasticity_peft.criteria.rate_of_change import RateOfChange
from plasticity_peft.criteria.relative_gradient_norm import RelativeGradientNorm
from plasticity_peft.criteria.relative_rate_of_change import RelativeRateOfChange
from plasticity_peft.criteria.token_sensitivity import TokenSensitivity
from plasticity_peft.errors import ConfigError

CRITERIA: dict[str, AnyCriterion] = {
    criterion.name: criterion
    for criterion in (
        ParameterPlasticity(),
        RateOfChange(),
        RelativeRateOfChange(),
        TokenSensitivity(),
        Bound(),
        GradientNorm(),
        RelativeGradientNorm(),
        ConditionNumber(),
        FeatureNorm(),
        Inverse(),
        Random(),
    )
}
"""The values of `PlasticityConfig(criterion=...)`."""

DEFAULT = "parameter_plasticity"
"""What ranks where nobody says otherwise; the experiments that decided are in examples/results."""

PAPER = "rate_of_change"
"""The paper's measure."""


def resolve(criterion: str | None, inputs: str | None) -> tuple[str, str | None]:
    """Returns the name of the criterion, and its protocol where it has protocols.

    `inputs` alone asks for the paper's measure, whose protocol it names; with neither it is `DEFAULT`.

    Raises:
        ConfigError: one is unknown, or `inputs` is given with a criterion that has no protocols.

    Examples:
        >>> resolve(None, "activation")
        ('rate_of_change', 'activation')
        >>> resolve("rate_of_change", None)
        ('rate_of_change', 'embedding')
    """
    if inputs is not None:
        check_choice("inputs", inputs, PROTOCOLS)
    if criterion is None:
        criterion = DEFAULT if inputs is None else PAPER
    check_choice("criterion", criterion, tuple(CRITERIA))
    if getattr(CRITERIA[criterion], "protocols", False):
        return criterion, inputs or PROTOCOLS[0]
    if inputs is not None:
        having = ", ".join(repr(name) for name, found in CRITERIA.items() if getattr(found, "protocols", False))
        raise ConfigError(
            f"inputs says what components are fed by {having}; criterion={criterion!r} feeds them nothing. Leave "
            f"inputs out, or give one of these criteria. Got inputs={inputs!r}."
        )
    return criterion, None
