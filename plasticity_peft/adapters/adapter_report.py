"""What the plasticity.json beside an adapter says of it: checked against its weights, and made a config again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from peft import LoraConfig, PeftConfig

from plasticity_peft.adapters.config import CHOSEN_FOR_THE_USER, PlasticityConfig
from plasticity_peft.checks import shown
from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ReportError
from plasticity_peft.hub import REPORT_NAME
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.saved.record import AdapterDescription
from plasticity_peft.saved.renames import Layer


def check_description(
    description: AdapterDescription, architecture: Architecture, layers: Mapping[str, Layer]
) -> AdapterDescription:
    """Returns the description with the module names of this model. Raises ReportError where it does not fit `layers`.

    Args:
        description: what plasticity.json says of the adapter.
        architecture: the model that gets the adapter.
        layers: what the adapter holds for each module of the model.
    """
    selection = description.selection
    here = {part.id: part.modules for part in architecture.components}
    unknown = [name for name in selection.components if name not in here]
    if unknown:
        raise ReportError(f"Cannot read {REPORT_NAME}: adapter.components names {unknown[0]}, which the model lacks.")
    if not set(selection.units) <= set(here if selection.granularity == "block" else KINDS):
        raise ReportError(
            f"Cannot read {REPORT_NAME}: adapter.units {shown(selection.units)} are no units of granularity "
            f"{selection.granularity!r}."
        )
    modules = tuple(path for name in selection.components for path in here[name])
    trained = {path for paths in here.values() for path in paths if path in layers}
    if trained != set(modules):
        other = min(trained ^ set(modules))
        raise ReportError(f"Cannot read {REPORT_NAME}: adapter.components and the weights differ in {other}.")
    return replace(description, selection=replace(selection, modules=modules))


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
