"""Video classification: finetune the components of a video transformer that are worth it, and its head.

    python examples/tasks/video.py
    python examples/tasks/video.py --model_name_or_path MCG-NJU/videomae-base --dataset_name path/to/dataset \
        --per_device_train_batch_size 4

A dataset has the columns "frames", a list of images for each video, and "label". Of a longer video, as many frames as
the model takes are used, at equal distances. The metric is the accuracy.
"""

from __future__ import annotations

import numpy as np
import scenes
import small_models
import torch
from peft import get_peft_model
from running import finish, optimizer_for, parse
from transformers import AutoImageProcessor, AutoModelForVideoClassification, Trainer, default_data_collator
from transformers.trainer_utils import EvalPrediction


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    """Measures, trains, evaluates and saves."""
    task, arguments = parse("video")
    train, test = task.load(scenes.video)
    name = task.base(small_models.video_classifier, arguments.output_dir)
    processor = AutoImageProcessor.from_pretrained(name)
    labels = train.features["label"].names
    model = AutoModelForVideoClassification.from_pretrained(
        name,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )

    def transform(batch: dict[str, list]) -> dict[str, torch.Tensor | list[int]]:
        videos = []
        for frames in batch["frames"]:
            chosen = np.linspace(0, len(frames) - 1, model.config.num_frames).round().astype(int)
            videos.append([frames[number].convert("RGB") for number in chosen])
        pixels = [processor(video, return_tensors="pt")["pixel_values"][0] for video in videos]
        return {"pixel_values": torch.stack(pixels), "labels": batch["label"]}

    train, test = train.with_transform(transform), test.with_transform(transform)
    config = task.configure(train, fit_head=True)
    model = get_peft_model(model, config)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=accuracy,
        optimizers=(optimizer_for(model, arguments), None),
    )
    before = trainer.evaluate()
    trainer.train()
    finish(trainer, before, trainer.evaluate(), "accuracy")


if __name__ == "__main__":
    main()
