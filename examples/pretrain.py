"""Pretrain the small vision transformer of the demo on Fashion-MNIST, and write the files that train.py needs.

    apt-get install dataset-fashion-mnist     # 70,000 real images, MIT license python examples/pretrain.py

It writes `fashion-mnist-vit/`, the backbone with its image processor (without the head for Fashion-MNIST), and
`data/fashion_mnist.parquet`, 512 of the test images. The same command on the same machine gives the same weights.
Training is supervised: 60,000 images of 28 x 28 pixels, ten classes. The arguments are those of TrainingArguments and
the following.
"""

from __future__ import annotations

import gzip
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

HERE = Path(__file__).resolve().parent
LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
MEAN, STD = 0.5, 0.5
SAMPLES_KEPT = 512

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """The folder of the images and the folder of the results."""

    data_dir: str = field(
        default="/usr/share/datasets/fashion-mnist",
        metadata={"help": "Folder of the four IDX files: train-images-idx3-ubyte.gz and so on."},
    )
    destination: str = field(default=str(HERE), metadata={"help": "Folder to write the model and the data to."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most this many test images."})


@dataclass
class PretrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with the defaults that made the model of the demo."""

    output_dir: str | None = field(default=None, metadata={"help": "Not used: no checkpoint is kept."})
    num_train_epochs: float = field(default=7, metadata={"help": "Passes over the training images."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Images a step."})
    per_device_eval_batch_size: int = field(default=1000, metadata={"help": "Images a step in evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=300, metadata={"help": "Steps of warm-up."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing."})
    save_strategy: str = field(default="no", metadata={"help": "When to save."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two logs."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin memory for an accelerator."})
    report_to: str = field(default="none", metadata={"help": "Loggers to report to."})


def read_idx(path: Path) -> np.ndarray:
    """Returns the bytes of a gzipped IDX file as an array of uint8 of the shape that its header states."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: apt-get install dataset-fashion-mnist, or give --data_dir.")
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


class FashionMnist(torch.utils.data.Dataset):
    """Normalized images (3, 28, 28) and labels. Training images are shifted by up to 2 pixels and mirrored."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, augment: bool) -> None:
        """Takes uint8 images (n, 28, 28) and labels (n,)."""
        self.images = (torch.from_numpy(images.copy()).float() / 255 - MEAN) / STD
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self.images[index]
        if self.augment:
            top, left = torch.randint(0, 5, (2,)).tolist()
            image = F.pad(image, (2, 2, 2, 2), value=-MEAN / STD)[top : top + 28, left : left + 28]
            image = image.flip(1) if torch.rand(()) < 0.5 else image
        return {"pixel_values": image.expand(3, -1, -1), "labels": self.labels[index]}


def build_model() -> ViTForImageClassification:
    """Returns the untrained model: 6 blocks of width 96, 49 patches of 4 x 4 pixels, 0.67 million parameters."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=28,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=384,
            num_labels=len(LABELS),
        )
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the accuracy."""
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def write_model(model: ViTForImageClassification, folder: Path) -> None:
    """Writes the backbone as safetensors, and the image processor that makes its input."""
    model.vit.config.name_or_path = ""
    model.vit.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 28, "width": 28}, image_mean=[MEAN] * 3, image_std=[STD] * 3, resample=PILImage.BICUBIC
    ).save_pretrained(folder)


def write_images(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Writes images as PNG in a parquet file that `load_dataset("parquet", ...)` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [PILImage.fromarray(image) for image in images], "label": labels.tolist()}
    features = Features({"image": Image(), "label": ClassLabel(names=LABELS)})
    Dataset.from_dict(columns, features=features).to_parquet(path)


def main() -> None:
    """Parses the arguments, then trains, evaluates and writes."""
    data, arguments = HfArgumentParser((DataArguments, PretrainingArguments)).parse_args_into_dataclasses()
    logging.basicConfig(format="%(message)s", level=logging.INFO if arguments.should_log else logging.WARNING)
    arrays = {
        part: [read_idx(Path(data.data_dir) / f"{part}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1")]
        for part in ("train", "t10k")
    }
    destination = Path(data.destination)
    write_images(*(array[:SAMPLES_KEPT] for array in arrays["t10k"]), destination / "data" / "fashion_mnist.parquet")

    set_seed(arguments.seed)
    model = build_model()
    with tempfile.TemporaryDirectory() as scratch:
        arguments.output_dir = scratch
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=FashionMnist(*(array[: data.max_train_samples] for array in arrays["train"]), augment=True),
            eval_dataset=FashionMnist(*(array[: data.max_eval_samples] for array in arrays["t10k"]), augment=False),
            compute_metrics=accuracy,
        )
        training = trainer.train().metrics
        metrics = trainer.evaluate()
    write_model(model, destination / "fashion-mnist-vit")
    logger.info(
        "Fashion-MNIST test accuracy %.2f %% after %.1f minutes; written to %s",
        100 * metrics["eval_accuracy"], training["train_runtime"] / 60, destination,
    )  # fmt: skip


if __name__ == "__main__":
    main()
