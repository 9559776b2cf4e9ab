"""Write Fashion-MNIST, unchanged or shifted, as a parquet file for train.py and compare_components.py.

    apt-get install dataset-fashion-mnist     # 70,000 real images, MIT licence
    python examples/fashion_mnist.py --shift inverted --destination outputs/data/fashion_inverted.parquet

The images are test images, on which the model of the demo was not trained. With `--source_images` they are training
images, on which it was pretrained. The shifts are similar to those of CIFAR-10-C: the same objects with another
appearance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pretrain import LABELS, read_idx, write_images
from transformers import HfArgumentParser


def inverted(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the negative: white background, dark clothes."""
    return 255 - images


def low_contrast(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the images at a fifth of their contrast, around middle gray."""
    return 0.2 * images + 0.4 * 255


def noise(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the images with Gaussian noise of a quarter of the full range."""
    return images + generator.normal(0, 0.25 * 255, images.shape)


SHIFTS = {"inverted": inverted, "low_contrast": low_contrast, "noise": noise}


@dataclass
class Arguments:
    """The images, and the file to write."""

    destination: str = field(metadata={"help": "Parquet file to write."})
    shift: str | None = field(default=None, metadata={"help": "What to do to the images.", "choices": sorted(SHIFTS)})
    samples: int = field(default=2600, metadata={"help": "Number of images, the same for each label."})
    source_images: bool = field(default=False, metadata={"help": "Use the training images."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of images and of the noise."})
    data_dir: str = field(
        default="/usr/share/datasets/fashion-mnist", metadata={"help": "Folder of the four IDX files."}
    )


def main() -> None:
    """Parses the arguments and writes the file."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    part = "train" if arguments.source_images else "t10k"
    images = read_idx(Path(arguments.data_dir) / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(Path(arguments.data_dir) / f"{part}-labels-idx1-ubyte.gz")
    generator = np.random.default_rng(arguments.seed)
    each = arguments.samples // len(LABELS)
    chosen = np.concatenate([generator.permutation(np.flatnonzero(labels == k))[:each] for k in range(len(LABELS))])
    chosen = generator.permutation(chosen)
    images, labels = images[chosen].astype(np.float64), labels[chosen].astype(np.int64)
    if arguments.shift:
        images = SHIFTS[arguments.shift](images, generator)
    images = np.clip(np.rint(images), 0, 255).astype(np.uint8)
    write_images(images, labels, Path(arguments.destination))


if __name__ == "__main__":
    main()
