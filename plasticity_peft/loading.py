"""Adapters that were saved under other module names, loaded all the same.

PEFT finds modules by their names, and transformers renames modules. What PEFT gets from here is an adapter that says
the same under the names of the model at hand; the loading itself is PEFT's.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from plasticity_peft.architectures import Architecture, find_architecture, walk
from plasticity_peft.config import PlasticityConfig
from plasticity_peft.errors import AdapterError, ReportError
from plasticity_peft.hub import find_file, read_json
from plasticity_peft.renames import Layer, differing, read, rename, write
from plasticity_peft.report import REPORT_NAME, PlasticityReport
from plasticity_peft.selection import Selection

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
BY_NAME = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
"""Options that say by old names what the weights say too."""


def load_adapter(
    model: nn.Module,
    folder_or_repo: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    backbone: str | None = None,
    **hub: Any,
) -> PeftModel:
    """Returns `model` with an adapter that may have been saved under another release of transformers.

    Like `PeftModel.from_pretrained`, for adapters of this package in both training modes and for plain LoRA adapters
    of vision transformers. transformers renamed the modules of ViT (5.9), DINOv2 (5.18) and others, after which PEFT
    no longer finds what an adapter is for; here every module is known by its canonical id. Only JSON and safetensors
    are read.

    Args:
        model: a vision transformer as in `find_components`, with a head of as many labels as the adapter's, or a
            PeftModel, which then gets one adapter more. It is changed in place.
        folder_or_repo: a folder with adapter_config.json and adapter_model.safetensors, or "user/repo" on the Hub.
        adapter_name: name of the adapter in the model.
        is_trainable: whether it can be trained further.
        backbone: path of the vision transformer in a model that holds several.
        hub: `revision`, `token`, `subfolder`, `cache_dir` and other options of `huggingface_hub.hf_hub_download`.

    Raises:
        AdapterError: there is no such adapter, it is not LoRA, or it does not fit the model; the message names the
            module.
        ReportError: plasticity.json beside the adapter is damaged, or was made for another architecture.
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
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise AdapterError(f"The model has an adapter {adapter_name!r} already. Give another adapter_name.")
    architecture = find_architecture(base, backbone)
    source = os.fspath(folder_or_repo)
    config = read_config(source, **hub)
    described = read_json(source, REPORT_NAME, ReportError, optional=True, **hub)
    report = None
    if described is not None:
        report = PlasticityReport.from_dict(described)
        report.check_matches(architecture.model_type, architecture.components)
    layers = _layers(_weights(source, hub), config)
    modules = [path for path, _ in walk(base)]
    renamed = rename(layers, architecture, modules, report.scores if report else ())
    shapes = {
        f"{path}.{name}": value.shape
        for path, module in walk(base)
        for name, value in module.state_dict(keep_vars=True).items()
        if "." not in name
    }
    wrong = list(differing(renamed, shapes))
    if wrong:
        raise AdapterError(
            f"{source} does not fit this {type(base).__name__}: {'; '.join(wrong[:3])}. A head must have as many "
            "labels as the adapter's: give num_labels to the base model's from_pretrained."
        )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG_NAME).write_text(json.dumps(_config(config, renamed)), encoding="utf-8")
        save_file(write(renamed), Path(folder, WEIGHTS_NAME), metadata={"format": "pt"})
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
            loaded = model
        else:
            loaded = PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable)
    if report is not None and isinstance(described, Mapping):
        own = _resolved(loaded.peft_config[adapter_name], report, described.get("adapter"), architecture)
        loaded.peft_config[adapter_name] = own
    return loaded


def read_config(source: str, **hub: Any) -> dict[str, Any]:
    """Returns what adapter_config.json says.

    Raises:
        AdapterError: there is none, or it is not that of a LoRA adapter.
    """
    config = read_json(source, CONFIG_NAME, AdapterError, **hub)
    if config is None:
        raise AdapterError(f"{source} holds no {CONFIG_NAME}: it is no adapter.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{source}: only adapters with peft_type LORA can be loaded. Got {config.get('peft_type')!r}."
        )
    return config


def _weights(source: str, hub: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = find_file(source, WEIGHTS_NAME, AdapterError, **hub)
    if path is None:
        raise AdapterError(
            f"{source} holds no {WEIGHTS_NAME}. Weights in other formats, such as pickles, are not read."
        )
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"Cannot read {WEIGHTS_NAME} of {source}: {error}.") from error
    return weights


def _layers(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Layer]:
    """Returns what the adapter holds by old module path, with LoRA's scaling and the place within saved modules."""
    layers = read(weights)
    patterns = config.get("alpha_pattern") or {}
    saved = config.get("modules_to_save") or []
    for path, layer in layers.items():
        if layer.lora:
            alphas = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path))  # as in PEFT
            alpha = next(alphas, config.get("lora_alpha", 8))
            layer.scaling = alpha / (layer.rank**0.5 if config.get("use_rslora") else layer.rank)
        else:
            parts = path.split(".")
            above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            outer = next((name for name in above if any(name.endswith(each) for each in saved)), None)
            if outer is None:
                raise AdapterError(f"The adapter holds weights of {path}, and its config does not say that it trains.")
            layer.inside = path.removeprefix(outer)
    return layers


def _config(config: Mapping[str, Any], layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Returns the LoRA config of an adapter under new names: every module is named in full."""
    lora = {path: layer for path, layer in layers.items() if layer.lora}
    ranks = {path: layer.rank for path, layer in lora.items()}
    root = bool(config.get("use_rslora"))
    alphas = {path: layer.scaling * (layer.rank**0.5 if root else layer.rank) for path, layer in lora.items()}
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    return {
        **{key: value for key, value in config.items() if key not in BY_NAME},
        "target_modules": sorted(lora) or config.get("target_modules"),
        "modules_to_save": sorted({p.removesuffix(x.inside) for p, x in layers.items() if x.full}) or None,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {path: round(value, 9) for path, value in alphas.items() if abs(value - alpha) > 1e-9},
    }


def _resolved(
    lora: PeftConfig, report: PlasticityReport, adapter: Any, architecture: Architecture
) -> PlasticityConfig:
    """Returns the config of an adapter of ours as it was when it was saved, with the names of this model."""
    from pydantic import TypeAdapter, ValidationError

    here = {part.id: part for part in architecture.components}
    rows = tuple(
        replace(row, path=here[row.id].path, modules=here[row.id].modules, features=here[row.id].features)
        for row in report.scores
    )
    report = replace(report, scores=rows)
    if not isinstance(adapter, Mapping):
        raise ReportError(f"Cannot read {REPORT_NAME}: it does not say what the adapter trains.")
    try:
        selection = TypeAdapter(Selection).validate_python({**adapter, "modules": ()})
    except ValidationError as error:
        first = error.errors()[0]
        raise ReportError(f"Cannot read {REPORT_NAME}: adapter.{first['loc'][0]}: {first['msg']}") from None
    unknown = [name for name in selection.components if name not in here]
    if unknown:
        raise ReportError(f"Cannot read {REPORT_NAME}: adapter.components names {unknown[0]}, which the model lacks.")
    modules = tuple(path for name in selection.components for path in here[name].modules)
    labels = adapter.get("id2label")
    options = {f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init}
    chosen = {name: options.pop(name) for name in ("target_modules", "modules_to_save")}
    config = PlasticityConfig(
        **{name: value for name, value in options.items() if name not in BY_NAME and name != "peft_type"},
        report=report,
        granularity=selection.granularity,
        training=adapter.get("training", "lora"),
        top_k=len(selection.units),
    )
    config.resolve(
        report,
        replace(selection, modules=modules),
        **chosen,
        id2label={int(key): str(value) for key, value in labels.items()} if isinstance(labels, Mapping) else None,
    )
    return config
