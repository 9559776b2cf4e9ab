"""Names that were replaced: the old ones are accepted, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, stacklevel: int) -> None:
    """Warns that `old` was replaced by `new`. `stacklevel` is that of `warnings.warn`, counted from the caller."""
    warnings.warn(
        f"{old} is deprecated and will be removed in a later release. Use {new} instead.",
        FutureWarning,
        stacklevel=stacklevel + 1,
    )


def renamed_attribute(owner: str, old: str, new: str) -> Any:
    """Returns a property that reads the attribute `new` of a class under its old name, with a FutureWarning.

    Args:
        owner: name of the class.
        old: the old name of the attribute.
        new: the name of the attribute.
    """

    def read(instance: Any) -> Any:
        warn_renamed(f"{owner}.{old}", f"{owner}.{new}", stacklevel=2)
        return getattr(instance, new)

    return property(read, doc=f"Deprecated: use `{new}`.")


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Returns a decorator that accepts keyword arguments under their old names, with a FutureWarning.

    Args:
        names: the new name of each argument, by the old one.

    Raises:
        TypeError: when the function is called with both names of an argument.

    Examples:
        >>> import warnings
        >>> @renamed_arguments(pairs="max_samples")
        ... def measure(max_samples=1):
        ...     return max_samples
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     measure(pairs=3)
        3
        >>> print(caught[0].message)
        pairs is deprecated and will be removed in a later release. Use max_samples instead.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def accepting(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{function.__name__}() got both {old} and {new}, the same argument.")
                    warn_renamed(old, new, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(F, accepting)

    return decorate
