"""`load_pretrained`: loads an adapter with its base model, head, image processor and the names of its labels.

`load_adapter`, in `loading.py`, loads an adapter onto a given base model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import transformers
from peft import PeftModel
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)

from plasticity_peft.adapters.loading import load_adapter, read_config
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.errors import AdapterError
from plasticity_peft.hub import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME, find_file
from plasticity_peft.saved.record import AdapterRecord, reading_record
from plasticity_peft.saved.weights import read_header

SHARED = ("token", "cache_dir", "local_files_only", "force_download")
"""Options of the Hub that also apply to the base model. `revision` and `subfolder` apply only to the adapter."""


class Pretrained(NamedTuple):
    """The return type of `load_pretrained`."""

    model: PeftModel
    """The base model with the adapter on it, in evaluation mode unless `is_trainable`."""
    image_processor: BaseImageProcessor
    """Turns images into the tensors that the model takes."""
    id2label: dict[int, str]
    """Names of the labels, as in `model.config.id2label`; empty for a model without a head."""


def load_pretrained(
    folder_or_repo: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    id2label: Mapping[int, str] | None = None,
    dtype: Any = None,
    device_map: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    is_trainable: bool = False,
    backbone: str | None = None,
    **hub: Any,
) -> Pretrained:
    """Returns (model, image_processor, id2label) of a saved or published adapter, ready for a pipeline.

    The base model is the one in adapter_config.json. It gets a head for the adapter's labels, and then the adapter, as
    in `load_adapter`. The image processor is the adapter's, or the base model's if the adapter has none.

    Args:
        folder_or_repo: the folder of an adapter, or "user/repo" on the Hub.
        base_model: folder or Hub name of the base model, if it has moved.
        id2label: names of the labels, if the adapter does not contain them. Adapters of this package do.
        dtype: dtype of the base model's weights, as in `from_pretrained`.
        device_map: devices of the base model's weights, as in `from_pretrained`.
        model_kwargs: other options of the base model's `from_pretrained`.
        is_trainable: True to train the adapter further.
        backbone: path of the vision transformer in a model that contains several.
        hub: `revision`, `token`, `subfolder`, `cache_dir` and other options of `huggingface_hub.hf_hub_download`.

    Raises:
        AdapterError: the adapter, the base model or the image processor does not exist, or they do not fit together.
        ReportError: the plasticity.json of the adapter is damaged, or is of another architecture.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline
        >>> from plasticity_peft import PlasticityConfig, load_pretrained
        >>> from PIL import Image
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=8, patch_size=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, adapter = Path(folder, "base"), Path(folder, "adapter")
        ...     ViTForImageClassification(config).save_pretrained(base)
        ...     _ = ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(base)
        ...     model = ViTForImageClassification.from_pretrained(base, id2label={0: "cat", 1: "dog"})
        ...     get_peft_model(model, PlasticityConfig(criterion="bound")).save_pretrained(adapter)
        ...     model, image_processor, id2label = load_pretrained(adapter)
        >>> classify = pipeline("image-classification", model=model, image_processor=image_processor)
        >>> sorted(answer["label"] for answer in classify(Image.new("RGB", (8, 8))))
        ['cat', 'dog']
    """
    source = os.fspath(folder_or_repo)
    config = read_config(source, **hub)
    base = os.fspath(base_model or config.get("base_model_name_or_path") or "")
    if not base:
        raise AdapterError(f"{CONFIG_NAME} of {source} does not name its base model. Give base_model.")
    labels = {int(key): str(value) for key, value in (id2label or {}).items()} or _labels(source, hub)
    labels = labels or {index: f"LABEL_{index}" for index in range(_width_of_head(source, hub))}
    options = {"dtype": dtype, "device_map": device_map, "revision": None if base_model else config.get("revision")}
    options |= {name: hub.get(name) for name in SHARED}
    if labels:
        options |= {"num_labels": len(labels), "id2label": labels, "ignore_mismatched_sizes": True}
        options["label2id"] = {label: index for index, label in labels.items()}
    given = {name: value for name, value in options.items() if value is not None}
    model = _base(_base_class(config), base, {**given, **(model_kwargs or {})}, source, backbone)
    adapted = load_adapter(model, source, is_trainable=is_trainable, backbone=backbone, **hub)
    return Pretrained(adapted, _image_processor(source, base, hub), labels)


def _base(
    base_class: Any, base: str, options: Mapping[str, Any], source: str, backbone: str | None
) -> PreTrainedModel:
    """Returns the base model. Only the weights of its head may differ in shape from the pretrained ones."""
    try:
        model, loading = base_class.from_pretrained(base, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"Cannot load {base}, the base model of {source}: {error}. Give base_model if it has moved."
        ) from error
    heads = tuple(f"{head}." for head in find_architecture(model, backbone).heads)
    for found in loading["mismatched_keys"]:
        key = found if isinstance(found, str) else found[0]  # transformers 5 gives the shapes too
        if not key.startswith(heads):
            raise AdapterError(f"{base} does not fit {type(model).__name__}: {key} has another shape there.")
    return cast(PreTrainedModel, model)


def _labels(source: str, hub: Mapping[str, Any]) -> dict[int, str]:
    """Returns the names of the labels in plasticity.json; empty if there are none."""
    record = AdapterRecord.find(source, **hub)
    if record is None:
        return {}
    with reading_record(source):
        return record.described().labels()


def _width_of_head(source: str, hub: Mapping[str, Any]) -> int:
    """Returns the number of labels of the adapter's head; 0 if it has no head."""
    path = find_file(source, WEIGHTS_NAME, AdapterError, **hub)
    if path is None:
        return 0
    # base_model.model.<head>.weight: heads are direct children of the model; other trained modules are deeper.
    header = read_header(path, source)
    heads = [entry.shape for key, entry in header.items() if key.count(".") == 3 and key.endswith(".weight")]
    widths = {shape[0] for shape in heads if len(shape) == 2}
    return widths.pop() if len(widths) == 1 else 0


def _base_class(config: Mapping[str, Any]) -> Any:
    """Returns the class of the base model that was trained, if it is a class of transformers."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if known else AutoModelForImageClassification


def _image_processor(source: str, base: str, hub: Mapping[str, Any]) -> BaseImageProcessor:
    shared = {name: hub[name] for name in SHARED if name in hub}
    for place, options in ((source, hub), (base, shared)):
        path = find_file(place, PROCESSOR_NAME, AdapterError, optional=True, **options)
        if path is not None:
            try:
                return cast(BaseImageProcessor, AutoImageProcessor.from_pretrained(path.parent))  # type: ignore[no-untyped-call]
            except (OSError, ValueError) as error:
                raise AdapterError(f"Cannot read {PROCESSOR_NAME} of {place}: {error}") from error
    raise AdapterError(
        f"No {PROCESSOR_NAME} in {source} or its base model {base}. Save the image processor with the adapter, or "
        "use load_adapter and your own image processor."
    )
