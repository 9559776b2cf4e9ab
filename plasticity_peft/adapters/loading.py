"""`load_adapter`: loads an adapter onto a base model, also if transformers has renamed modules since it was saved.

PEFT finds modules by their names. So a copy of the adapter is written with the module names of the given model, and
PEFT loads the copy. `load_pretrained`, in `pretrained.py`, loads the base model as well.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from math import isclose
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import nn

from plasticity_peft.adapters.chosen import labels_of
from plasticity_peft.adapters.config import CHOSEN_FOR_THE_USER, PlasticityConfig
from plasticity_peft.adapters.model import NO_TARGET_MODULES
from plasticity_peft.adapters.other_heads import left_out, own_heads, warn_of_left_out
from plasticity_peft.adapters.peft_model import PlasticityPeftModel
from plasticity_peft.adapters.rollback import restored_on_failure
from plasticity_peft.checks import shown
from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import AdapterError, PlasticityError, ReportError
from plasticity_peft.hub import CONFIG_NAME, WEIGHTS_NAME, find_file, find_json
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.saved.layers import Layer, write_layers
from plasticity_peft.saved.options import AdapterOptions, read_options
from plasticity_peft.saved.record import AdapterDescription, AdapterRecord, reading_record
from plasticity_peft.saved.weights import fitting, read_shapes, read_weights


def load_adapter(
    model: nn.Module,
    folder_or_repo: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    backbone: str | None = None,
    ignore_mismatched_sizes: bool = False,
    **hub: Any,
) -> PeftModel:
    """Returns `model` with a saved adapter, also if the adapter was saved with another release of transformers.

    This function works like `PeftModel.from_pretrained`, for adapters of this package in both training modes and for
    plain LoRA adapters of vision transformers. transformers renamed the modules of ViT (5.9), DINOv2 (5.18) and
    others, and PEFT does not find renamed modules. This function identifies every module by its canonical id. It reads
    only JSON and safetensors.

    Args:
        model: a vision transformer as in `find_components`, with a head for as many labels as the adapter's, or a
            PeftModel, which gets a further adapter. It is changed in place.
        folder_or_repo: a folder with adapter_config.json and adapter_model.safetensors, or "user/repo" on the Hub.
        adapter_name: name of the adapter in the model.
        is_trainable: True to train the adapter further.
        backbone: path of the vision transformer in a model that contains several.
        ignore_mismatched_sizes: True to leave out, with a warning, a head that does not fit the model because the
            model has another number of labels or no head. The model keeps its own head.
        hub: `revision`, `token`, `subfolder`, `cache_dir` and other options of `huggingface_hub.hf_hub_download`.

    Raises:
        AdapterError: the adapter does not exist, is not LoRA, or does not fit the model. The message names the module.
        ReportError: the plasticity.json of the adapter is damaged, or is of another architecture.
        ModelError: see `find_components`.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from plasticity_peft import PlasticityConfig
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=8, patch_size=4)
        >>> model = get_peft_model(ViTForImageClassification(config), PlasticityConfig(criterion="bound"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = load_adapter(ViTForImageClassification(config), folder)
        >>> loaded.peft_config["default"].selection.units == model.peft_config["default"].selection.units
        True
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_name(adapter_name, model.peft_config if isinstance(model, PeftModel) else {})
    _check_subfolder(hub.get("subfolder"))
    architecture = find_architecture(base, backbone)
    source = os.fspath(folder_or_repo)
    config = read_config(source, **hub)
    record = AdapterRecord.find(source, **hub)
    report = adapter = None
    if record is not None:
        report = record.report
        report.check_matches(architecture.model_type, architecture.components)
        with reading_record(source):
            adapter = record.described()
    options = read_options(config, source)
    components = report.scores if report else ()
    path = _weights_file(source, hub)
    # Shapes are validated before any weight is read.
    shapes = read_shapes(path, source)
    left = left_out(shapes, options, base, architecture, components) if ignore_mismatched_sizes else {}
    shapes = {key: value for key, value in shapes.items() if key not in left}
    fitting(shapes, options, base, architecture, components, source)
    weights = {key: value for key, value in read_weights(path, source).items() if key in shapes}
    renamed = fitting(weights, options, base, architecture, components, source)
    warn_of_left_out(left, source, base)
    if adapter is not None:
        with reading_record(source):
            adapter = check_description(adapter, architecture, renamed)
    with tempfile.TemporaryDirectory() as folder, restored_on_failure(model), _named(source):
        _write_renamed(folder, options, renamed, own_heads(base, left))
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
            loaded = model
        else:
            loaded = PlasticityPeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable)
        if report is not None and adapter is not None:
            lora = loaded.peft_config[adapter_name]
            adapter = replace(adapter, id2label=labels_of(base)) if left else adapter
            loaded.peft_config[adapter_name] = resolved_config(lora, report, adapter, architecture, base)
    return loaded


def _write_renamed(
    folder: str, options: AdapterOptions, renamed: Mapping[str, Layer], heads: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    """Writes an adapter with its new names, and with the heads that the model keeps, so that PEFT can load it."""
    Path(folder, CONFIG_NAME).write_text(json.dumps(_config(options, renamed, heads)), encoding="utf-8")
    content = write_layers(renamed) | {key: value for head in heads.values() for key, value in head.items()}
    save_file(content, Path(folder, WEIGHTS_NAME), metadata={"format": "pt"})


def _check_name(adapter_name: str, taken: Mapping[str, Any]) -> None:
    """Raises AdapterError for a name that PEFT, torch or the file system cannot use."""
    if adapter_name in taken:
        raise AdapterError(f"The model already has an adapter {adapter_name!r}. Give another adapter_name.")
    usable = isinstance(adapter_name, str) and adapter_name.isprintable() and not set(adapter_name) & set("./\\")
    if not usable or not adapter_name.strip() or hasattr(nn.ModuleDict(), adapter_name) or adapter_name in "lora_":
        raise AdapterError(
            "adapter_name must not contain '.', '/' or '\\', be the name of an attribute of torch.nn.ModuleDict, or "
            f"be a part of 'lora_'. Got {shown(adapter_name)}."
        )


def _check_subfolder(subfolder: object) -> None:
    if subfolder is None:
        return
    if not isinstance(subfolder, str) or os.path.isabs(subfolder) or ".." in re.split(r"[/\\]", subfolder):
        raise AdapterError(f"subfolder must lie within the folder or repository. Got {shown(subfolder)}.")


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Inside, an error of PEFT while it loads an adapter becomes an AdapterError."""
    try:
        yield
    except PlasticityError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise AdapterError(f"PEFT cannot load {source}: {type(error).__name__}: {error}") from error


def read_config(source: str, **hub: Any) -> dict[str, Any]:
    """Returns the content of adapter_config.json.

    Raises:
        AdapterError: the file does not exist, or is not that of a LoRA adapter.
    """
    config = find_json(source, CONFIG_NAME, AdapterError, **hub)
    if config is None:
        raise AdapterError(f"No {CONFIG_NAME} in {source}. It is not an adapter.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{source}: only adapters with peft_type LORA can be loaded. Got {config.get('peft_type')!r}."
        )
    return config


def _weights_file(source: str, hub: Mapping[str, Any]) -> Path:
    path = find_file(source, WEIGHTS_NAME, AdapterError, **hub)
    if path is None:
        raise AdapterError(f"No {WEIGHTS_NAME} in {source}. Weights in other formats, such as pickles, are not read.")
    return path


def _config(options: AdapterOptions, layers: Mapping[str, Layer], others: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the LoRA config of an adapter with its new names. It contains the full path of every module.

    Args:
        options: options of the adapter's config.
        layers: layers of the adapter.
        others: paths of further modules that train in full.
    """
    lora = {path: layer for path, layer in layers.items() if layer.lora}
    alphas = {
        path: layer.scaling * (layer.rank**0.5 if options.use_rslora else layer.rank) for path, layer in lora.items()
    }
    return {
        "peft_type": "LORA",
        **asdict(options),
        "target_modules": sorted(lora) or NO_TARGET_MODULES,
        "modules_to_save": sorted({*others, *(p.removesuffix(x.inside) for p, x in layers.items() if x.full)}) or None,
        "rank_pattern": {path: layer.rank for path, layer in lora.items() if layer.rank != options.r},
        "alpha_pattern": {
            path: float(f"{value:.12g}")
            for path, value in alphas.items()
            if not isclose(value, options.lora_alpha, rel_tol=1e-9)
        },
    }


def check_description(
    description: AdapterDescription, architecture: Architecture, layers: Mapping[str, Layer]
) -> AdapterDescription:
    """Returns the description with the module names of this model.

    Args:
        description: the description in the plasticity.json of the adapter.
        architecture: the model that gets the adapter.
        layers: layers of the adapter, by the module paths of the model.

    Raises:
        ReportError: the description does not fit `architecture` or `layers`.
    """
    here = {component.id: component.modules for component in architecture.components}
    unknown = [name for name in description.components if name not in here]
    if unknown:
        raise ReportError(f"adapter.components must be components of the model, got {shown(unknown[0])}")
    if not set(description.units) <= set(here if description.granularity == "component" else KINDS):
        raise ReportError(
            f"adapter.units must be of granularity {description.granularity!r}, got {shown(description.units)}"
        )
    modules = tuple(path for name in description.components for path in here[name])
    trained = {path for paths in here.values() for path in paths if path in layers}
    if trained != set(modules):
        other = min(trained ^ set(modules))
        raise ReportError(f"adapter.components must be the components in the weights, which differ in {other}")
    return replace(description, modules=modules)


def resolved_config(
    lora: PeftConfig,
    report: PlasticityReport,
    adapter: AdapterDescription,
    architecture: Architecture,
    model: nn.Module,
) -> PlasticityConfig:
    """Returns the config with which the adapter was saved, with the module names of this model."""
    here = {component.id: component for component in architecture.components}
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
        granularity=adapter.granularity,
        training=adapter.training,
        top_k=len(adapter.units),
    )
    config.resolve(model, report, adapter.selection, **chosen, id2label=adapter.id2label)
    return config
