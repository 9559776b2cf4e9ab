"""Train each kind of component alone, and compare the results with the rankings of the criteria.

This is the experiment of the paper (arXiv 2602.06883, section 5) for any model and dataset. Each kind of component is
trained alone, and so are the head and everything, at several learning rates and seeds. The learning rate of each
method is chosen on validation images, and the accuracy is that on test images. In addition, at an equal number of
trained parameters, the selections of single components by each criterion and the methods of stock PEFT are trained.

    python examples/compare_components.py --output_dir outputs/compare/demo-digits
    accelerate launch examples/compare_components.py --model_name_or_path facebook/dinov2-small \
        --dataset_name beans --learning_rates 1e-4 1e-3 1e-2 --seeds 0 1 2 --output_dir outputs/compare/beans

It writes to `--output_dir`: runs.csv (one row per run), methods.csv and criteria.csv, results.md with the tables, and
two figures. A finished run is one file in `runs/` and is not repeated, so the same command continues an interrupted
comparison.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from comparison import Run, load
from datasets import Array3D, Dataset, DatasetDict, Features, Value
from methods import Method, by_blocks, by_default, by_kind, stock
from summarize import write
from torch import nn
from torch.utils.data import DataLoader
from train import (
    DEMO_SOURCE,
    DataArguments,
    FinetuningArguments,
    ModelArguments,
    Transform,
    compute_metrics,
    load_images,
    load_model,
    load_processor,
    split,
)
from transformers import (
    BaseImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from plasticity_peft import PlasticityReport, find_components, measure_plasticity
from plasticity_peft.checks import PROTOCOLS
from plasticity_peft.criteria.registry import CRITERIA
from plasticity_peft.files import write_text

logger = logging.getLogger(__name__)


@dataclass
class CompareArguments:
    """The settings of the comparison."""

    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Peak learning rates. Each method tries all."}
    )
    full_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "The same for training in full, including the head alone, if they differ."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the head, of LoRA and of the order of images."}
    )
    groups: list[str] = field(
        default_factory=lambda: ["kind", "default", "blocks", "stock"],
        metadata={
            "help": "kind: the paper's experiment. At an equal number of parameters, default: the kinds that this "
            "package selects; blocks: the single components that each criterion selects; stock: PEFT's own methods."
        },
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": "Run only these methods, such as MHA or everything (default: all)."}
    )
    criteria: list[str] = field(
        default_factory=lambda: list(CRITERIA), metadata={"help": "Criteria to compare. The first is used by default."}
    )
    max_samples: int = field(
        default=256, metadata={"aliases": ["--pairs"], "help": "Images, or pairs of images, to measure on."}
    )
    r: int = field(default=8, metadata={"help": "Rank of LoRA, unless a method has its own."})


@dataclass
class ComparisonTrainingArguments(FinetuningArguments):
    """The recipe of every run."""

    output_dir: str | None = field(default="outputs/compare", metadata={"help": "Folder to write the results to."})
    num_train_epochs: float = field(default=4, metadata={"help": "Passes over the training images."})
    eval_strategy: str = field(default="no", metadata={"help": "Evaluation happens once, after training."})
    save_strategy: str = field(default="no", metadata={"help": "When to save; a run that saves can be resumed."})
    eval_on_start: bool = field(default=False, metadata={"help": "Evaluation is once, after training."})
    load_best_model_at_end: bool = field(default=False, metadata={"help": "The last weights are the result."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Limit of the gradient norm; 0: no clipping."})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "No progress bar for each of many runs."})


class GradientNorm(TrainerCallback):
    """Records the norm of the gradient of all parameters that train, without the head, at each step."""

    def __init__(self, head: tuple[str, ...]) -> None:
        self.head, self.norms = head, []

    def on_pre_optimizer_step(  # noqa: D102
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        gradients = [
            parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not any(part in self.head for part in name.split("."))
        ]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


def prepare(part: Dataset, processor: BaseImageProcessor, data: DataArguments) -> Dataset:
    """Returns the images as tensors, made once for all runs."""
    transform = Transform(processor, data, augment=False)
    shape = transform(part[:1])["pixel_values"].shape[1:]
    features = Features({"pixel_values": Array3D(tuple(shape), "float32"), "labels": Value("int64")})

    def tensors(batch: dict[str, list]) -> dict[str, object]:
        processed = transform(batch)
        return {"pixel_values": processed["pixel_values"].numpy(), "labels": processed["labels"]}

    options = {"batched": True, "batch_size": 64, "remove_columns": part.column_names, "features": features}
    return part.map(tensors, **options).with_format("torch")


def measure(
    model: PreTrainedModel, images: DatasetDict, compare: CompareArguments, folder: Path
) -> dict[str, PlasticityReport]:
    """Returns the report of each criterion, measured or read from `folder`."""
    wanted = [
        (criterion, inputs)
        for criterion in compare.criteria
        for inputs in (PROTOCOLS if CRITERIA[criterion].protocols else (None,))
    ]
    paths = [folder / f"{criterion}{'-' + inputs if inputs else ''}.json" for criterion, inputs in wanted]
    # One process looks for all: a slower one would find a file that a faster one has just written, and not take part.
    missing = broadcast_object_list([not path.is_file() for path in paths])
    for (criterion, inputs), path, needed in zip(wanted, paths, missing, strict=True):
        if needed:
            options = {"criterion": criterion, "inputs": inputs, "max_samples": compare.max_samples, "settle": None}
            report = measure_plasticity(model, images["train"], images.get("source"), **options)
            if PartialState().is_main_process:
                report.save(path)
    PartialState().wait_for_everyone()
    return {path.stem: PlasticityReport.load(path) for path in paths}


def train(
    method: Method,
    model: PreTrainedModel,
    arguments: ComparisonTrainingArguments,
    images: DatasetDict,
    learning_rate: float,
    seed: int,
) -> Run:
    """Returns the result of one training run."""
    set_seed(seed)
    head = tuple(name for name, _ in model.named_children() if name != model.base_model_prefix)
    model = method.adapt(model)
    arguments.learning_rate, arguments.seed = learning_rate, seed
    gradient_norm = GradientNorm(head)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=images["train"],
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        callbacks=[gradient_norm],
    )
    trained = trainer.train().metrics
    accuracy = {
        name: trainer.evaluate(images[name], metric_key_prefix=name)[f"{name}_accuracy"]
        for name in ("validation", "test")
    }
    in_head = sum(p.numel() for name, p in model.named_parameters() if _trains_in_head(name, p, head))
    norms = torch.tensor(gradient_norm.norms or [0.0])
    return Run(
        group=method.group,
        method=method.name,
        training=method.training,
        learning_rate=learning_rate,
        seed=seed,
        validation_accuracy=accuracy["validation"],
        test_accuracy=accuracy["test"],
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head_parameters=in_head,
        train_loss=trained["train_loss"],
        gradient_norm_first=float(norms[0]),
        gradient_norm_mean=float(norms.mean()),
        gradient_norm_std=float(norms.std(correction=0)),
        seconds=trained["train_runtime"],
    )


def _trains_in_head(name: str, parameter: nn.Parameter, head: tuple[str, ...]) -> bool:
    return parameter.requires_grad and any(part in head for part in name.split("."))


def check_settings(folder: Path, settings: dict[str, object]) -> None:
    """Writes the settings of the comparison. Exits if the folder contains results of other settings."""
    path = folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        changed = sorted(key for key in settings if before.get(key) != json.loads(json.dumps(settings[key])))
        if changed:
            raise SystemExit(
                f"{folder} contains results of other settings ({', '.join(changed)} changed). Give another "
                "--output_dir."
            )
    write_text(path, json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Parses the arguments, then measures, trains what is missing, and writes tables and figures."""
    parser = HfArgumentParser((ModelArguments, DataArguments, CompareArguments, ComparisonTrainingArguments))
    model_arguments, data, compare, arguments = parser.parse_args_into_dataclasses()
    logging.basicConfig(
        format="%(asctime)s %(message)s", level=logging.INFO if arguments.should_log else logging.WARNING
    )
    for noisy in ("httpx", "datasets", "evaluate", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    folder = Path(arguments.output_dir)
    runs = folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    if arguments.should_save:
        keys = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps",
                "weight_decay", "optim", "max_grad_norm")  # fmt: skip
        recipe = {key: str(getattr(arguments, key)) for key in keys}
        name = model_arguments.model_name_or_path
        name = Path(name).name if Path(name).is_dir() else name
        check_settings(
            folder,
            {**asdict(model_arguments), "model_name_or_path": name, **asdict(data), **recipe, "r": compare.r},
        )

    processor = load_processor(model_arguments)
    parts = split(load_images(data.dataset_name, data.dataset_config_name), data, seed=0)
    source = data.source_name or (
        str(DEMO_SOURCE) if "fashion-mnist-vit" in model_arguments.model_name_or_path else None
    )
    if source:
        parts["source"] = load_images(source)["train"]
    labels = parts["train"].features[data.label_column].names
    images = DatasetDict({name: prepare(part, processor, data) for name, part in parts.items()})

    set_seed(0)
    model = load_model(model_arguments, labels)
    (folder / "reports").mkdir(exist_ok=True)
    reports = measure(model, images, compare, folder / "reports")
    first = next(iter(reports.values()))
    budget = sum(compare.r * sum(map(sum, part.features)) for part in find_components(model) if part.kind == "FC1")
    methods, picks = [], {}
    if "kind" in compare.groups:
        methods += by_kind(first, compare.r)
    if "default" in compare.groups:
        methods += by_default(first, budget)
    if "blocks" in compare.groups:
        more, picks = by_blocks(reports, budget, compare.r)
        methods += more
    if "stock" in compare.groups:
        loader = DataLoader(images["train"].select_columns("pixel_values"), batch_size=64, shuffle=True)
        methods += stock(model, budget, loader)

    if picks and arguments.should_save:
        write_text(folder / "picks.json", json.dumps(picks, indent=2) + "\n")
    methods = [method for method in methods if compare.methods is None or method.name in compare.methods]
    rates = {"lora": compare.learning_rates, "full": compare.full_learning_rates or compare.learning_rates}
    grid = [(method, rate, seed) for seed in compare.seeds for method in methods for rate in rates[method.training]]
    paths = [runs / f"{method.folder}-lr{rate:g}-seed{seed}.json" for method, rate, seed in grid]
    missing = broadcast_object_list([not path.is_file() for path in paths])
    logger.info("%d of %d runs to do", sum(missing), len(grid))
    for (method, rate, seed), path, needed in zip(grid, paths, missing, strict=True):
        if needed:
            set_seed(seed)
            run = train(method, load_model(model_arguments, labels), arguments, images, rate, seed)
            if arguments.should_save:
                write_text(path, json.dumps(asdict(run), indent=2) + "\n")
            logger.info(
                "%-50s %5.1f s, validation %.2f %%, test %.2f %%",
                path.stem, run.seconds, 100 * run.validation_accuracy, 100 * run.test_accuracy,
            )  # fmt: skip
    if arguments.should_save:
        write(load(folder), folder)
        logger.info("The tables and figures are in %s", folder)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    main()
