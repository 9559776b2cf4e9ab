"""Writes small adapters, their logits and reports with the installed transformers, for tests under other releases.

    python -m tests.support.releases.make            adapters and reports, into a folder named after the release
    python -m tests.support.releases.make --bases    the base models too

Run it in an environment of each release: 4.57.6, 5.17.0 and 5.23.0 made what is here. The base models were made once,
with the oldest: files with the old names load everywhere.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from plasticity_peft import PlasticityConfig, find_components, measure_plasticity
from tests.support.measures import MEASURES
from tests.support.models import logits, moved, random_images

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    "num_labels": 3,
}  # fmt: skip
IMAGES = random_images()
WRITTEN: dict[str, dict[str, Any]] = {
    **MEASURES,
    "feature_norm": {"criterion": "feature_norm"},
    "bound": {"criterion": "bound"},
}
LAYERS = {
    # What PEFT's notebooks train, under the names of the release.
    "vit": ("query", "value", "q_proj", "v_proj"),
    "dinov2": ("query", "value", "q_proj", "v_proj"),
    "dinov2-swiglu": ("weights_in", "gate_proj", "up_proj"),
}


def make_bases() -> None:
    """Writes the base models."""
    models = {
        "vit": ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=32)),
        "dinov2": Dinov2ForImageClassification(Dinov2Config(**SIZES, mlp_ratio=2)),
        "dinov2-swiglu": Dinov2ForImageClassification(Dinov2Config(**SIZES, mlp_ratio=2, use_swiglu_ffn=True)),
    }
    for name, model in models.items():
        moved(model, seed=len(name), scale=0.3)
        model.save_pretrained(HERE / name)


def configs(name: str, model: nn.Module) -> dict[str, LoraConfig]:
    """Returns an adapter of each sort."""
    ours: dict[str, Any] = {"target_data": IMAGES, "max_samples": 8, "top_k": 3, "r": 2, "lora_alpha": 6}
    present = {path.rpartition(".")[2] for part in find_components(model) for path in part.modules}
    layers = [layer for layer in LAYERS[name] if layer in present]
    return {
        "lora": PlasticityConfig(**{"training": "lora", **ours}, candidates=("MHA", "FC1", "LN2")),
        "full": PlasticityConfig(**ours, candidates=("MHA", "FC1", "LN2"), training="full"),
        "plain": LoraConfig(
            r=2, lora_alpha=6, target_modules=layers, modules_to_save=["classifier"], use_rslora=True,
            rank_pattern={layers[-1]: 3}, alpha_pattern={layers[0]: 5}, bias="none",
        ),
        "dora": LoraConfig(r=2, target_modules=layers, modules_to_save=["classifier"], use_dora=True),
    }  # fmt: skip


def main() -> None:
    """Writes what the release at hand makes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", action="store_true", help="write the base models as well")
    if parser.parse_args().bases:
        make_bases()
    folder = HERE / f"transformers-{transformers.__version__}"
    shutil.rmtree(folder, ignore_errors=True)
    for name in LAYERS:
        base = AutoModelForImageClassification.from_pretrained(HERE / name).eval()
        for measure, options in WRITTEN.items():
            (folder / name / "reports").mkdir(parents=True, exist_ok=True)
            report = measure_plasticity(base, IMAGES, max_samples=8, **options)
            report.save(folder / name / "reports" / f"{measure}.json")
        for case in configs(name, base):
            model = AutoModelForImageClassification.from_pretrained(HERE / name).eval()
            adapted = get_peft_model(model, configs(name, model)[case]).eval()
            moved(adapted, seed=len(case), scale=0.3)
            for config in adapted.peft_config.values():
                config.base_model_name_or_path = name
            adapted.save_pretrained(folder / name / case)
            (folder / name / case / "README.md").unlink(missing_ok=True)
            save_file({"logits": logits(adapted)}, folder / name / case / "logits.safetensors")


if __name__ == "__main__":
    main()
