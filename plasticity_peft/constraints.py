"""Constraints on the fields of dataclasses that are read from files, and the function that reads them.

A constraint is part of the annotation of a field, such as `seed: Seed`. pydantic enforces it when a file is read, and
is imported only then. An object that this package makes itself is not validated again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Annotated, Any

from annotated_types import Interval, Len, Predicate

from plasticity_peft.checks import HIGHEST_SEED, shown
from plasticity_peft.errors import PlasticityError

STRICT: dict[str, bool] = {"strict": True, "allow_inf_nan": False}
"""`__pydantic_config__` of a dataclass: values must have exactly the annotated types, and numbers must be finite."""
HIGHEST_COUNT = 2**63 - 1


def allowed(words: str, accepts: Callable[[Any], object]) -> Predicate:
    """Returns the constraint that `accepts` is true of a value; `words`, "must be ...", are the message if not."""

    def check(value: Any) -> bool:
        if not accepts(value):
            raise ValueError(words)
        return True

    return Predicate(check)


def one_of(values: Collection[str]) -> Predicate:
    """Returns the constraint that a text is one of `values`."""
    return allowed(f"must be one of {', '.join(map(repr, values))}", lambda value: value in values)


PRINTABLE = allowed("must be printable text", str.isprintable)
"""Excludes characters that control the terminal on which the text is printed."""

Count = Annotated[int, Interval(ge=0, le=HIGHEST_COUNT)]
PositiveCount = Annotated[int, Interval(ge=1, le=HIGHEST_COUNT)]
Seed = Annotated[int, Interval(ge=0, le=HIGHEST_SEED)]
NonNegative = Annotated[float, Interval(ge=0)]
Confidence = Annotated[float, Interval(gt=0, lt=1)]
Text = Annotated[str, Len(0, 1000), PRINTABLE]
Name = Annotated[str, Len(1, 100), PRINTABLE]


def read_as(kind: Any, values: object, error: type[PlasticityError], place: str = "") -> Any:
    """Returns `values`, which a JSON file contained, as an object of the type `kind`.

    Keys that `kind` does not have are ignored.

    Args:
        kind: a dataclass whose annotations contain constraints, or a type made of such classes.
        values: what JSON can represent.
        error: class of the error if a value violates a constraint.
        place: position of `values` in the file, such as "adapter".

    Raises:
        error: a value is missing, of another type, or not allowed. The message contains the field, what is allowed
            and the value. It has no full stop at the end, so that it can become part of a sentence.

    Examples:
        >>> from dataclasses import dataclass
        >>> from plasticity_peft.errors import ReportError
        >>> @dataclass
        ... class Row:
        ...     seed: Seed
        >>> read_as(Row, {"seed": 3}, ReportError)
        Row(seed=3)
        >>> read_as(Row, {"seed": -1}, ReportError, "rows.2")
        Traceback (most recent call last):
            ...
        plasticity_peft.errors.ReportError: rows.2.seed must be greater than or equal to 0, got -1
    """
    from pydantic import ValidationError

    try:
        read = _reader(kind).validate_json(json.dumps(values))
        # Only now, so that the error for a field that is NaN contains its name.
        json.dumps(values, allow_nan=False)
    except ValidationError as reason:
        raise error(_in_words(reason.errors(), values, place)) from None
    except (TypeError, ValueError, RecursionError) as reason:
        raise error(f"{place or 'it'} cannot be represented in JSON: {reason}") from reason
    return read


@cache
def _reader(kind: Any) -> Any:
    """Returns the validator of a type, which takes longer to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _in_words(errors: Sequence[Mapping[str, Any]], values: object, place: str) -> str:
    """Returns the first error of pydantic as a message of this package."""
    path, first = _path(errors[0], values), errors[0]
    name = ".".join(filter(None, [place, *path]))
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] == "json_invalid":
        return f"{name or 'it'} cannot be read: {first['msg']}"
    # A union has one error for each of its types.
    requirements = dict.fromkeys(_requirement(error["msg"]) for error in errors if _path(error, values) == path)
    return f"{name} {' or '.join(requirements)}, got {shown(first['input'])}"


def _requirement(message: str) -> str:
    """Returns what pydantic requires: "must be ...".

    Examples:
        >>> _requirement("List should have at least 1 item after validation, not 0")
        'must have at least 1 item'
        >>> _requirement("Unable to parse input string as an integer")
        'is wrong: Unable to parse input string as an integer'
    """
    message = re.sub(r" after validation, not \d+$", "", message.removeprefix("Value error, "))
    message = re.sub(r"^\w+ should ", "must ", message)
    return message if message.startswith("must ") else f"is wrong: {message}"


def _path(error: Mapping[str, Any], values: object) -> list[str]:
    """Returns the keys that lead to the value of an error. What pydantic adds, such as the type in a union, is not."""
    path = []
    found: Any = values
    for step in error["loc"]:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            if error["type"] != "missing":
                continue
        name = str(step)
        path.append(name if name.isprintable() and len(name) <= 100 else shown(name))
    return path
