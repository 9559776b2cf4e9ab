"""The code in a model card, which loads the adapter with this package and without it."""

from __future__ import annotations

from plasticity_peft.saved.trained import TrainedAdapter

REPOSITORY = "user/repo"
"""Placeholder for the repository of the adapter, whose name is not known when the card is written."""

MOST_LABELS = 20
"""Number of labels that the code contains. If there are more, it reads them from plasticity.json."""


def stock_snippet(adapter: TrainedAdapter) -> str:
    """Returns code that loads the adapter without this package, and classifies an image if the model has a head."""
    return _classifier(adapter) if adapter.classifies_images else _features(adapter)


def own_snippet(adapter: TrainedAdapter) -> str:
    """Returns code that loads the adapter with this package."""
    subfolder = _subfolder(adapter)
    if not adapter.classifies_images:
        model = f"model = load_adapter(base, adapter{subfolder})"
        imports = [*_import_base(adapter), "from plasticity_peft import load_adapter"]
        return _lines(*_loaded_base(adapter, *imports), model)
    base = "" if adapter.hub_model else f', base_model="{_unknown(adapter)}"'
    return _lines(
        "from PIL import Image",
        "from plasticity_peft import load_pretrained",
        "from transformers import pipeline",
        "",
        f'model, image_processor, id2label = load_pretrained("{REPOSITORY}"{base}{subfolder})',
        'classify = pipeline("image-classification", model=model, image_processor=image_processor)',
        'print(classify(Image.open("image.png")))',
    )


def _classifier(adapter: TrainedAdapter) -> str:
    imports, id2label = _id2label(adapter)
    return _lines(
        *imports,
        "import torch",
        *_import_download(imports),
        "from peft import PeftModel",
        "from PIL import Image",
        "from transformers import AutoImageProcessor, AutoModelForImageClassification",
        "",
        f'base_model, adapter = "{adapter.hub_model or _unknown(adapter)}", "{REPOSITORY}"',
        id2label,
        *_labeled_base("AutoModelForImageClassification"),
        f"model = PeftModel.from_pretrained(base, adapter{_subfolder(adapter)}).eval()",
        *_image_processor(adapter),
        'inputs = image_processor(images=Image.open("image.png").convert("RGB"), return_tensors="pt")',
        "with torch.no_grad():",
        "    label = model(**inputs).logits.argmax(-1).item()",
        "print(id2label[label])",
    )


def _id2label(adapter: TrainedAdapter) -> tuple[list[str], str]:
    """Returns code that imports what code with the names of the labels needs, and this code."""
    labels = dict(adapter.id2label or {})
    if len(labels) <= MOST_LABELS:
        return [], f"id2label = {_literal(labels)}"
    return ["import json", ""], (
        f'with open(hf_hub_download(adapter, "plasticity.json"{_subfolder(adapter)})) as file:\n'
        '    id2label = {int(key): label for key, label in json.load(file)["adapter"]["id2label"].items()}'
    )


def _import_download(imports: list[str]) -> list[str]:
    return ["from huggingface_hub import hf_hub_download"] if imports else []


def _labeled_base(class_name: str) -> list[str]:
    """Returns code that loads a base model with a head for the labels."""
    return [
        f"base = {class_name}.from_pretrained(",
        "    base_model, id2label=id2label, label2id={label: i for i, label in id2label.items()},",
        "    ignore_mismatched_sizes=True,",
        ")",
    ]


def _image_processor(adapter: TrainedAdapter) -> list[str]:
    """Returns code that loads the adapter's image processor, or the base model's if the adapter has none."""
    own = f"image_processor = AutoImageProcessor.from_pretrained(adapter{_subfolder(adapter)})"
    if adapter.has_image_processor:
        return [own]
    # It may be saved after the card is written, as Trainer does.
    return [
        "try:",
        f"    {own}",
        "except OSError:  # the adapter has no image processor of its own",
        "    image_processor = AutoImageProcessor.from_pretrained(base_model)",
    ]


def _features(adapter: TrainedAdapter) -> str:
    model = f"model = PeftModel.from_pretrained(base, adapter{_subfolder(adapter)}).eval()"
    return _lines(*_loaded_base(adapter, "from peft import PeftModel", *_import_base(adapter)), model)


def _loaded_base(adapter: TrainedAdapter, *imports: str) -> list[str]:
    """Returns code that names the adapter and loads its base model."""
    if adapter.base_class is None:
        return [*imports, "", f'adapter = "{REPOSITORY}"', "base = ...  # the model that was adapted"]
    base = f'base_model, adapter = "{adapter.hub_model or _unknown(adapter)}", "{REPOSITORY}"'
    if not adapter.has_labels:
        return [*imports, "", base, f"base = {adapter.base_class}.from_pretrained(base_model)"]
    more, id2label = _id2label(adapter)
    return [*more, *_import_download(more), *imports, "", base, id2label, *_labeled_base(adapter.base_class)]


def _subfolder(adapter: TrainedAdapter) -> str:
    return "" if adapter.name == "default" else f', subfolder="{adapter.name}"'


def _import_base(adapter: TrainedAdapter) -> list[str]:
    return [f"from transformers import {adapter.base_class}"] if adapter.base_class else []


def _unknown(adapter: TrainedAdapter) -> str:
    """Returns a placeholder for a base model that is not on the Hub."""
    return f"path/to/the/{adapter.report.model_type}/that/was/adapted"


def _literal(labels: dict[int, str]) -> str:
    """Returns labels as Python code whose text cannot end the block of code or a comment around it."""
    return ascii(labels).replace("<!--", "\\x3c!--").replace("-->", "--\\x3e").replace("`", "\\x60")


def _lines(*lines: str) -> str:
    return "\n".join(lines)
