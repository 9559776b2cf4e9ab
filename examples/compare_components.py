"""Train different parts of a vision transformer, each at its best learning rates, and compare what they come to.

This repeats the experiment of the paper (arXiv 2602.06883, section 5) with a recipe of today, for any model and any
images. Every method starts from the same fitted head and sees the same images. Its learning rates are tuned with one
seed on validation images: multiples of the recommended rates, a factor of 2.5 apart, until the best one is not at an
end. Then it is trained with several seeds at the best multiple and at the recommended rates.

    python examples/compare_components.py --output_dir outputs/compare/demo-digits
    python examples/compare_components.py --model_name_or_path facebook/dinov2-small --image_size 98 \
        --dataset_name cifar10 --max_train_samples 1000 --groups kinds stock --output_dir outputs/compare/dinov2
    accelerate launch examples/compare_components.py --output_dir outputs/compare/demo-digits

It writes to `--output_dir`: one JSON file in `runs/` and one in `costs/` for each method, and results.md with the
tables. A finished method is not repeated, so the same command continues an interrupted comparison. Processes share the
methods. All runs of a method train at once: their parameters are stacked.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from comparison import Result, Run, load
from huggingface_hub.utils import disable_progress_bars
from methods import EVERYTHING, GROUPS, Catalog, Method
from stacked import BATCH_SIZE, PLAIN, Part, StackedRuns, order_of_images
from step_cost import in_turns, kept_bytes, state_bytes, training_step
from summarize import write
from torch import nn
from train import (
    DEMO_SOURCE,
    DataArguments,
    ModelArguments,
    Transform,
    is_demo,
    load_images,
    load_model,
    load_processor,
    split,
)
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from plasticity_peft import (
    PlasticityReport,
    create_plasticity_optimizer,
    find_components,
    fit_head,
    forecast_finetuning,
    measure_plasticity,
)
from plasticity_peft.checks import PROTOCOLS
from plasticity_peft.criteria.registry import CRITERIA
from plasticity_peft.files import write_text
from plasticity_peft.measuring.forecast import usual_sets
from plasticity_peft.report.cost import Trained

logger = logging.getLogger(__name__)
STEP = 2.5
"""Factor between neighboring learning rates."""
STAGES = {
    "train": "train the methods",
    "cost": "measure the time and memory of a training step, for which the machine should do nothing else",
    "forecast": "forecast the gains of the methods that train whole components in full, without training",
}


@dataclass
class CompareArguments:
    """The settings of the comparison."""

    output_dir: str = field(default="outputs/compare", metadata={"help": "Folder to write the results to."})
    groups: list[str] = field(
        default_factory=lambda: list(GROUPS),
        metadata={"help": "; ".join(f"{name}: {what}" for name, what in GROUPS.items()) + "."},
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": "Run these methods, such as MHA or everything, in this order (default: all)."}
    )
    criteria: list[str] = field(
        default_factory=lambda: list(CRITERIA), metadata={"help": "Criteria that rank single components."}
    )
    shares: list[float] = field(
        default_factory=lambda: [1 / 6, 1 / 3, 1 / 2],
        metadata={"help": "Shares of the weights of all components that are selected as single components."},
    )
    budgets: list[str] = field(
        default_factory=lambda: ["0.5 time", "0.6 time", "0.7 time", "0.8 time"],
        metadata={"help": "Budgets within which a forecast finds components, as in PlasticityConfig."},
    )
    max_samples: int = field(default=256, metadata={"help": "Images, or pairs of images, to measure on."})
    max_test_samples: int = field(default=2000, metadata={"help": "Use at most this many test images."})
    seeds: int = field(default=3, metadata={"help": "Seeds at the best rates and at the recommended ones."})
    max_rates: int = field(
        default=7,
        metadata={"help": "Largest number of learning rates that a method tries; 1: only the recommended ones."},
    )
    steps: int = field(default=375, metadata={"help": f"Training steps of {BATCH_SIZE} images."})
    evaluations: int = field(default=5, metadata={"help": "How often the accuracy is computed in a run."})
    timed_rounds: int = field(default=5, metadata={"help": "Number of timed training steps."})
    stacked: int = field(
        default=16, metadata={"help": "Train at most this many runs at once; fewer need less memory."}
    )
    matmul_precision: str = field(
        default="high",
        metadata={
            "help": "Precision of products of float32 matrices, as in `torch.set_float32_matmul_precision`. "
            '"high" is TF32 on a GPU, and "medium" is faster on a CPU with AMX.',
            "choices": ["highest", "high", "medium"],
        },
    )
    stages: list[str] = field(
        default_factory=lambda: list(STAGES),
        metadata={"help": "; ".join(f"{name}: {what}" for name, what in STAGES.items()) + "."},
    )


class Pair:
    """A model with a fitted head, and the images of all splits on its device."""

    def __init__(self, model_arguments: ModelArguments, data: DataArguments, compare: CompareArguments) -> None:
        """Loads both."""
        self.arguments, self.device = model_arguments, PartialState().device
        parts = split(load_images(data.dataset_name, data.dataset_config_name), data, seed=0)
        if len(parts["test"]) > compare.max_test_samples:
            parts["test"] = parts["test"].shuffle(seed=0).select(range(compare.max_test_samples))
        self.labels = parts["train"].features[data.label_column].names
        source = data.source_name or (str(DEMO_SOURCE) if is_demo(model_arguments, data) else None)
        self.source = load_images(source)["train"] if source else None
        transform = Transform(load_processor(model_arguments), data, augment=False)
        self.parts = {}
        for name, part in parts.items():
            batch = transform(part[:])
            labels = torch.tensor(batch["labels"], device=self.device)
            self.parts[name] = Part(batch["pixel_values"].to(self.device), labels)
        if self.source is not None:
            self.source = self.source.with_transform(transform)
        self.items = [{"pixel_values": x, "labels": int(y)} for x, y in zip(*self.parts["train"], strict=True)]
        set_seed(0)
        model = load_model(model_arguments, self.labels)
        if model_arguments.image_size is not None:
            resize_positions(model, model_arguments.image_size)
        self.model = model.to(self.device).eval()
        self.head = fit_head(self.model, self.items)

    def fresh(self) -> PreTrainedModel:
        """Returns a copy of the model with its fitted head."""
        return copy.deepcopy(self.model)

    def adapted(self, method: Method, seed: int) -> nn.Module:
        """Returns a copy of the model in which a method trains, with an attention that vmap can batch."""
        model = self.fresh()
        model.set_attn_implementation(PLAIN)
        set_seed(seed)
        return method.adapt(model, self.parts["train"].images).eval()

    def about_head(self) -> dict[str, float]:
        """Returns the accuracy of the fitted head alone by split, and the number of images."""
        found = {"leave_one_out_accuracy": self.head.score}
        for name, part in self.parts.items():
            right = 0
            for images, labels in zip(part.images.split(100), part.labels.split(100), strict=True):
                with torch.no_grad():
                    right += int((self.model(images).logits.argmax(dim=-1) == labels).sum())
            found |= {f"{name}_accuracy": right / len(part.labels), f"{name}_images": len(part.labels)}
        return found


@torch.no_grad()
def resize_positions(model: PreTrainedModel, image_size: int) -> None:
    """Interpolates the position embeddings once, for a model that otherwise does so in each pass, if it is asked to.

    Models that interpolate by themselves, such as DINOv2, stay as they are.
    """
    asked = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if not asked or model.config.image_size == image_size:
        return
    embeddings = next(module for module in model.modules() if hasattr(module, "position_embeddings"))
    patches, old = embeddings.patch_embeddings, embeddings.position_embeddings
    side = image_size // model.config.patch_size
    tokens = old.new_zeros(1, old.shape[1] - patches.num_patches + side**2, old.shape[2])
    resized = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    embeddings.position_embeddings = nn.Parameter(resized)
    embeddings.image_size = patches.image_size = (image_size, image_size)
    patches.num_patches = side**2
    model.config.image_size = image_size


def measure(pair: Pair, compare: CompareArguments, folder: Path) -> dict[str, PlasticityReport]:
    """Returns the report of each criterion, measured by the first process, or read from `folder`."""
    wanted = [
        (criterion, inputs)
        for criterion in compare.criteria
        for inputs in (PROTOCOLS if CRITERIA[criterion].protocols else (None,))
    ]
    paths = {folder / f"{name}{'-' + inputs if inputs else ''}.json": (name, inputs) for name, inputs in wanted}
    missing = [path for path in paths if not path.is_file()]
    PartialState().wait_for_everyone()
    for path in missing:
        criterion, inputs = paths[path]
        options = {"criterion": criterion, "inputs": inputs, "max_samples": compare.max_samples, "settle": None}
        report = measure_plasticity(pair.fresh(), pair.items, pair.source, **options)
        if PartialState().is_main_process:
            report.save(path)
    PartialState().wait_for_everyone()
    return {path.stem: PlasticityReport.load(path) for path in paths}


def within_budgets(pair: Pair, compare: CompareArguments, path: Path) -> dict[str, list[str]]:
    """Returns the components that a forecast finds within each budget, or read from `path`; none if not wanted."""
    by_name = compare.methods is None or any(name.startswith("within ") for name in compare.methods)
    if "budgets" not in compare.groups or not by_name:
        return {}
    known = path.is_file()
    PartialState().wait_for_everyone()
    if known:
        return dict(json.loads(path.read_text()))
    forecast = forecast_finetuning(pair.fresh(), pair.items, budget=compare.budgets)
    found = {one.name: list(one.components) for one in forecast.sets if one.name.startswith("within ")}
    if PartialState().is_main_process:
        write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def recommended(pair: Pair, method: Method) -> dict[str, tuple[str, float]]:
    """Returns the group and the recommended rate of each parameter that trains. All processes do this together."""
    model = pair.adapted(method, seed=0)
    fit_head(model, pair.items)  # notes that the head is fitted, for its rate
    optimizer = create_plasticity_optimizer(model, torch.optim.AdamW, train_dataset=pair.items)
    ratios = {"lora_B": method.b_over_a}
    of = {
        id(parameter): (group["name"], group["lr"] * ratios.get(group["name"], 1.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: of[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(
    pair: Pair,
    models: Mapping[int, nn.Module],
    rates: Mapping[str, tuple[str, float]],
    wanted: Sequence[tuple[float, int]],
    compare: CompareArguments,
) -> list[Run]:
    """Returns a run for each (factor, seed). The factor multiplies all rates but that of the head."""
    if len(wanted) > compare.stacked:
        rest = train(pair, models, rates, wanted[compare.stacked :], compare)
        return [*train(pair, models, rates, wanted[: compare.stacked], compare), *rest]
    own = [
        {name: rate * (1.0 if group == "head" else factor) for name, (group, rate) in rates.items()}
        for factor, _ in wanted
    ]
    order = order_of_images(len(pair.items), [seed for _, seed in wanted], compare.steps)
    runs = StackedRuns([models[seed] for _, seed in wanted], own, pair.parts["train"], order)
    looks = sorted(
        {round(compare.steps * (number + 1) / compare.evaluations) for number in range(compare.evaluations)}
    )
    accuracy: dict[str, list[list[float]]] = {"validation": [], "test": []}
    for look in looks:
        runs.train(look)
        for name, values in accuracy.items():
            values.append(runs.accuracies(pair.parts[name]))
    gradient = runs.norms.cpu()
    return [
        Run(
            factor=factor,
            seed=seed,
            steps=looks,
            validation=[found[row] for found in accuracy["validation"]],
            test=[found[row] for found in accuracy["test"]],
            gradient_norm_first=float(gradient[0, row]),
            gradient_norm_mean=float(gradient[:, row].mean()),
            gradient_norm_std=float(gradient[:, row].std(correction=0)),
        )
        for row, (factor, seed) in enumerate(wanted)
    ]


def tune(
    pair: Pair,
    method: Method,
    model: nn.Module,
    rates: Mapping[str, tuple[str, float]],
    compare: CompareArguments,
) -> list[Run]:
    """Returns runs of one seed at rates a factor apart, until the best on validation images is not at an end."""
    found: dict[float, Run] = {}
    wanted = [method.lowest_factor * STEP**number for number in range(3)]
    while wanted:
        for run in train(pair, {0: model}, rates, [(factor, 0) for factor in wanted], compare):
            found[run.factor] = run
        factors = sorted(found)
        best = max(factors, key=lambda factor: (found[factor].validation[-1], -factor))
        wanted = [] if len(factors) >= compare.max_rates else [best / STEP] * (best == factors[0])
        wanted += [best * STEP] * (len(factors) < compare.max_rates and best == factors[-1])
    return [found[factor] for factor in sorted(found)]


def cost(pair: Pair, method: Method, compare: CompareArguments) -> dict[str, Any]:
    """Returns the time and the memory of a training step, measured beside that of everything."""
    images, labels = (values[:BATCH_SIZE] for values in pair.parts["train"])
    batch = {"pixel_values": images, "labels": labels}
    everything = Method("kinds", EVERYTHING, ())
    set_seed(0)
    models = {each: one.adapt(pair.fresh(), pair.parts["train"].images) for each, one in
              (("own", method), ("all", everything))}  # fmt: skip
    ways = {name: training_step(model, batch) for name, model in models.items()}
    seconds = in_turns(ways, compare.timed_rounds)
    kept = {name: kept_bytes(model, batch) for name, model in models.items()}
    weights = sum(p.numel() * p.element_size() for p in pair.model.parameters())
    memory = {name: weights + kept[name] + state_bytes(model) for name, model in models.items()}
    return {
        "seconds": seconds["own"],
        "time": seconds["own"] / seconds["all"],
        "activations": kept["own"] / kept["all"],
        "memory": memory["own"] / memory["all"],
        "memory_bytes": memory["own"],
        "peak_bytes": _peak(ways["own"]) if pair.device.type == "cuda" else None,
        "device": torch.cuda.get_device_name() if pair.device.type == "cuda" else "cpu",
    }


def _peak(step: Any) -> int:
    """Returns the peak of the device's memory in a step, in bytes; the models of the comparison are in it."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def formula(method: Method, report: PlasticityReport) -> dict[str, float]:
    """Returns the cost of whole components in full by formula; empty for other methods."""
    if not method.units or report.costs is None:
        return {}
    trained = [
        Trained(row, score.parameters) for row, score in enumerate(report.scores) if score.id in set(method.units)
    ]
    found = report.costs.of(trained)
    return {"time": found.time, "activations": found.activations, "memory": found.memory}


def compared(
    pair: Pair,
    method: Method,
    rates: Mapping[str, tuple[str, float]],
    report: PlasticityReport,
    compare: CompareArguments,
) -> Result:
    """Trains a method as often as it takes, and returns what it came to."""
    models = {seed: pair.adapted(method, seed) for seed in range(compare.seeds)}
    tuned = tune(pair, method, models[0], rates, compare) if compare.max_rates > 1 else []
    best = max(tuned, key=lambda run: (run.validation[-1], -run.factor)).factor if tuned else 1.0
    wanted = [(factor, seed) for factor in dict.fromkeys((best, 1.0)) for seed in range(compare.seeds)]
    known = {(run.factor, run.seed): run for run in tuned}
    missing = [each for each in wanted if each not in known]
    known |= dict(zip(missing, train(pair, models, rates, missing, compare) if missing else [], strict=True))
    trained = [p for p in models[0].parameters() if p.requires_grad]
    return Result(
        group=method.group,
        method=method.name,
        training=method.training,
        units=list(method.units),
        modules=len(method.modules),
        parameters=sum(p.numel() for p in trained) - sum(p.numel() for p in _head(models[0], rates)),
        rates={name: float(f"{rate:.4g}") for name, rate in dict(rates.values()).items()},
        best_factor=best,
        tuned=tuned,
        runs=[known[each] for each in wanted],
        formula=formula(method, report),
    )


def _head(model: nn.Module, rates: Mapping[str, tuple[str, float]]) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if rates.get(name, ("", 0.0))[0] == "head"]


def settings(model_arguments: ModelArguments, data: DataArguments, compare: CompareArguments) -> dict[str, object]:
    """Returns what all runs of a comparison must share. Folders are named without their place."""
    model = Path(model_arguments.model_name_or_path)
    dataset = data.dataset_name or "digits"
    return {
        **asdict(model_arguments),
        "model_name_or_path": model.name if model.is_dir() else str(model),
        **asdict(data),
        "dataset_name": Path(dataset).name if Path(dataset).exists() else dataset,
        **{key: getattr(compare, key) for key in ("steps", "seeds", "max_test_samples", "evaluations")},
    }


def check_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Writes the settings of the comparison. Exits if the folder contains results of other settings."""
    path = folder / "settings.json"
    if path.is_file():
        # A setting that did not exist then had what is the default now.
        usual = {each.name: each.default for kind in (ModelArguments, DataArguments) for each in fields(kind)}
        before = usual | json.loads(path.read_text())
        changed = sorted(key for key in settings if before.get(key) != json.loads(json.dumps(settings[key])))
        if changed:
            raise SystemExit(
                f"{folder} contains results of other settings ({', '.join(changed)} changed). Give another "
                "--output_dir."
            )
    write_text(path, json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Parses the arguments, then measures, trains what is missing, and writes the tables."""
    parser = HfArgumentParser((ModelArguments, DataArguments, CompareArguments))
    model_arguments, data, compare = parser.parse_args_into_dataclasses()
    state = PartialState(cpu=not torch.accelerator.is_available())
    torch.set_float32_matmul_precision(compare.matmul_precision)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    for noisy in ("httpx", "datasets", "evaluate", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    folder = Path(compare.output_dir)
    for name in ("runs", "costs", "reports"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        check_settings(folder, settings(model_arguments, data, compare))
    disable_progress_bars()
    pair = Pair(model_arguments, data, compare)
    if state.is_main_process:
        write_text(folder / "head.json", json.dumps(pair.about_head(), indent=2) + "\n")
    reports = measure(pair, compare, folder / "reports")
    found = within_budgets(pair, compare, folder / "budgets.json")
    methods, picks = Catalog(pair.model, reports, compare.shares, found).methods()
    if state.is_main_process:
        add(folder / "picks.json", picks)
        add(folder / "criteria.json", {name: report.ranking()[0].unit for name, report in reports.items()})
        scores = {name: {one.unit: one.score for one in report.ranking()} for name, report in reports.items()}
        add(folder / "scores.json", scores)
    wanted = in_order([method for method in methods if method.group in compare.groups], compare.methods)
    if "train" in compare.stages:
        train_methods(pair, wanted, reports, compare)
    if "cost" in compare.stages:
        measure_costs(pair, wanted, compare)
    if "forecast" in compare.stages:
        forecast_methods(pair, wanted, folder)
    state.wait_for_everyone()
    if state.is_main_process and list((folder / "runs").iterdir()):
        write(load(folder), folder)
        logger.info("The tables are in %s", folder)


def in_order(methods: Sequence[Method], names: Sequence[str] | None) -> list[Method]:
    """Returns the methods of these names, in the order of the names; without names, all of them."""
    if names is None:
        return list(methods)
    return [method for name in names for method in methods if method.name == name]


def missing(methods: Sequence[Method], folder: Path) -> list[Method]:
    """Returns the methods that have no file in `folder`, to every process the same."""
    found = [method for method in methods if not (folder / f"{method.file}.json").is_file()]
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        logger.info("%s: %d of %d methods to do", folder.name, len(found), len(methods))
    return found


def train_methods(
    pair: Pair, wanted: Sequence[Method], reports: Mapping[str, PlasticityReport], compare: CompareArguments
) -> None:
    """Trains the methods that have no result yet. The processes share them."""
    state, folder = PartialState(), Path(compare.output_dir) / "runs"
    left = missing(wanted, folder)
    for start in range(0, len(left), state.num_processes):
        turn = left[start : start + state.num_processes]
        rates = [recommended(pair, method) for method in turn]
        if state.process_index >= len(turn):
            continue
        method = turn[state.process_index]
        result = compared(pair, method, rates[state.process_index], next(iter(reports.values())), compare)
        write_text(folder / f"{method.file}.json", json.dumps(asdict(result), indent=1) + "\n")
        logger.info("%-45s best factor %.2g, test %.2f %%", method.name, result.best_factor, 100 * result.accuracy())


def measure_costs(pair: Pair, wanted: Sequence[Method], compare: CompareArguments) -> None:
    """Measures the methods that have no cost yet, in the first process, while the others wait."""
    folder = Path(compare.output_dir) / "costs"
    for method in missing(wanted, folder):
        if PartialState().is_main_process:
            found = cost(pair, method, compare)
            write_text(folder / f"{method.file}.json", json.dumps(found, indent=1) + "\n")
            logger.info("%-45s %.2f of the time of everything", method.name, found["time"])


def forecast_methods(pair: Pair, wanted: Sequence[Method], folder: Path) -> None:
    """Writes forecasts of the methods that train whole components in full, on the images that they train on.

    One is of the sets that `forecast_finetuning` has by default, one of all sets. If there are runs, sets that were
    not trained are left out, so that what the forecast advises can be compared with them.
    """
    trained = [one for one in wanted if (folder / "runs" / f"{one.file}.json").is_file()] or wanted
    everything = tuple(part.id for part in find_components(pair.model))
    sets = [one.units or everything for one in trained if one.units or one.name == EVERYTHING]
    usual = [{part.id for part in parts} for parts in usual_sets(find_components(pair.model)).values()]
    scopes = {"kinds": [units for units in sets if set(units) in usual], "all": sets}
    found = {
        scope: forecast_finetuning(pair.fresh(), pair.items, sets=chosen) for scope, chosen in scopes.items() if chosen
    }
    if PartialState().is_main_process:
        values = {scope: forecast.to_dict() for scope, forecast in found.items()}
        write_text(folder / "forecast.json", json.dumps(values, indent=1) + "\n")


def add(path: Path, values: Mapping[str, object]) -> None:
    """Writes values to a JSON file, beside those that it has. So a comparison can go on with other criteria."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    write_text(path, json.dumps(before | values, indent=2) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    main()
