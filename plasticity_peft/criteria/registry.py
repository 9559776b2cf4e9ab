"""Criteria by name: the built-in ones, which are imported on first use, and those that users register.

The names are known without importing torch, so that the command line can list them.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar

from plasticity_peft.checks import PROTOCOLS, check_choice, is_number, shown
from plasticity_peft.errors import ConfigError

if TYPE_CHECKING:
    from plasticity_peft.criteria.criterion import AnyCriterion

_BUILT_IN = {
    "parameter_plasticity": "parameter_plasticity:ParameterPlasticity",
    "rate_of_change": "rate_of_change:RateOfChange",
    "relative_rate_of_change": "relative_rate_of_change:RelativeRateOfChange",
    "token_sensitivity": "token_sensitivity:TokenSensitivity",
    "bound": "bound:Bound",
    "gradient_norm": "gradient_norm:GradientNorm",
    "relative_gradient_norm": "relative_gradient_norm:RelativeGradientNorm",
    "condition_number": "condition_number:ConditionNumber",
    "feature_norm": "feature_norm:FeatureNorm",
    "inverse": "inverse:Inverse",
    "random": "chance:Random",
}
"""Module and class of each built-in criterion, by the name of the criterion."""

DEFAULT = "parameter_plasticity"
"""The criterion that ranks if none is given. examples/results/earlier has the experiments that decided this."""

PAPER = "rate_of_change"
"""The paper's measure."""


@cache
def _built_in(name: str) -> AnyCriterion:
    criterion: AnyCriterion = resolve_name(f"plasticity_peft.criteria.{_BUILT_IN[name]}")()
    return criterion


class _BuiltIn(Mapping[str, "AnyCriterion"]):
    """The built-in criteria. Each is imported when it is looked up."""

    def __getitem__(self, name: str) -> AnyCriterion:
        return _built_in(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_BUILT_IN)

    def __len__(self) -> int:
        return len(_BUILT_IN)

    def __contains__(self, name: object) -> bool:
        return name in _BUILT_IN


CRITERIA: ChainMap[str, AnyCriterion] = ChainMap({}, _BuiltIn())  # type: ignore[arg-type]
"""The values of `PlasticityConfig(criterion=...)`, by name. `del CRITERIA[name]` removes a registered criterion and
restores the built-in one that it replaced."""


def resolve(criterion: str | None, inputs: str | None) -> tuple[str, str | None]:
    """Returns the name of a criterion, and the protocol if the criterion has protocols.

    `inputs` alone selects the paper's measure. Without both, the criterion is `DEFAULT`.

    Raises:
        ConfigError: one is unknown, or `inputs` is given with a criterion without protocols.

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
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        names = ", ".join(map(repr, CRITERIA))
        raise ConfigError(
            f"criterion must be one of {names}, or a name that register_criterion added. Got {shown(criterion)}."
        )
    if CRITERIA[criterion].protocols:
        return criterion, inputs or PROTOCOLS[0]
    if inputs is not None:
        having = ", ".join(repr(name) for name in CRITERIA if CRITERIA[name].protocols)
        raise ConfigError(
            f"inputs selects what {having} feed to the components; criterion={criterion!r} feeds nothing to them. "
            f"Leave inputs out, or give one of these criteria. Got inputs={inputs!r}."
        )
    return criterion, None


C = TypeVar("C")


def register_criterion(criterion: C, *, replace: bool = False) -> C:
    """Adds a criterion, which is then known by its `name`.

    `PlasticityConfig` and `measure_plasticity` accept the name, and so does the command line with `--plugin`. A saved
    report can be loaded, shown and selected from without the criterion. Every process of a distributed run must
    register it.

    Args:
        criterion: a subclass of `Criterion` or `WeightCriterion` (of `plasticity_peft.criteria`) that can be created
            without arguments, or an instance of one.
        replace: True to replace a criterion of the same name.

    Returns:
        `criterion`, so that this can be used as the decorator of a class.

    Raises:
        ConfigError: it is not a criterion, one of its class attributes is not allowed, or the name is taken.

    Examples:
        >>> import torch
        >>> from plasticity_peft.criteria import WeightCriterion
        >>> @register_criterion
        ... class Size(WeightCriterion):
        ...     name = "size"
        ...     title = "number of parameters"
        ...
        ...     def score(self, model, architecture, *, image, seed):
        ...         return torch.tensor([float(part.parameters) for part in architecture.components]).double()
        >>> "size" in CRITERIA
        True
        >>> del CRITERIA["size"]
    """
    made = _instance(criterion)
    _check_attributes(made)
    known = CRITERIA.get(made.name)
    again = known is made or type(known) is criterion
    if known is not None and not again and not replace:
        raise ConfigError(
            f"The criterion {made.name!r} already exists. Choose another name, or give replace=True to replace it."
        )
    CRITERIA[made.name] = made
    return criterion


def _instance(criterion: object) -> AnyCriterion:
    from plasticity_peft.criteria.criterion import AnyCriterion, Criterion, WeightCriterion

    if isinstance(criterion, type) and issubclass(criterion, (Criterion, WeightCriterion)):
        try:
            return criterion()
        except TypeError as error:
            raise ConfigError(
                f"{criterion.__name__} cannot be created without arguments: {error}. Register an instance, or define "
                "the missing methods."
            ) from error
    if isinstance(criterion, AnyCriterion):
        return criterion
    raise ConfigError(
        f"criterion must be a Criterion or a WeightCriterion, as a class or as an instance. {_got(criterion)}"
    )


def _check_attributes(criterion: AnyCriterion) -> None:
    """Raises ConfigError unless the class attributes of a criterion are allowed."""
    from plasticity_peft.criteria.criterion import Criterion
    from plasticity_peft.images.sampler import Batches, Pairs, SingleImages

    name, title, sampler = (getattr(criterion, key, None) for key in ("name", "title", "sampler"))
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier() and len(name) <= 100):
        raise ConfigError(
            f"name of {type(criterion).__name__} must be ASCII letters, digits and underscores, such as "
            f"'output_norm'. {_got(name)}"
        )
    if not isinstance(title, str) or not (0 < len(title) <= 100 and title.isprintable()):
        raise ConfigError(
            f"title of {type(criterion).__name__} must be a few words, such as 'norm of the output'. {_got(title)}"
        )
    power: Any = criterion.power
    if not is_number(power) or not math.isfinite(power) or power == 0:
        raise ConfigError(f"power of {type(criterion).__name__} must be a finite number other than 0. {_got(power)}")
    samplers = (Pairs, SingleImages, Batches)
    if isinstance(criterion, Criterion) and not (isinstance(sampler, type) and issubclass(sampler, samplers)):
        raise ConfigError(
            f"sampler of {type(criterion).__name__} must be Pairs, SingleImages or Batches of "
            f"plasticity_peft.images. {_got(sampler)}"
        )


def _got(value: object) -> str:
    return f"Got {shown(value)}."
