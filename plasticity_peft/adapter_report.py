"""What the plasticity.json beside an adapter says of it: checked against its weights, and made a config again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig

from plasticity_peft.architectures import Architecture
from plasticity_peft.checks import GRANULARITIES, TRAINING_MODES, shown
from plasticity_peft.components import KINDS
from plasticity_peft.config import CHOSEN_FOR_THE_USER, PlasticityConfig
from plasticity_peft.errors import ReportError
from plasticity_peft.hub import REPORT_NAME
from plasticity_peft.renames import Layer
from plasticity_peft.report import PlasticityReport
from plasticity_peft.selection import Selection


@dataclass
class _Labels:
    id2label: dict[int, str] | None


class AdapterDescription(NamedTuple):
    """What plasticity.json says of the adapter beside it."""

    selection: Selection
    training: str
    id2label: dict[int, str] | None


def describe(described: Any, architecture: Architecture, layers: Mapping[str, Layer]) -> AdapterDescription:
    """Returns what plasticity.json says of the adapter that holds `layers`. Raises ReportError where it is wrong."""
    from pydantic import TypeAdapter, ValidationError

    adapter = described.get("adapter")
    if not isinstance(adapter, Mapping):
        raise ReportError(f"Cannot read {REPORT_NAME}: it does not say what the adapter trains.")
    try:
        selection = TypeAdapter(Selection).validate_python({**adapter, "modules": ()})
        labels = TypeAdapter(_Labels).validate_python({"id2label": adapter.get("id2label")}).id2label
    except ValidationError as error:
        first = error.errors()[0]
        raise ReportError(f"Cannot read {REPORT_NAME}: adapter.{first['loc'][0]}: {first['msg']}") from None
    training = adapter.get("training", "lora")
    _check_choice(selection, training, architecture)
    here = {part.id: part.modules for part in architecture.components}
    modules = tuple(path for name in selection.components for path in here[name])
    trained = {path for paths in here.values() for path in paths if path in layers}
    if trained != set(modules):
        other = min(trained ^ set(modules))
        raise ReportError(f"Cannot read {REPORT_NAME}: adapter.components and the weights differ in {other}.")
    return AdapterDescription(replace(selection, modules=modules), training, labels)


def _check_choice(selection: Selection, training: object, architecture: Architecture) -> None:
    ids = [part.id for part in architecture.components]
    unknown = [name for name in selection.components if name not in ids]
    if unknown:
        raise ReportError(f"Cannot read {REPORT_NAME}: adapter.components names {unknown[0]}, which the model lacks.")
    units = set(ids if selection.granularity == "block" else KINDS)
    known = isinstance(training, str) and training in TRAINING_MODES and selection.granularity in GRANULARITIES
    if not known or not selection.units or not set(selection.units) <= units:
        raise ReportError(
            f"Cannot read {REPORT_NAME}: adapter has granularity {shown(selection.granularity)}, units "
            f"{shown(selection.units)} and training {shown(training)}, which do not go together."
        )


def resolved_config(
    lora: PeftConfig, report: PlasticityReport, adapter: AdapterDescription, architecture: Architecture
) -> PlasticityConfig:
    """Returns the config of an adapter of ours as it was when it was saved, with the names of this model."""
    here = {part.id: part for part in architecture.components}
    rows = tuple(
        replace(row, path=here[row.id].path, modules=here[row.id].modules, features=here[row.id].features)
        for row in report.scores
    )
    report = replace(report, scores=rows)
    options = {f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init}
    chosen = {name: options.pop(name) for name in ("target_modules", "modules_to_save")}
    config = PlasticityConfig(
        **{name: value for name, value in options.items() if name not in CHOSEN_FOR_THE_USER and name != "peft_type"},
        report=report,
        granularity=adapter.selection.granularity,
        training=adapter.training,
        top_k=len(adapter.selection.units),
    )
    config.resolve(report, adapter.selection, **chosen, id2label=adapter.id2label)
    return config
