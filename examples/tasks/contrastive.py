"""Contrastive learning of images and captions: finetune the components of a vision tower that are worth it.

    python examples/tasks/contrastive.py
    python examples/tasks/contrastive.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name path/to/dataset --modules_to_save visual_projection text_projection

A dataset has the columns "image" and "caption". Only components of the vision tower are ranked. All else stays frozen
unless --modules_to_save names it: the tower for texts is `text_model`, the projections of CLIP are `visual_projection`
and `text_projection`, and SigLIP ends in `vision_model.head` and `text_model.head`. The metric is the share of test
images whose own caption is the likeliest of all captions that occur.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import scenes
import small_models
import torch
from peft import get_peft_model
from running import TaskArguments, finish, optimizer_for, parse
from torch import nn
from transformers import AutoImageProcessor, AutoModelForZeroShotImageClassification, AutoTokenizer, Trainer


@dataclass
class ContrastiveArguments(TaskArguments):
    """What trains beside the selected components."""

    modules_to_save: list[str] = field(
        default_factory=lambda: ["text_model", "vision_model.head"],
        metadata={"help": "Modules that train in full. All others, beside the selected components, stay frozen."},
    )


@torch.no_grad()
def zero_shot(model: nn.Module, texts: dict[str, torch.Tensor], images: torch.Tensor, own: list[int]) -> float:
    """Returns the share of images whose own text, given by its number, is the likeliest."""
    batches = [model.eval()(pixel_values=part, **texts).logits_per_image.argmax(dim=1) for part in images.split(32)]
    return float((torch.cat(batches).cpu() == torch.tensor(own)).float().mean())


def main() -> None:
    """Measures, trains, evaluates and saves."""
    task, arguments = parse("contrastive", ContrastiveArguments)
    train, test = task.load(scenes.captions)
    name = task.base(small_models.image_and_text, arguments.output_dir)
    processor, tokenizer = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    def transform(batch: dict[str, list]) -> dict[str, list | torch.Tensor]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"], **batch}

    def tokens(captions: list[str]) -> dict[str, torch.Tensor]:
        padding = "max_length" if "siglip" in model.config.model_type else "longest"  # SigLIP has seen no other
        return dict(tokenizer(captions, padding=padding, truncation=True, return_tensors="pt"))

    def collate(items: list[dict]) -> dict[str, object]:
        images = torch.stack([item["pixel_values"] for item in items])
        return {"pixel_values": images, **tokens([item["caption"] for item in items]), "return_loss": True}

    def accuracy() -> dict[str, float]:
        device = next(model.parameters()).device
        texts = {name: value.to(device) for name, value in tokens(captions).items()}
        images = torch.stack([item["pixel_values"] for item in shown]).to(device)
        return {"eval_accuracy": zero_shot(model, texts, images, own)}

    captions = sorted(set(test["caption"]))
    own = [captions.index(caption) for caption in test["caption"]]
    train, shown = train.with_transform(transform), test.with_transform(transform)
    model = AutoModelForZeroShotImageClassification.from_pretrained(name)
    config = task.configure(train, backbone="vision_model", modules_to_save=task.modules_to_save)
    model = get_peft_model(model, config)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=shown,
        data_collator=collate,
        processing_class=processor,
        optimizers=(optimizer_for(model, arguments), None),
    )
    before = accuracy()
    trainer.train()
    tokenizer.save_pretrained(arguments.output_dir)
    finish(trainer, before, accuracy(), "accuracy")


if __name__ == "__main__":
    main()
