"""Semantic segmentation: finetune the components of a backbone that are worth it, and the decoder in full.

    python examples/tasks/segmentation.py
    python examples/tasks/segmentation.py --model_name_or_path nvidia/mit-b0 --num_labels 21 \
        --dataset_name path/to/dataset --per_device_train_batch_size 8

A dataset has the columns "image" and "label", an image in which each pixel is the number of its class; pixels of 255
do not count. The metric is the mean intersection over union (IoU) of the classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import scenes
import small_models
import torch
from peft import get_peft_model
from running import TaskArguments, finish, optimizer_for, parse
from sklearn.metrics import jaccard_score
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, Trainer, default_data_collator
from transformers.trainer_utils import EvalPrediction

IGNORED = 255
"""Class of pixels that do not count."""


@dataclass
class SegmentationArguments(TaskArguments):
    """The classes of the pixels."""

    num_labels: int | None = field(
        default=None, metadata={"help": "Number of classes, if the dataset has others than the model was made for."}
    )


def classes(output: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Returns the most likely class of each pixel of the labels; SegFormer's logits are smaller than its images."""
    logits = output[0] if isinstance(output, tuple) else output
    return interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1)


def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the mean over the classes that occur."""
    counted = prediction.label_ids != IGNORED
    labels, found = prediction.label_ids[counted], prediction.predictions[counted]
    return {"mean_iou": float(jaccard_score(labels, found, average="macro"))}


def main() -> None:
    """Measures, trains, evaluates and saves."""
    task, arguments = parse("segmentation", SegmentationArguments)
    train, test = task.load(scenes.segmentation)
    name = task.base(small_models.segmenter, arguments.output_dir)
    processor = AutoImageProcessor.from_pretrained(name)

    def transform(batch: dict[str, list]) -> dict[str, torch.Tensor]:
        images = [image.convert("RGB") for image in batch["image"]]
        return dict(processor(images=images, segmentation_maps=batch["label"], return_tensors="pt"))

    train, test = train.with_transform(transform), test.with_transform(transform)
    options = {} if task.num_labels is None else {"num_labels": task.num_labels, "ignore_mismatched_sizes": True}
    model = AutoModelForSemanticSegmentation.from_pretrained(name, **options)
    model = get_peft_model(model, task.configure(train))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=mean_iou,
        preprocess_logits_for_metrics=classes,
        optimizers=(optimizer_for(model, arguments, train), None),
    )
    before = trainer.evaluate()
    trainer.train()
    finish(trainer, before, trainer.evaluate(), "mean_iou")


if __name__ == "__main__":
    main()
