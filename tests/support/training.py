"""The ordinary Trainer on a few images whose label can be learnt."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from tests.support.models import random_images

IMAGES = random_images(24)


class Labelled(torch.utils.data.Dataset):
    """Images whose label can be learnt: which third of the brightness range their mean is in."""

    def __init__(self) -> None:
        means = IMAGES.mean(dim=(1, 2, 3))
        self.labels = (means.argsort().argsort() * 3 // len(IMAGES)).tolist()

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"pixel_values": IMAGES[index], "labels": self.labels[index]}


def trainer_of(model: torch.nn.Module, folder: Path, **options: object) -> Trainer:
    """Returns a Trainer over four epochs of six steps, with the settings that the README names."""
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "num_train_epochs": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
            "report_to": "none",
            "dataloader_pin_memory": False,
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        }
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Labelled(),
        eval_dataset=Labelled(),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of all that trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
