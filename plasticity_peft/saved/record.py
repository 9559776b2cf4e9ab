"""What plasticity.json says of the adapter beside it: written, and read back with care, here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from plasticity_peft.checks import GRANULARITIES, TRAINING_MODES, check_choice
from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.report.selection import Selection

KEY = "adapter"
"""Where it stands in plasticity.json, beside the fields of the report."""


@dataclass(frozen=True)
class AdapterDescription:
    """What an adapter trains, and how."""

    training: str
    """"lora" or "full"."""
    selection: Selection
    id2label: dict[int, str] | None
    """Names of the labels; None for a model without a head."""

    def to_dict(self) -> dict[str, Any]:
        """Returns values that JSON can hold."""
        return {"training": self.training, **asdict(self.selection), "id2label": self.id2label}

    @classmethod
    def from_file(cls, values: Mapping[str, Any], name: str) -> AdapterDescription:
        """Returns what a file of the given name, which holds `values`, says of the adapter beside it.

        Raises:
            ReportError: it says nothing of an adapter, or not in the right form.

        Examples:
            >>> AdapterDescription.from_file({"scores": []}, "plasticity.json")
            Traceback (most recent call last):
            plasticity_peft.errors.ReportError: Cannot read plasticity.json: it does not say what the adapter trains.
        """
        from pydantic import TypeAdapter, ValidationError

        described = values.get(KEY)
        if not isinstance(described, Mapping):
            raise ReportError(f"Cannot read {name}: it does not say what the adapter trains.")
        try:
            selection = TypeAdapter(Selection).validate_python(described)
            labels = TypeAdapter(dict[int, str] | None).validate_python(described.get("id2label"))
            check_choice(f"{KEY}.training", described.get("training"), TRAINING_MODES)
            check_choice(f"{KEY}.granularity", selection.granularity, GRANULARITIES)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (KEY, *first["loc"])))
            raise ReportError(f"Cannot read {name}: {place}: {first['msg']}") from None
        except ConfigError as error:
            raise ReportError(f"Cannot read {name}: {error}") from None
        if not selection.units or set(selection.parameters) != set(TRAINING_MODES):
            raise ReportError(f"Cannot read {name}: {KEY} must name units, and parameters of {TRAINING_MODES}.")
        return cls(described["training"], selection, labels)
