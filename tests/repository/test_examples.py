"""The examples run, from the commands that they name, and write what they say."""

from __future__ import annotations

import copy
import importlib
import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from peft import PeftModel
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from plasticity_peft import PlasticityReport, measure_plasticity
from plasticity_peft.errors import DataError, ModelError, SelectionError
from tests.support.forking import run_script
from tests.support.models import REPOSITORY, tiny_model
from tests.support.processes import launch

TRAIN = REPOSITORY / "examples" / "train.py"
COMPARE = REPOSITORY / "examples" / "compare_components.py"
MODEL = REPOSITORY / "examples" / "fashion-mnist-vit"
SHORT = ["--num_train_epochs", "1", "--max_train_samples", "48", "--per_device_train_batch_size", "16"]
SHORT += ["--max_samples", "16", "--disable_tqdm", "true"]
DIGITS = [*SHORT, "--test_fraction", "0.02", "--validation_fraction", "0.02"]
"""The demo, trained and evaluated on few images."""
ONCE = [*DIGITS, "--compare", "false", "--learning_rate", "0.001"]
"""The same without the table, and at a rate that need not be measured."""


def run(*arguments: object, script: Path = TRAIN, processes: int = 1) -> str:
    """Returns what the example logged, from a folder that is not the repository."""
    result = run_script(script, *arguments, processes=processes, cwd=REPOSITORY.parent)
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the folder of a run without arguments, but for those that make it short, and what it logged."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(*DIGITS, "--compare_seeds", "1", "--output_dir", folder)


@pytest.mark.parametrize(
    ("name", "kind"), [("cpu", "multi_gpu"), ("ddp", "multi_gpu"), ("fsdp2", "use_fsdp"), ("zero3", "use_deepspeed")]
)
def test_accelerate_reads_the_launch_files(name: str, kind: str) -> None:
    """Every field is one that Accelerate knows, and says how the processes work together."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = REPOSITORY / "examples" / "launch" / f"{name}.yaml"
    assert load_config_from_file(str(path)).num_processes == 2
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    )
    assert arguments.num_processes == 2
    assert [each for each in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(arguments, each)] == [kind]
    if name == "fsdp2":
        model = AutoModelForImageClassification.from_pretrained(MODEL)
        assert arguments.fsdp_transformer_layer_cls_to_wrap in {type(part).__name__ for part in model.modules()}
        assert arguments.fsdp_version in (2, "2")


@pytest.mark.slow
def test_what_will_disappoint_is_said_before_training(tmp_path: Path) -> None:
    wrong = ["--training", "full", "--learning_rate", "0.05", "--budget", "0.2"]
    result = run_script(TRAIN, *DIGITS, *wrong, "--output_dir", tmp_path, processes=1, cwd=REPOSITORY.parent)
    assert result.returncode == 1
    found = re.search(r"Give a budget of at least ([\d.]+), .* --report (\S+) selects", result.stderr)
    report = PlasticityReport.load(found[2])
    with pytest.raises(SelectionError):
        report.select(budget=0.2, training="full")
    wrong[wrong.index("0.2")] = found[1]
    log = run(*DIGITS, *wrong, "--compare", "false", "--report", found[2], "--output_dir", tmp_path)
    warned = log.index("times the rate that is recommended for what trains (matrix)")
    assert warned < log.index("head + ")
    assert "enlarged" not in log  # small images cost little
    assert "A step will take" not in log


def test_sizes_and_times_that_disappoint_are_named() -> None:
    plan = load_example("plan")
    assert list(plan.about_size((224, 224), (224, 300), 16)) == []
    assert list(plan.about_size((28, 28), (8, 8), 4)) == []
    (enlarged,) = plan.about_size((224, 224), (56, 60), [16, 16])
    assert "of 56 x 60 pixels are enlarged to 224 x 224" in enlarged
    (rest,) = plan.about_size((50, 56), (100, 100), 14)
    assert "56 x 50 pixels do not consist of whole patches of 14" in rest
    assert list(plan.about_time(29, 100)) == []
    (slow,) = plan.about_time(90, 100)
    assert "about 0:01:30, and the 100 steps about 2:30:00" in slow


def test_without_arguments_it_compares_with_stock_peft_and_with_everything(demo: tuple[Path, str]) -> None:
    folder, log = demo
    assert "| rank | kind | parameter plasticity |" in log
    assert "Parameter plasticity of vit" in log
    assert log.count("head + MHA trains") == 1
    rows = rows_of(log)
    assert list(rows) == [
        "fitted head alone",
        "stock LoRA on query and value",
        "stock LoRA on all linear layers",
        "selected: MHA (full)",
        "everything in full",
    ]
    assert not any("±" in row for row in rows.values())
    assert re.search(r"Images of 28 x 28 pixels, 50 tokens each; 3 steps of 16 images", log)
    first = re.search(r"Step 0 of 3: .*validation accuracy ([\d.]+) %", log)  # of the fitted head, before any step
    assert float(first.group(1)) > 50
    assert "LOAD REPORT" not in log
    assert "Warning" not in log
    report = PlasticityReport.load(folder / "plasticity.json")
    assert (report.criterion, report.observed, report.samples) == ("parameter_plasticity", "images", 16)
    written = json.loads((folder / "plasticity.json").read_text())
    assert list(written["adapter"]["id2label"].values()) == [str(digit) for digit in range(10)]
    base = AutoModelForImageClassification.from_pretrained(MODEL, num_labels=10)
    PeftModel.from_pretrained(base, folder)
    assert AutoImageProcessor.from_pretrained(folder).size == AutoImageProcessor.from_pretrained(MODEL).size


def rows_of(log: str) -> dict[str, str]:
    """Returns the accuracies in the table of the demo, by what was trained."""
    return dict(re.findall(r"^\| ([^|]+) \| [\d.]+ % \| ([\d.]+ %[^|]*) \|", log, re.MULTILINE))


@pytest.mark.slow
def test_several_seeds_have_a_standard_error(tmp_path: Path) -> None:
    rows = rows_of(run(*DIGITS, "--compare_seeds", "2", "--output_dir", tmp_path))
    assert ["±" in row for row in rows.values()] == [False, *[True] * 4]


@pytest.mark.slow
def test_resumes_with_the_report_of_the_checkpoint(tmp_path: Path) -> None:
    short = [*ONCE, "--output_dir", tmp_path, "--save_strategy", "steps"]
    short += ["--save_steps", "1"]
    short += ["--load_best_model_at_end", "false", "--save_total_limit", "10"]
    run(*short, "--training", "full", "--granularity", "component", "--top_k", "3")
    log = run(
        *short, "--training", "full", "--granularity", "component", "--top_k", "3",
        "--resume_from_checkpoint", tmp_path / "checkpoint-2",
    )  # fmt: skip
    assert "Measuring plasticity" not in log
    assert "| rank | kind |" in log


def test_chooses_again_from_a_report(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, first = demo
    log = run(
        *ONCE, "--max_steps", "1", "--output_dir", tmp_path,
        "--report", folder / "plasticity.json", "--top_k", "2", "--candidates", "MHA", "FC2",
    )  # fmt: skip
    assert "Selected: MHA (full)" in first
    assert "Selected: MHA, FC2 (full)" in log
    assert "Measuring plasticity" not in log


def test_the_arguments_may_be_in_a_file(tmp_path: Path) -> None:
    options = dict(zip((name.removeprefix("--") for name in ONCE[::2]), ONCE[1::2], strict=True))
    options |= {"output_dir": str(tmp_path / "out"), "save_merged": "true", "measure_every": 1}
    path = tmp_path / "arguments.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name, value in options.items()))
    log = run(path)
    assert "plasticity/MHA" in log
    merged = pipeline("image-classification", str(tmp_path / "out" / "merged"))
    assert len(merged(Image.new("L", (8, 8)))) == 5
    base = AutoModelForImageClassification.from_pretrained(MODEL, num_labels=10)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    images = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(merged.model(images).logits, adapted(images).logits, rtol=1e-4, atol=1e-4)
    path.write_text("output_dirr: x")
    with pytest.raises(AssertionError, match=r"Cannot read the arguments in .*output_dirr"):
        run(path)


@pytest.mark.parametrize("form", ["folder", pytest.param("parquet", marks=pytest.mark.slow)])
def test_images_of_the_user(form: str, tmp_path: Path) -> None:
    if form == "folder":
        for index in range(40):
            folder = tmp_path / "images" / ("dark" if index % 2 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 30), 40 + 150 * (1 - index % 2) + index).save(folder / f"{index}.png")
        name = tmp_path / "images"
    else:
        name = REPOSITORY / "examples" / "data" / "fashion_mnist.parquet"
    log = run(
        *SHORT, "--dataset_name", name, "--learning_rate", "0.001", "--horizontal_flip", "true",
        "--training", "lora", "--budget", "0.05",
        "--output_dir", tmp_path, "--criterion", "rate_of_change", "--candidates", "MHA", "FC1", "FC2",
    )  # fmt: skip
    assert "pairs of two target images" in log
    assert "fitted head alone" not in log
    labels = json.loads((tmp_path / "plasticity.json").read_text())["adapter"]["id2label"]
    assert labels["0"] == ("dark" if form == "folder" else "T-shirt/top")


@pytest.mark.slow
def test_two_processes_train_together(tmp_path: Path) -> None:
    check_trained_by_two(run(*ONCE, "--output_dir", tmp_path, processes=2), tmp_path)


@pytest.mark.slow
def test_launched_by_accelerate(tmp_path: Path) -> None:
    (result,) = launch(TRAIN, *DIGITS, "--compare", "false", "--output_dir", tmp_path, cwd=REPOSITORY.parent)
    assert result.returncode == 0, result.stderr
    check_trained_by_two(result.stderr + result.stdout, tmp_path)


def check_trained_by_two(log: str, folder: Path) -> None:
    assert log.count("test accuracy") == 1
    assert (folder / "adapter_model.safetensors").is_file()


def test_help_names_every_option_of_ours() -> None:
    text = run("--help")
    for option in ("--training", "--top_k", "--budget", "--report", "--push_to_hub", "--dataset_name", "--criterion"):
        assert option in text


SCRIPTS = [
    path
    for path in sorted((REPOSITORY / "examples").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=[str(path.relative_to(REPOSITORY)) for path in SCRIPTS])
def test_every_script_says_what_it_takes(script: Path) -> None:
    assert "usage" in run("--help", script=script)


def test_rates_are_compared(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "benchmarks" / "rates.py"
    output = tmp_path / "rates.jsonl"
    options = ["--steps", "2", "--seeds", "2", "--factors", "0.4", "1", "2.5", "--methods", "norms"]
    run(*SMALL[:6], *options, "--output", output, script=script)
    (row,) = map(json.loads, output.read_text().splitlines())
    assert np.shape(row["test"]) == (2, 3)
    assert "within_a_point" in run("--summary", "true", "--output", output, script=script)


SMALL = ["--dataset_name", REPOSITORY / "examples" / "data" / "fashion_mnist.parquet", "--max_train_samples", "64"]
SMALL += ["--test_fraction", "0.05", "--validation_fraction", "0.05", "--max_samples", "16", "--timed_rounds", "1"]
SMALL += ["--steps", "2", "--evaluations", "1", "--max_rates", "4", "--criteria", "parameter_plasticity", "bound"]


@pytest.mark.slow
def test_methods_are_compared_and_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    arguments = [*SMALL, "--seeds", "2", "--output_dir", tmp_path, "--methods"]
    assert "runs: 1 of 1 methods to do" in run(*arguments, "MHA", script=COMPARE)
    (first,) = (tmp_path / "runs").iterdir()
    written = first.stat().st_mtime_ns
    names = ["everything", "MHA"]
    assert "runs: 1 of 2 methods to do" in run(*arguments, *names, script=COMPARE)
    assert first.stat().st_mtime_ns == written
    comparison = load_example("comparison").load(tmp_path)
    for result in comparison.results.values():
        tried = {run.factor: run.validation[-1] for run in result.tuned}
        assert tried[result.best_factor] == max(tried.values())
        # The best rate is not at an end, unless no more were tried.
        assert len(tried) == 4 or min(tried) < result.best_factor < max(tried)
        assert {(run.factor, run.seed) for run in result.runs} == {
            (factor, seed) for factor in (result.best_factor, 1.0) for seed in (0, 1)
        }
        assert all(run.gradient_norm_first > 0 for run in result.runs)
    everything, attention = comparison.results["everything (full)"], comparison.results["MHA (full)"]
    assert everything.cost["memory"] == 1
    assert attention.cost["activations"] == pytest.approx(attention.formula["activations"], abs=0.05)
    assert attention.parameters == 6 * 4 * (96 * 96 + 96)
    errors = load_example("forecasts").errors(comparison)
    assert set(errors.index) == {"MHA", "everything"}
    gain = 100 * (np.mean(list(attention.tests(attention.best_factor).values())) - comparison.head["test_accuracy"])
    assert errors.loc["MHA", "trained"] == pytest.approx(gain)
    table = pd.read_csv(tmp_path / "methods.csv", index_col="name")
    assert table.loc["MHA (full)", "test"] == pytest.approx(
        np.mean(list(attention.tests(attention.best_factor).values())), rel=1e-4
    )
    assert re.search(r"\| everything +\| full \|", (tmp_path / "results.md").read_text())
    other = ["3" if option == "2" else option for option in arguments]
    with pytest.raises(AssertionError, match=r"results of other settings \(seeds, steps changed\)"):
        run(*other, "MHA", script=COMPARE)
    run("--folders", tmp_path, "--destination", tmp_path / "all", script=COMPARE.with_name("summarize.py"))
    assert "Points lost by the recommended rates" in (tmp_path / "all" / "summary.md").read_text()
    for name in ("fronts.png", "kinds.png"):
        assert (tmp_path / "all" / name).stat().st_size > 1000


def test_the_tables_in_the_repository_follow_from_its_runs(tmp_path: Path) -> None:
    results = REPOSITORY / "examples" / "results"
    pairs = sorted(path.parent for path in results.glob("*/runs"))
    run("--folders", *pairs, "--destination", tmp_path, script=COMPARE.with_name("summarize.py"))
    for path in [results / "summary.md", *(pair / "results.md" for pair in pairs)]:
        assert (tmp_path / path.relative_to(results)).read_text() == path.read_text(), path


def test_the_tables_of_larger_images_follow_from_their_runs() -> None:
    load, as_markdown = load_example("comparison").load, load_example("summarize").as_markdown
    pairs = sorted(path.parent for path in (REPOSITORY / "examples" / "results" / "larger").glob("*/runs"))
    assert pairs
    for pair in pairs:
        assert as_markdown(load(pair)) == (pair / "results.md").read_text(), pair


def test_methods_whose_rates_were_not_tuned_are_compared_at_the_recommended_ones_alone() -> None:
    comparison = load_example("comparison").load(REPOSITORY / "examples" / "results" / "dinov2-cifar10")
    untuned = {name for name, result in comparison.results.items() if not result.tuned}
    assert {"bound, 0.33 (full)", "random 1, 0.33 (full)"} <= untuned
    best, recommended, whole = comparison.table(), comparison.table("recommended"), comparison.whole_table()
    assert set(best.index) == set(comparison.results) - untuned
    assert set(recommended.index) == set(whole.index) == set(comparison.results)
    assert whole.loc[sorted(untuned), "test"].isna().all()
    assert whole["recommended"].to_dict() == recommended["test"].to_dict()
    chosen = comparison.selected()["0.33"]
    runs = comparison.results["bound, 0.33 (full)"].runs
    assert chosen["bound"] == pytest.approx(np.mean([run.test[-1] for run in runs if run.factor == 1]))
    regrets = comparison.regrets().set_index("criterion")["0.33"]
    assert regrets["bound"] == pytest.approx(100 * (max(chosen.values()) - chosen["bound"]))
    assert regrets.min() >= 0
    # If nothing was tuned, the recommended rates are the best ones that are known.
    comparison = load_example("comparison").Comparison(
        [replace(result, tuned=[]) for result in comparison.results.values()],
        comparison.first, comparison.picks, comparison.head, comparison.model, {}, {},
    )  # fmt: skip
    assert set(comparison.table().index) == set(comparison.results)


def test_a_criterion_orders_kinds_as_training_does_if_its_scores_grow_with_accuracy() -> None:
    comparison = load_example("comparison").load(REPOSITORY / "examples" / "results" / "demo-inverted")
    kinds = comparison.kinds()
    assert list(kinds.index) == ["LN1", "MHA", "LN2", "FC1", "FC2"]
    tests = {kind: comparison.results[f"{kind} (full)"].accuracy() for kind in kinds.index}
    comparison.scores = {
        "grows": {kind: 3 * test for kind, test in tests.items()},
        "falls": {kind: 1 / test for kind, test in sorted(tests.items())},
        "one pair": {
            kind: test + (0.2 if kind == min(tests, key=tests.__getitem__) else 0) for kind, test in tests.items()
        },
    }
    # The worst one as the best: it is in the wrong order with each of the four others, of ten pairs.
    assert comparison.orders().to_dict() == pytest.approx({"grows": 1.0, "falls": -1.0, "one pair": 0.2})


def test_a_share_of_the_weights_is_compared_on_the_pairs_on_which_criteria_were_trained() -> None:
    summarize, load = load_example("summarize"), load_example("comparison").load
    pairs = {path.parent.name: load(path.parent) for path in (REPOSITORY / "examples" / "results").glob("*/runs")}
    found = summarize.shares(pairs)
    assert set(found["0.33"]) == set(pairs)
    runs = REPOSITORY.glob("examples/results/*/runs/components-parameter_plasticity_0.50-full.json")
    assert set(found["0.50"]) == {path.parents[1].name for path in runs}
    header, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in summarize.selections(found["0.50"], "0.50").splitlines()
        if line.startswith("| ")
    )
    assert header == ["components", *found["0.50"], "mean", "worst"]
    table = {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in rows}
    digits, early = pairs["demo-digits"], "MHA + FC1 of the first half"
    known = {f"({early})": digits.results[f"{early} (full)"].accuracy("recommended")}
    for name, accuracy in (known | digits.selected()["0.50"]).items():
        assert table[name]["demo-digits"] == f"{100 * (accuracy - digits.everything.accuracy()):.1f}"


def test_advice_not_to_finetune_is_compared_too() -> None:
    comparison, forecasts = load_example("comparison"), load_example("forecasts")
    loaded = comparison.load(REPOSITORY / "examples" / "results" / "demo-noise")
    forecast = loaded.forecasts["kinds"]
    assert forecast.recommended is not None
    sets = tuple(replace(one, gain=0.0) for one in forecast.sets)
    loaded.forecasts = {"kinds": replace(forecast, sets=sets)}
    rows = forecasts.advice({"noise": loaded}).set_index("choice")
    everything = np.mean(list(loaded.everything.tests(loaded.everything.best_factor).values()))
    for choice in ("recommended", "safest"):
        assert rows.loc[choice, "chosen"] == "1 x nothing but the head"
        assert rows.loc[choice, "mean"] == pytest.approx(100 * (loaded.head["test_accuracy"] - everything))


def test_a_method_is_compared(tmp_path: Path) -> None:
    options = ["--seeds", "1", "--max_rates", "3", "--stages", "train", "--methods", "attention output"]
    log = run(*SMALL[:-1], *options, "--output_dir", tmp_path, script=COMPARE)
    assert "runs: 1 of 1 methods to do" in log
    (result,) = load_example("comparison").load(tmp_path).results.values()
    assert {run.factor for run in result.runs} == {1.0, result.best_factor}
    assert "attention output" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_sets_within_budgets_are_compared_at_recommended_rates(tmp_path: Path) -> None:
    options = ["--seeds", "2", "--max_rates", "1", "--stages", "train", "--budgets", "0.6 time", "0.8 time"]
    options += ["--methods", "within 0.6 of the time", "everything", "--output_dir", tmp_path]
    assert "runs: 2 of 2 methods to do" in run(*SMALL[:-1], *options, script=COMPARE)
    comparison = load_example("comparison")
    loaded = comparison.load(tmp_path)
    result = loaded.results["within 0.6 of the time (full)"]
    assert result.formula["time"] <= 0.6
    assert result.units == json.loads((tmp_path / "budgets.json").read_text())[result.method]
    assert [(run.factor, run.seed) for run in result.runs] == [(1.0, 0), (1.0, 1)]
    assert not result.tuned
    assert set(comparison.means({"one": loaded}).index) == set(loaded.results)
    assert (tmp_path / "front.png").stat().st_size > 1000


@pytest.mark.slow
def test_processes_share_the_methods(tmp_path: Path) -> None:
    names = ["--methods", "attention output", "LoRA+ on all linear layers, r=8", "--seeds", "1", "--max_rates", "3"]
    log = run(*SMALL, "--output_dir", tmp_path, *names, script=COMPARE, processes=2)
    assert log.count("runs: 2 of 2 methods to do") == 1
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_stacked_runs_train_as_torch_does_one_by_one() -> None:
    """The same batches, rates, clipping and schedule through torch's AdamW."""
    stacked = load_example("stacked")
    model = tiny_model().eval()
    own = copy.deepcopy(model)
    own.set_attn_implementation(stacked.PLAIN)
    images, labels = torch.randn(70, 3, 8, 8), torch.arange(70) % 3
    rates = [{name: rate for name, _ in model.named_parameters()} for rate in (1e-3, 1e-2)]
    rows = stacked.order_of_images(len(images), [0, 5], 4)
    runs = stacked.StackedRuns([own, own], rates, stacked.Part(images, labels), rows)
    for until in (1, 4):
        runs.train(until)
    for one, rate in enumerate((1e-3, 1e-2)):
        alone = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(alone.parameters(), lr=rate, weight_decay=0.0)
        for number in range(4):
            optimizer.param_groups[0]["lr"] = rate * stacked.scheduled(number, 4)
            loss = alone(images[rows[number][one]], labels=labels[rows[number][one]]).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
            assert float(runs.norms[number][one]) == pytest.approx(float(norm), rel=1e-3)
            optimizer.step()
        logits = runs.logits({name: values[one] for name, values in runs.values.items()}, images)
        assert torch.allclose(logits, alone(images).logits, atol=2e-3)
    assert len({int(row) for batch in rows[:2] for row in batch[0]}) == 64  # an epoch repeats no image


def test_resized_positions_are_those_that_transformers_interpolates() -> None:
    compare = load_example("compare_components")
    model = tiny_model().eval()
    images = torch.randn(2, 3, 12, 12)
    expected = model(images, interpolate_pos_encoding=True).logits
    compare.resize_positions(model, 12)
    assert torch.allclose(model(images).logits, expected, atol=1e-6)


def test_a_difference_has_students_interval() -> None:
    from scipy import stats

    comparison = load_example("comparison")
    values = [0.1, 0.4, 0.2, 0.3]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert comparison.interval(values) == pytest.approx((expected.low, expected.high))
    assert np.isnan(comparison.interval([1.0])).all()


def test_a_shifted_dataset_keeps_its_labels(tmp_path: Path) -> None:
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    script = REPOSITORY / "examples" / "fashion_mnist.py"
    tables = {}
    for shift in (None, "inverted", "low_contrast", "noise"):
        path = tmp_path / f"{shift}.parquet"
        run("--samples", "40", "--destination", path, *(["--shift", shift] if shift else []), script=script)
        rows = parquet.read_table(path).to_pylist()
        images = [np.asarray(Image.open(BytesIO(row["image"]["bytes"])), dtype=float) for row in rows]
        tables[shift] = (np.stack(images), [row["label"] for row in rows])
    plain, labels = tables[None]
    assert np.bincount(labels).tolist() == [4] * 10
    assert all(found[1] == labels for found in tables.values())
    assert np.array_equal(tables["inverted"][0], 255 - plain)
    assert tables["low_contrast"][0].std() == pytest.approx(plain.std() / 5, rel=0.01)
    assert 30 < (tables["noise"][0] - plain).std() < 64


def load_example(name: str) -> ModuleType:
    """Returns a module of the examples, which import each other as if they lay on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "examples")
        return importlib.import_module(name)


def test_the_model_of_the_demo_is_small_and_clean() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size < 4 * 2**20
    with safe_open(weights, "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float32"}  # noqa: SIM118
    assert "/" not in json.loads((MODEL / "config.json").read_text()).get("_name_or_path", "")
    assert not [name for name in json.loads((MODEL / "config.json").read_text()) if name.startswith("_")]


def test_pretraining_gives_the_same_weights_twice(tmp_path: Path) -> None:
    data = Path("/usr/share/datasets/fashion-mnist")
    if not data.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    digests = set()
    for name in ("first", "second"):
        run(
            "--destination", tmp_path / name, "--max_steps", "2", "--max_train_samples", "64",
            "--per_device_train_batch_size", "8", "--max_eval_samples", "64", "--disable_tqdm", "true",
            "--use_cpu", "true", script=REPOSITORY / "examples" / "pretrain.py",
        )  # fmt: skip
        digests.add((tmp_path / name / "fashion-mnist-vit" / "model.safetensors").read_bytes())
    assert len(digests) == 1
    committed = REPOSITORY / "examples" / "data" / "fashion_mnist.parquet"
    tables = [parquet.read_table(path) for path in (tmp_path / "first" / "data" / committed.name, committed)]
    assert tables[0].equals(tables[1])
    assert len(tables[0]) == 512


def test_the_rate_factor_of_the_example_multiplies_recommended_rates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    train, baselines = load_example("train"), load_example("baselines")
    model = tiny_model()
    images = [{"pixel_values": torch.rand(3, 8, 8) + label, "labels": label} for label in (0, 1) * 8]
    found = []
    for options in ({"rate_factor": 1.0}, {"rate_factor": 0.4}):
        arguments = train.FinetuningArguments(str(tmp_path), report_to="none", **options)
        optimizer = baselines.recommended_optimizer(model, arguments, images, steps=100)
        found.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        # What was recommended before has the factor in it.
        again = baselines.recommended_optimizer(model, arguments, images, steps=100, rates=found[-1])
        assert {group["name"]: group["lr"] for group in again.param_groups} == found[-1]
    assert {name: found[1][name] / found[0][name] for name in found[0]} == pytest.approx(
        {"head": 1, "vector": 0.4, "matrix": 0.4}
    )


@pytest.mark.parametrize(
    ("given", "forecast", "steps", "expected"),
    [
        ({}, None, 99, 1.0),
        ({}, None, 100, 0.7),  # by short runs
        ({}, 0.25, 100, 0.25),
        ({"rate_factor": 0.4}, 0.25, 100, 0.4),
        ({"learning_rate": 1e-3}, 0.25, 100, 1.0),
        ({"learning_rate": 1e-3}, None, 100, 1.0),
    ],
)
def test_the_rate_factor_of_the_example_is_given_or_that_of_the_forecast_or_of_short_runs(
    given: dict[str, float],
    forecast: float | None,
    steps: int,
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    train = load_example("train")
    model = tiny_model()
    images = [{"pixel_values": torch.rand(3, 8, 8) + label, "labels": label} for label in (0, 1) * 8]
    report = measure_plasticity(model, images, forecast=forecast is not None)
    if forecast is not None:
        pilot = replace(report.forecast.pilot, rate_factor=forecast)
        report = replace(report, forecast=replace(report.forecast, pilot=pilot))
    arguments = train.FinetuningArguments(str(tmp_path), report_to="none", **given)
    monkeypatch.setattr(train, "find_rate_factor", lambda *_, **__: 0.7)
    assert train.rate_factor(arguments, report, model, images, steps) == expected


@pytest.mark.parametrize("error", [ModelError("no linear layer"), torch.OutOfMemoryError("out of memory\nmore")])
def test_the_example_trains_at_the_recommended_rates_if_short_runs_fail_and_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    train = load_example("train")
    report = measure_plasticity(tiny_model(), torch.rand(8, 3, 8, 8))

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(train, "find_rate_factor", fails)
    arguments = train.FinetuningArguments(str(tmp_path), report_to="none")
    assert train.rate_factor(arguments, report, tiny_model(), [], 100) == 1.0
    assert caplog.messages[-1].endswith(f"failed: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("given", ["0", "-1", "inf", "nan", "often", None])
def test_a_rate_factor_that_is_no_number_is_refused_before_anything_is_read(
    given: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    train = load_example("train")
    assert (train.checked_rate_factor("auto"), train.checked_rate_factor("0.4")) == ("auto", 0.4)
    with pytest.raises(SystemExit, match=rf"--rate_factor must be a number above 0, or auto\. Got {given}\."):
        train.checked_rate_factor(given)


def test_labels_are_numbered_alike_in_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    train = load_example("train")
    data = train.DataArguments(dataset_name="pets")
    image = Image.new("RGB", (4, 4))

    def parts(first: list, second: list) -> DatasetDict:
        both = {"train": first * 8, "test": second * 8}
        return DatasetDict(
            {n: Dataset.from_dict({"image": [image] * len(labels), "label": labels}) for n, labels in both.items()}
        )

    for first, second, names in (
        ([1, 2, 10], [2, 10], ["1", "2", "10"]),
        (["dog", "cat"], ["cat", "owl"], ["cat", "dog", "owl"]),
    ):
        found = train.split(parts(first, second), data, seed=0)
        assert set(found) == {"train", "validation", "test"}
        for name, expected in (("train", first), ("validation", first), ("test", second)):
            feature = found[name].features["label"]
            assert feature.names == names
            assert {feature.int2str(label) for label in found[name]["label"]} == {str(one) for one in expected}
    named = parts([0, 1], [1, 0]).cast_column("label", ClassLabel(names=["cat", "dog"]))
    swapped = DatasetDict(
        train=named["train"], test=named["test"].cast_column("label", ClassLabel(names=["dog", "cat"]))
    )
    test = train.split(swapped, data, seed=0)["test"]
    assert [test.features["label"].int2str(label) for label in test["label"]] == ["cat", "dog"] * 8

    data.label_column = "breed"
    with pytest.raises(DataError, match=r"The train split of the dataset pets has no column 'breed'.*--label_column"):
        train.split(named, data, seed=0)
    with pytest.raises(DataError, match="The dataset pets has no split 'train'"):
        train.split(DatasetDict(test=named["test"]), data, seed=0)
