"""Depth estimation: finetune the components of a backbone that are worth it, and the decoder in full.

    python examples/tasks/depth.py
    python examples/tasks/depth.py --model_name_or_path depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf \
        --dataset_name path/to/dataset
    python examples/tasks/depth.py --model_name_or_path Intel/dpt-large --inverse true --dataset_name path/to/dataset

A dataset has the columns "image" and "depth_map", an image of distances, in meters or another unit, in which 0 means
unknown. The metrics are the mean relative error, and the share of pixels that are off by a factor below 1.25. DPT and
Depth Anything have no loss in transformers, so the Trainer here computes the scale-invariant logarithmic loss of Eigen
et al. (arXiv 1406.2283).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scenes
import small_models
import torch
from peft import get_peft_model
from running import TaskArguments, finish, optimizer_for, parse
from torch import nn
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForDepthEstimation, Trainer, default_data_collator
from transformers.trainer_utils import EvalPrediction

NEAREST = 1e-3
"""Smallest distance that a prediction stands for."""
LAMBDA = 0.5
"""How much of a common factor of all predictions is forgiven: 1 is all of it."""


@dataclass
class DepthArguments(TaskArguments):
    """What a prediction of the model stands for."""

    inverse: bool = field(
        default=False,
        metadata={"help": "The model predicts the inverse of the depth, as those of relative depth do."},
    )


class DepthTrainer(Trainer):
    """A Trainer with the loss that the models lack."""

    inverse = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: object
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss, and the distances that the model predicts."""
        labels = inputs["labels"]
        found = model(pixel_values=inputs["pixel_values"]).predicted_depth
        found = interpolate(found[:, None], size=labels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        depth = (1 / found.clamp(min=NEAREST) if self.inverse else found).clamp(min=NEAREST)
        known = labels > 0
        errors = depth[known].log() - labels[known].log()
        loss = (errors.square().mean() - LAMBDA * errors.mean().square()).clamp(min=1e-9).sqrt()
        return (loss, {"loss": loss, "depth": depth}) if return_outputs else loss


def errors(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the mean relative error, and the share of pixels within a factor of 1.25."""
    known = prediction.label_ids > 0
    found, depth = prediction.predictions[known], prediction.label_ids[known]
    within = np.maximum(found / depth, depth / found) < 1.25
    return {"abs_rel": float((np.abs(found - depth) / depth).mean()), "delta_1_25": float(within.mean())}


def main() -> None:
    """Measures, trains, evaluates and saves."""
    task, arguments = parse("depth", DepthArguments)
    arguments.label_names = ["labels"]
    train, test = task.load(scenes.depth)
    name = task.base(small_models.depth_estimator, arguments.output_dir)
    processor = AutoImageProcessor.from_pretrained(name)

    def transform(batch: dict[str, list]) -> dict[str, torch.Tensor]:
        pixels = processor(images=[image.convert("RGB") for image in batch["image"]], return_tensors="pt")
        maps = [torch.tensor(np.asarray(depth, dtype=np.float32))[None, None] for depth in batch["depth_map"]]
        size = pixels["pixel_values"].shape[-2:]
        return {**pixels, "labels": torch.cat([interpolate(depth, size=size) for depth in maps])[:, 0]}

    train, test = train.with_transform(transform), test.with_transform(transform)
    model = get_peft_model(AutoModelForDepthEstimation.from_pretrained(name), task.configure(train))
    trainer = DepthTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=errors,
        optimizers=(optimizer_for(model, arguments), None),
    )
    trainer.inverse = task.inverse
    before = trainer.evaluate()
    trainer.train()
    finish(trainer, before, trainer.evaluate(), "abs_rel", "delta_1_25")


if __name__ == "__main__":
    main()
