"""Finetune the components of a vision transformer that are worth it, on images with labels.

The head is fitted to frozen features in closed form, and each group of parameters has its own learning rate. Without
arguments it runs a demo that needs no network. It finetunes the small ViT in `fashion-mnist-vit`, which pretrain.py
pretrained on Fashion-MNIST, to scikit-learn's handwritten digits, and compares the result with stock PEFT and with
finetuning everything.

    python examples/train.py
    python examples/train.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans \
        --training lora --top_k 2 --output_dir outputs/beans
    accelerate launch examples/train.py --dataset_name path/to/image/folder --budget 0.01
    python examples/train.py arguments.yaml

`--help` lists the arguments, including those of transformers' TrainingArguments.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from baselines import batch_size, compare, methods, number_of_steps, quiet, table
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from PIL import Image as PILImage
from PIL import ImageOps
from plan import warn_of_plan
from publishing import claim_repository, publish, publish_merged, save_merged
from safetensors import SafetensorError
from sklearn.datasets import load_digits
from streaming import for_measuring, for_training, stream_splits
from training import compute_metrics, find_checkpoint, finetune, is_sharded, save
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from plasticity_peft import (
    PlasticityConfig,
    PlasticityError,
    PlasticityReport,
    find_components,
)
from plasticity_peft.arguments import ARGUMENTS
from plasticity_peft.cli.models import warn_of_random, without_load_report
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.sharding import whole
from plasticity_peft.criteria.registry import CRITERIA
from plasticity_peft.deprecation import warn_renamed
from plasticity_peft.errors import DataError, SelectionError
from plasticity_peft.images.datasets import choose_split, load_image_dataset
from plasticity_peft.measuring.rates import LONG
from plasticity_peft.measuring.short_runs import find_rate_factor
from plasticity_peft.optimizers import AUTO

HERE = Path(__file__).resolve().parent
DEMO_MODEL = HERE / "fashion-mnist-vit"
DEMO_SOURCE = HERE / "data" / "fashion_mnist.parquet"
DEMO = {"num_train_epochs": 1.5, "random_crop": 1.0, "test_fraction": 0.5}
"""What differs by default if neither a model nor images are given, for a table within minutes."""
NEXT = "python examples/train.py --dataset_name path/to/images --model_name_or_path facebook/dinov2-small"

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """The model to finetune."""

    model_name_or_path: str = field(
        default=str(DEMO_MODEL),
        metadata={"help": "Hub name or folder of a vision transformer, of transformers or of timm."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the images in pixels (default: the size that the model was made for)."},
    )


@dataclass
class DataArguments:
    """The images to finetune on, and their augmentation."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub name of an image dataset, a folder of images with one subfolder per class, or a parquet "
            "file. The default is scikit-learn's digits."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    source_name: str | None = field(
        default=None,
        metadata={
            "help": "Pretraining-like images for the other half of each pair, in the same forms, for criteria that "
            "look at pairs. Without them a pair is two target images. The demo uses Fashion-MNIST images."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    validation_fraction: float = field(
        default=0.15, metadata={"help": "Share of the training images for validation, if there is no such split."}
    )
    test_fraction: float = field(
        default=0.25, metadata={"help": "Share of the images for the test, if there is no test split (demo: 0.5)."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training images only when they are used: parquet or webdataset tar files, or a dataset "
            "on the Hub. Needs --max_steps."
        },
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images of a stream that are shuffled together."})
    num_labels: int | None = field(default=None, metadata={"help": "Labels of a stream whose labels have no names."})
    max_held_samples: int = field(
        default=2000, metadata={"help": "Use at most this many validation and test images of a stream each."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training images."})
    random_crop: float = field(
        default=0.85,
        metadata={"help": "Smallest side of a random training crop as a share of the image; 1: no crop (demo: 1)."},
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "Flip half of the training images."})


@dataclass
class PlasticityArguments:
    """How to measure and what to train; see PlasticityConfig."""

    training: str = field(
        default="full",
        metadata={"help": "full, or lora with --r, --lora_alpha and --lora_dropout", "choices": ["full", "lora"]},
    )
    fit_head: bool = field(
        default=True, metadata={"help": "Fit the head to frozen features in closed form before training."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Number of the best units to train (default: 1)."})
    budget: str | None = field(
        default=None,
        metadata={"help": "How much to train, not top_k: a share of the parameters, or '0.6 time', '0.5 memory'."},
    )
    report: str | None = field(default=None, metadata={"help": "Select from this saved report instead of measuring."})
    criterion: str | None = field(
        default=None,
        metadata={"help": "Criterion that ranks; rate_of_change is the paper's measure.", "choices": sorted(CRITERIA)},
    )
    inputs: str | None = field(
        default=None,
        metadata={
            "help": "Protocol of the paper's measure and its relatives; without --criterion it selects that measure.",
            "choices": ["embedding", "activation"],
        },
    )
    granularity: str = field(default="kind", metadata={"help": ARGUMENTS["granularity"].help})
    candidates: list[str] = field(
        default_factory=lambda: ["LN1", "MHA", "LN2", "FC1", "FC2"], metadata={"help": ARGUMENTS["candidates"].help}
    )
    max_samples: int = field(default=1024, metadata={"help": ARGUMENTS["max_samples"].help})
    pairs: int | None = field(default=None, metadata={"help": "The former name of --max_samples."})
    settle: float | None = field(
        default=0.95,
        metadata={"help": "Stop measuring once the selection is settled at this confidence; 0 uses all samples."},
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Precision to measure in.", "choices": ["bfloat16", "float16"]}
    )
    r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    compare: bool | None = field(
        default=None,
        metadata={"help": "Train stock PEFT's LoRA and everything in full as well, and print a table (default: in the "
                  "demo)."},
    )  # fmt: skip
    measure_every: int | None = field(
        default=None,
        metadata={"help": "Measure again after this many epochs each, and log the scores."},
    )
    compare_seeds: int = field(default=3, metadata={"help": "Seeds of the runs of this table."})


@dataclass
class FinetuningArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults for finetuning a part of a model."""

    output_dir: str | None = field(default="outputs/train", metadata={"help": "Folder to write the adapter to."})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of all that trains (default: one for each group, recommended)."},
    )
    rate_factor: str = field(
        default="auto",
        metadata={
            "help": "What the recommended rates are multiplied by, but for that of the head. 'auto' is what the "
            "forecast in --report says; without one, what short runs say if at least 100 steps are trained, else 1."
        },
    )
    num_train_epochs: float = field(default=12, metadata={"help": "Passes over the training images (demo: 1.5)."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images per step in evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps of warm-up (default: a tenth of all steps)."})
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate the fitted head before training."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save."})
    logging_strategy: str = field(default="steps", metadata={"help": "When to log."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    logging_steps: float = field(default=0.1, metadata={"help": "Steps between logs; below 1, a share of all steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="accuracy", metadata={"help": "Metric of the best checkpoint."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The transforms need the image column."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All that trains is used."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin the memory of images, for a GPU."})
    hub_strategy: str = field(default="end", metadata={"help": "When to publish: end, or with every checkpoint too."})
    save_merged: bool = field(
        default=False, metadata={"help": "Also save the merged model, which needs no PEFT, in <output_dir>/merged."}
    )
    push_merged: bool = field(
        default=False,
        metadata={"help": "With --push_to_hub, also publish the merged model, as <hub_model_id>-merged."},
    )
    report_to: str = field(default="none", metadata={"help": "Loggers to report to."})
    verbose: bool = field(
        default=False, metadata={"help": "Also log what the libraries say, and all numbers of the Trainer."}
    )

    def __post_init__(self) -> None:
        """Starts processes on CPUs with the timeout, which transformers gives to those on accelerators alone."""
        on_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=True, timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()


def load_images(name: str | None, config_name: str | None = None) -> DatasetDict:
    """Returns the splits of a dataset by Hub name, image folder or parquet file; the digits if `name` is None."""
    if name is None:
        return DatasetDict(train=digits())
    return load_image_dataset(name, config_name)


def digits() -> Dataset:
    """Returns scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""
    bunch = load_digits()
    images = [PILImage.fromarray((image * (255 / 16)).astype(np.uint8)) for image in bunch.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    info = DatasetInfo(features=features, dataset_name="digits")
    return Dataset.from_dict({"image": images, "label": bunch.target}, features=features, info=info)


def with_named_labels(dataset: DatasetDict, data: DataArguments) -> DatasetDict:
    """Returns the dataset with labels that have the same numbers and names in all splits.

    Raises:
        DataError: there is no split for training, or a split lacks the column of the images or of the labels.
    """
    name, column = data.dataset_name or "digits", data.label_column
    choose_split(dataset, "train", name)
    parts = {part: dataset[part] for part in ("train", "validation", "test") if part in dataset}
    for part, images in parts.items():
        for needed in (data.image_column, column):
            if needed not in images.features:
                raise DataError(
                    f"The {part} split of the dataset {name} has no column {needed!r}. It has: "
                    f"{', '.join(map(repr, images.features))}. Give --image_column and --label_column."
                )
    features = [images.features[column] for images in parts.values()]
    if isinstance(features[0], ClassLabel) and all(one == features[0] for one in features):
        return DatasetDict(parts)

    def named(images: Dataset, values: list) -> list:
        feature = images.features[column]
        return feature.int2str(values) if isinstance(feature, ClassLabel) else values

    def numbered(images: Dataset) -> Dataset:
        return images.map(
            lambda batch: {column: labels.str2int([str(value) for value in named(images, batch[column])])},
            batched=True,
            features=Features({**images.features, column: labels}),
        )

    values = {value for images in parts.values() for value in named(images, images.unique(column))}
    labels = ClassLabel(names=[str(value) for value in sorted(values)])
    return DatasetDict({part: numbered(images) for part, images in parts.items()})


def split(dataset: DatasetDict, data: DataArguments, seed: int) -> DatasetDict:
    """Returns train, validation and test splits; those that the dataset lacks are cut from its training images."""
    dataset = with_named_labels(dataset, data)
    train = dataset["train"]
    parts = {"validation": dataset.get("validation"), "test": dataset.get("test")}
    for name, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if parts[name] is None:
            cut = train.train_test_split(fraction, seed=seed, stratify_by_column=data.label_column)
            train, parts[name] = cut["train"], cut["test"]
    if data.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(data.max_train_samples, len(train))))
    return DatasetDict(train=train, **parts)


class Transform:
    """Converts a batch of the dataset to `pixel_values` and `labels`, with augmentation if `augment`."""

    def __init__(self, processor: BaseImageProcessor, data: DataArguments, augment: bool) -> None:
        self.processor, self.data, self.augment = processor, data, augment

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:  # noqa: D102
        images = [image.convert("RGB") for image in batch[self.data.image_column]]
        if self.augment:
            images = [self._augmented(image) for image in images]
        processed = dict(self.processor(images=images, return_tensors="pt"))
        if self.data.label_column in batch:
            processed["labels"] = batch[self.data.label_column]
        return processed

    def _augmented(self, image: PILImage.Image) -> PILImage.Image:
        share = np.random.uniform(self.data.random_crop, 1)
        width, height = image.width * share, image.height * share
        left, top = np.random.uniform(0, image.width - width), np.random.uniform(0, image.height - height)
        # resize, not crop: its box may lie between pixels, which matters for images as small as the digits
        image = image.resize(image.size, PILImage.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        return ImageOps.mirror(image) if self.data.horizontal_flip and np.random.rand() < 0.5 else image


def load_processor(arguments: ModelArguments) -> BaseImageProcessor:
    """Returns the image processor of the model, for images of the given size."""
    size = arguments.image_size
    options = {} if size is None else {"size": {"height": size, "width": size}, "do_center_crop": False}
    return AutoImageProcessor.from_pretrained(arguments.model_name_or_path, revision=arguments.revision, **options)


def load_model(arguments: ModelArguments, labels: list[str]) -> PreTrainedModel:
    """Returns the pretrained model with a fresh head for these labels, and their names in its config."""
    with without_load_report():
        model, info = AutoModelForImageClassification.from_pretrained(
            arguments.model_name_or_path,
            revision=arguments.revision,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            ignore_mismatched_sizes=True,
            dtype=torch.float32,  # weights in half precision train badly; use --bf16 or --fp16 for speed
            output_loading_info=True,
        )
    warn_of_random(arguments.model_name_or_path, model, info)
    return model


def on_device(model: PreTrainedModel, arguments: FinetuningArguments) -> PreTrainedModel:
    """Returns the model on the device that trains it, unless DeepSpeed places it or it cannot be measured there."""
    placed = arguments.deepspeed_plugin is not None or arguments.device.type == "mps"
    return model if placed else model.to(arguments.device)


def with_head_alone(model: PreTrainedModel) -> PeftModel:
    """Returns the model with only its head to train: stock PEFT without LoRA layers."""
    heads = find_architecture(model).heads
    return get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(heads)))


def check_writable(folder: str) -> None:
    """Raises SystemExit if no file can be written into `folder`, before anything is measured or trained."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise SystemExit(f"Cannot write into --output_dir {folder}: {error.strerror}.") from None


def load_splits(
    data: DataArguments,
    source_name: str | None,
    processor: BaseImageProcessor,
    arguments: FinetuningArguments,
    max_samples: int,
) -> tuple[dict[str, Dataset], list[str]]:
    """Returns the images with their transforms, and the names of the labels.

    The images are "train" (augmented), "validation" and "test", and, for measuring, "target" (the training images
    without augmentation) and possibly "source".
    """
    plain, augmenting = Transform(processor, data, augment=False), Transform(processor, data, augment=True)
    if data.streaming:
        columns = data.image_column, data.label_column
        parts, labels = stream_splits(
            data.dataset_name, data.dataset_config_name, columns, data.num_labels, data.max_held_samples
        )
        splits = {name: parts[name].with_transform(plain) for name in ("validation", "test")}
        splits["train"] = for_training(parts["train"], augmenting, arguments, data.shuffle_buffer)
        splits["target"] = for_measuring(
            parts["train"], plain, arguments.seed, data.shuffle_buffer, most=2 * max_samples
        )
        return splits, labels.names
    with arguments.main_process_first(desc="loading the images"):
        parts = split(load_images(data.dataset_name, data.dataset_config_name), data, arguments.seed)
        splits = {name: part.with_transform(augmenting if name == "train" else plain) for name, part in parts.items()}
        splits["target"] = parts["train"].with_transform(plain)
        if source_name is not None:
            splits["source"] = choose_split(load_images(source_name), "train", source_name).with_transform(plain)
    return splits, parts["train"].features[data.label_column].names


def configure(plasticity: PlasticityArguments, checkpoint: str | None, splits: dict[str, Dataset]) -> PlasticityConfig:
    """Returns the PlasticityConfig. A resumed run selects from the report of its checkpoint."""
    options = asdict(plasticity)
    for name in ("compare", "compare_seeds", "measure_every"):
        del options[name]
    pairs = options.pop("pairs")
    if pairs is not None:
        warn_renamed("--pairs", "--max_samples", stacklevel=1)
        options["max_samples"] = pairs
    options["settle"] = options["settle"] or None
    report = str(Path(checkpoint) / "plasticity.json") if checkpoint else options["report"]
    if report is None:
        return PlasticityConfig(**options, target_data=splits["target"], source_data=splits.get("source"))
    images = splits["target"] if options["fit_head"] else None
    return PlasticityConfig(**{**options, "report": PlasticityReport.load(report)}, target_data=images)


@contextmanager
def keeping_the_report(arguments: FinetuningArguments) -> Iterator[None]:
    """Inside, a report from which the budget selects nothing is saved, so that it need not be measured again."""
    try:
        yield
    except SelectionError as error:
        if error.report is None:
            raise
        path = Path(arguments.output_dir, "report.json")
        if arguments.should_save:
            error.report.save(path)
        raise SystemExit(f"{error.__cause__ or error} --report {path} selects from what was measured.") from None


def rate_factor(
    arguments: FinetuningArguments, report: PlasticityReport, model: PeftModel, images: Dataset, steps: int
) -> float:
    """Returns what the recommended rates are multiplied by: what is given, or what a forecast or short runs say."""
    if arguments.rate_factor != AUTO:
        return arguments.rate_factor
    if arguments.learning_rate is not None:
        return 1.0
    if report.forecast is not None and report.forecast.pilot is not None:
        factor, source = report.forecast.rate_factor, "the forecast says"
    elif steps < LONG or is_sharded(arguments):
        return 1.0
    else:
        try:
            size = arguments.per_device_train_batch_size
            factor = find_rate_factor(model, images, batch_size=size, seed=arguments.seed)
            source = "short runs say"
        except (PlasticityError, torch.OutOfMemoryError) as error:
            logger.warning(
                "The rates are the recommended ones. Short runs, which tell whether they are too large, failed: %s",
                str(error).splitlines()[0],
            )
            return 1.0
    logger.info("Rates: %s recommended ones, as %s", "the" if factor == 1 else f"{factor:g} times the", source)
    return factor


def log_size(model: PeftModel, splits: dict[str, Dataset], arguments: FinetuningArguments) -> None:
    """Logs how large the images are, how many tokens the model makes of one, and how many steps are trained."""
    image = next(iter(splits["target"]))["pixel_values"]
    tokens: list[int] = []
    with whole(model) as inner, torch.no_grad():
        layer = inner.get_submodule(find_components(inner)[0].modules[0])
        hook = layer.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        inner(pixel_values=image[None].to(inner.device))
        hook.remove()
    steps, batch = number_of_steps(arguments, splits["train"]), batch_size(arguments)
    logger.info(
        "Images of %d x %d pixels, %d tokens each; %d steps of %d images", *image.shape[1:], tokens[0], steps, batch
    )


def is_demo(model: ModelArguments, data: DataArguments) -> bool:
    """Returns whether neither a model nor images are given."""
    return data.dataset_name is None and model.model_name_or_path == str(DEMO_MODEL)


def parse_command_line(parser: HfArgumentParser) -> tuple:
    """Returns the arguments of the command line."""
    model, data, _ = HfArgumentParser((ModelArguments, DataArguments)).parse_args_into_dataclasses(
        [argument for argument in sys.argv[1:] if argument not in ("-h", "--help")], return_remaining_strings=True
    )
    if is_demo(model, data):
        parser.set_defaults(**DEMO)
    return parser.parse_args_into_dataclasses()


def config_file() -> Path | None:
    """Returns the file of arguments, if the command line consists of one."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    return Path(name) if name.endswith((".json", ".yaml", ".yml")) else None


def parse_file(parser: HfArgumentParser, path: Path) -> tuple:
    """Returns the arguments in a JSON or YAML file.

    Raises:
        SystemExit: there is no such file, or it names an argument that does not exist.
    """
    try:
        values = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it must contain names and values")
        if values.get("model_name_or_path") is None and values.get("dataset_name") is None:
            values = DEMO | values
        return parser.parse_dict(values)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"Cannot read the arguments in {path}: {error}") from None


def parse_arguments() -> tuple[ModelArguments, DataArguments, PlasticityArguments, FinetuningArguments]:
    """Returns the arguments of the command line. Checks first what would otherwise fail at the end of training."""
    parser = HfArgumentParser((ModelArguments, DataArguments, PlasticityArguments, FinetuningArguments))
    path = config_file()
    parsed = parse_command_line(parser) if path is None else parse_file(parser, path)
    _, data, plasticity, arguments = parsed
    logging.basicConfig(format="%(message)s", level=logging.INFO if arguments.should_log else logging.WARNING)
    # peft reads an attribute that transformers renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    for noisy in () if arguments.verbose else ("httpx", "datasets", "evaluate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    check_writable(arguments.output_dir)
    if arguments.push_merged and not arguments.push_to_hub:
        raise SystemExit("--push_merged needs --push_to_hub true.")
    if plasticity.training == "full":
        usual = PlasticityArguments()
        given = [
            name for name in ("r", "lora_alpha", "lora_dropout") if getattr(plasticity, name) != getattr(usual, name)
        ]
        if given:
            raise SystemExit(f"--{given[0]} is an option of LoRA. Give --training lora as well.")
    check_sharded(plasticity, arguments)
    arguments.rate_factor = checked_rate_factor(arguments.rate_factor)
    if data.streaming:
        set_steps(data, arguments)
    return parsed


def set_steps(data: DataArguments, arguments: FinetuningArguments) -> None:
    """Makes what happens once an epoch happen ten times in a run: a stream has no epochs. Raises SystemExit if its
    length is unknown.
    """
    if data.dataset_name is None or arguments.max_steps <= 0:
        raise SystemExit("--streaming needs --dataset_name and --max_steps: the number of images is not known.")
    if arguments.eval_strategy == "epoch":
        arguments.eval_strategy, arguments.eval_steps = IntervalStrategy.STEPS, -(-arguments.max_steps // 10)
    if arguments.save_strategy == "epoch":
        arguments.save_strategy, arguments.save_steps = SaveStrategy.STEPS, -(-arguments.max_steps // 10)


def checked_rate_factor(given: object) -> float | str:
    """Returns a factor as a number, or "auto". Raises SystemExit if it is neither."""
    try:
        found = AUTO if given == AUTO else float(given)
    except (TypeError, ValueError):
        found = 0.0
    if found != AUTO and not 0 < found < float("inf"):
        raise SystemExit(f"--rate_factor must be a number above 0, or {AUTO}. Got {given}.")
    return found


def check_sharded(plasticity: PlasticityArguments, arguments: FinetuningArguments) -> None:
    """Raises SystemExit if something is asked for that needs the whole model, and FSDP or DeepSpeed spreads it."""
    wanted = {
        "save_merged": arguments.save_merged,
        "push_merged": arguments.push_merged,
        "compare": plasticity.compare,
        "measure_every": plasticity.measure_every,
    }
    name = next((name for name, value in wanted.items() if value), None)
    if name is not None and is_sharded(arguments):
        raise SystemExit(
            f"--{name} needs the whole model in each process, and FSDP or DeepSpeed spreads it. Train without --{name}"
            ", and use the saved adapter in one process: PeftModel.from_pretrained(...).merge_and_unload() merges it."
        )


def main() -> None:
    """Measures, trains, evaluates, saves and, with --push_to_hub, publishes."""
    model_arguments, data, plasticity, arguments = parse_arguments()
    base_model = model_arguments.model_name_or_path
    repository = None
    if arguments.push_to_hub:
        with arguments.main_process_first(desc="making the repository"):
            repository = claim_repository(arguments, base_model)
        arguments.hub_model_id = repository

    demo = is_demo(model_arguments, data)
    processor = load_processor(model_arguments)
    source_name = data.source_name or (str(DEMO_SOURCE) if demo else None)
    splits, labels = load_splits(data, source_name, processor, arguments, plasticity.max_samples)
    number = "A stream of" if data.streaming else len(splits["train"])
    logger.info("%s images of %s labels for training", number, len(labels))
    checkpoint = find_checkpoint(arguments, "plasticity.json")
    config = configure(plasticity, checkpoint, splits)  # its errors come before any training

    set_seed(arguments.seed)
    revision = None if model_arguments.revision == "main" else model_arguments.revision
    with keeping_the_report(arguments):
        model = get_peft_model(on_device(load_model(model_arguments, labels), arguments), config, revision=revision)
    units = config.selection.units
    logger.info("\n%s\n\nSelected: %s (%s)", config.report, ", ".join(units), config.training)
    if config.head_fit is not None:
        logger.info("%s", str(config.head_fit).capitalize())
    log_size(model, splits, arguments)
    steps = number_of_steps(arguments, splits["train"])
    arguments.rate_factor = rate_factor(arguments, config.report, model, splits["target"], steps)
    cost = config.selection.cost
    warn_of_plan(model, arguments, splits, image_column=data.image_column, cost=cost, steps=steps)
    arguments.warmup_steps = arguments.warmup_steps or round(0.1 * steps)
    if arguments.logging_steps < 1:  # a checkpoint contains the number, with which a resumed run is compared
        arguments.logging_steps = int(np.ceil(arguments.logging_steps * steps))
    trainer, metrics = finetune(
        model, arguments, processor, splits, checkpoint, plasticity.measure_every, arguments.verbose
    )
    selected = " + ".join(("head", *units))

    about = {
        "dataset": splits["test"].info.dataset_name,
        "tasks": "image-classification",
        "finetuned_from": base_model,  # or Trainer's card says "trained from scratch"
    }
    save(trainer, metrics, splits["test"], about)
    trainable, total = model.get_nb_trainable_parameters()[0], config.report.model_parameters
    logger.info(
        "%s trains %d of %d parameters (%.2f %%), test accuracy %.2f %%",
        selected, trainable, total, 100 * trainable / total, 100 * metrics["test_accuracy"],
    )  # fmt: skip
    logger.info("The adapter and plasticity.json are in %s", arguments.output_dir)
    if arguments.save_merged:
        save_merged(trainer)
    if repository is not None:
        publish(trainer, repository, **about)
    if arguments.push_merged:
        publish_merged(
            trainer,
            repository,
            base_model=base_model,
            dataset_name=data.dataset_name or "digits",
            trained=f"{selected} ({config.training})",
            metrics=metrics,
        )
    if demo and not is_sharded(arguments) if plasticity.compare is None else plasticity.compare:
        print_table(config, model_arguments, labels, arguments, splits, plasticity.compare_seeds)
    if demo:
        logger.info("\nNext, with images of your own, in one folder for each label:\n    %s", NEXT)


def print_table(
    config: PlasticityConfig,
    model_arguments: ModelArguments,
    labels: list[str],
    arguments: FinetuningArguments,
    splits: dict[str, Dataset],
    seeds: int,
) -> None:
    """Trains what the selection is compared with, each at its recommended rates, and logs a table."""

    def accuracy(trainer: Trainer) -> float:
        trainer.compute_metrics = compute_metrics
        return trainer.evaluate(splits["test"], metric_key_prefix="test")["test_accuracy"]

    set_seed(arguments.seed)
    model = on_device(load_model(model_arguments, labels), arguments)
    wanted = methods(model, config.report, config.selection.units, config.training)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(model, wanted, quiet(arguments, folder), splits, seeds, accuracy)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("\n%s", table(rows, parameters, len(splits["test"])))


def run() -> None:
    """Runs `main`. An error that the user can fix is printed in one line instead of a traceback."""
    try:
        main()
    except (PlasticityError, OSError, SafetensorError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    except RuntimeError as error:
        if not waited_in_vain(error):
            raise
        raise SystemExit(
            "A process waited in vain for the others. One has ended, has stopped, or works longer than --ddp_timeout "
            f"seconds. ({error})"
        ) from None


def waited_in_vain(error: RuntimeError) -> bool:
    """Returns whether torch says that another process does not answer."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "timed out" in text or "connection closed" in text


if __name__ == "__main__":
    run()
