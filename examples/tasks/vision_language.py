"""A vision tower inside a language model: finetune the components of the tower that are worth it, and the projector.

    python examples/tasks/vision_language.py
    python examples/tasks/vision_language.py --model_name_or_path llava-hf/llava-1.5-7b-hf \
        --dataset_name path/to/dataset --bf16 true --per_device_train_batch_size 4

A dataset has the columns "image", "question" and "answer". The language model stays frozen, and so does all else that
--modules_to_save does not name. The loss is that of the answer alone. The metric is the share of test images for which
each token of the answer is the likeliest, after those before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import scenes
import small_models
import torch
from peft import get_peft_model
from running import TaskArguments, finish, optimizer_for, parse
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from transformers.trainer_utils import EvalPrediction

IGNORED = -100
"""Label of tokens that do not count."""


@dataclass
class VisionLanguageArguments(TaskArguments):
    """What trains beside the selected components, and how a question is asked."""

    backbone: str = field(default="model.vision_tower", metadata={"help": "Path of the vision tower in the model."})
    modules_to_save: list[str] = field(
        default_factory=lambda: ["multi_modal_projector"],
        metadata={"help": "Modules that train in full. All others, beside the selected components, stay frozen."},
    )
    prompt: str = field(
        default="USER: <image> {question} ASSISTANT:", metadata={"help": "The text before the answer, for the model."}
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of answers of which each token is right."""
    # The output at a token predicts the next one.
    found, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float(((found == labels) | (labels == IGNORED)).all(axis=1).mean())}


def main() -> None:
    """Measures, trains, evaluates and saves."""
    task, arguments = parse("vision_language", VisionLanguageArguments)
    train, test = task.load(scenes.questions)
    name = task.base(small_models.vision_language, arguments.output_dir)
    processor = AutoProcessor.from_pretrained(name)
    processor.tokenizer.padding_side = "right"

    def pixels(batch: dict[str, list]) -> dict[str, object]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {**batch, **processor.image_processor(images=images, return_tensors="pt"), "image": images}

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [task.prompt.format(question=item["question"]) for item in items]
        texts = [f"{prompt} {item['answer']}" for prompt, item in zip(prompts, items, strict=True)]
        images = [item["image"] for item in items]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        asked = processor(images=images, text=prompts, padding=True, return_tensors="pt")["attention_mask"].sum(dim=1)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        labels[torch.arange(labels.shape[1]) < asked[:, None]] = IGNORED
        return {**inputs, "labels": labels}

    def likeliest(output: torch.Tensor | tuple, _: torch.Tensor) -> torch.Tensor:
        return (output[0] if isinstance(output, tuple) else output).argmax(dim=-1)

    train, test = train.with_transform(pixels), test.with_transform(pixels)
    model = AutoModelForImageTextToText.from_pretrained(name)
    config = task.configure(train, backbone=task.backbone, modules_to_save=task.modules_to_save)
    model = get_peft_model(model, config)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        processing_class=processor,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=likeliest,
        optimizers=(optimizer_for(model, arguments, backbone=task.backbone), None),
    )
    before = trainer.evaluate()
    trainer.train()
    finish(trainer, before, trainer.evaluate(), "accuracy")


if __name__ == "__main__":
    main()
