"""What breaks off, fills up or is half there: nothing is lost, nothing half-written is taken for whole."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image

from plasticity_peft import (
    PlasticityConfig,
    PlasticityError,
    PlasticityReport,
    checkpoints,
    load_adapter,
    measure_plasticity,
)
from plasticity_peft.checkpoints import last_whole_checkpoint, why_not_whole
from plasticity_peft.errors import FileError
from plasticity_peft.files import replaced_when_whole, write_text
from tests.support.forking import TIMEOUT, run_script
from tests.support.models import REPOSITORY, random_images, saved_base, tiny_model
from tests.support.processes import launch
from tests.support.training import trainer_of

TRAIN = REPOSITORY / "examples" / "train.py"
SHORT = [
    "--num_train_epochs", "3", "--max_train_samples", "16", "--per_device_train_batch_size", "8",
    "--learning_rate", "0.001", "--max_samples", "8", "--test_fraction", "0.2", "--validation_fraction", "0.2",
    "--use_cpu", "true", "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Returns the arguments of a run on a few images of two brightnesses."""
    images = tmp_path_factory.mktemp("images")
    for number in range(30):
        folder = images / ("dark" if number % 2 else "light")
        folder.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 200 - 150 * (number % 2) + number).save(folder / f"{number}.png")
    return ["--dataset_name", images, *SHORT]


def run_and_kill(folder: Path, plan: list[dict[str, Any]], timeout: int = TIMEOUT) -> tuple[list[int], list[str]]:
    """Returns how the runs of examples/train.py ended, one after the other, and what each logged."""
    for number, step in enumerate(plan):
        step["arguments"] = [str(part) for part in step["arguments"]]
        step["log"] = str(folder / f"{number}.log")
    (folder / "plan.json").write_text(json.dumps(plan))
    killing = REPOSITORY / "tests" / "support" / "killing.py"
    result = run_script(killing, TRAIN, folder / "plan.json", cwd=REPOSITORY, timeout=timeout)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), [Path(step["log"]).read_text() for step in plan]


def check_equal(one: Path, other: Path) -> None:
    """Fails unless two runs ended with the same weights, report and metrics."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "plasticity.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    metrics = [json.loads((folder / "test_results.json").read_text()) for folder in (one, other)]
    timeless = [{key: value for key, value in found.items() if "_per_" not in key} for found in metrics]
    for found in timeless:
        found.pop("test_runtime")
    assert timeless[0] == timeless[1]
    assert "test_accuracy" in timeless[0]


KILLS = [("weights", 0), ("optimizer", 1), ("deleting", 0), ("state", 0), ("config", 2)]


@pytest.mark.slow
def test_killed_while_saving_it_ends_as_if_it_had_not_been(tmp_path: Path, short: list[Any]) -> None:
    # With evaluation, the Trainer would delete a last checkpoint that is not the best.
    common = [*short, "--save_total_limit", "1", "--load_best_model_at_end", "false", "--eval_strategy", "no"]
    arguments = [*common, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "True"]
    plan = [{"arguments": [*common, "--output_dir", tmp_path / "whole"]}]
    plan += [{"arguments": arguments, "at": kill} for kill in KILLS]
    plan += [{"arguments": arguments}] * 2
    ends, logs = run_and_kill(tmp_path, [dict(step) for step in plan])
    assert ends == [0, *[-signal.SIGKILL] * len(KILLS), 0, 0], logs[-1]

    check_equal(tmp_path / "whole", tmp_path / "killed")
    measured = ["Measuring plasticity" in log for log in logs]
    anew = ["no complete checkpoint in" in log for log in logs]
    assert anew == [False, True, True, *[False] * len(KILLS)]
    assert measured == [True, True, True, *[False] * len(KILLS)]  # the report is that of the checkpoint
    assert "checkpoint-2 is not a whole checkpoint and is ignored: it has no" in logs[2]
    assert (tmp_path / "killed" / "not-whole-checkpoint-2").is_dir()
    assert "Training resumes from" in logs[3]
    assert "nothing is left to train" in logs[-1]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """The whole demo: 24 kills, half of them while something is written."""
    generator = random.Random(0)
    common = ["--use_cpu", "true", "--disable_tqdm", "true", "--compare", "false"]
    killed = [*common, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "True"]
    places = ["weights", "optimizer", "random state", "state", "report", "config", "deleting"]
    kills: list[dict[str, Any]] = []
    for number in range(24):
        if number % 2:
            kills.append({"at": (generator.choice(places), generator.randrange(2)), "seconds": 60})
        else:
            kills.append({"seconds": generator.uniform(0.5, 12)})
    plan = [{"arguments": [*common, "--output_dir", tmp_path / "whole"]}]
    plan += [{"arguments": killed, **kill} for kill in kills] + [{"arguments": killed}]
    ends, logs = run_and_kill(tmp_path, plan, timeout=3600)
    print(ends)
    assert ends[0] == ends[-1] == 0, logs[-1]
    assert ends.count(-signal.SIGKILL) >= 20
    check_equal(tmp_path / "whole", tmp_path / "killed")
    lines = [[line for line in log.splitlines() if "test accuracy" in line] for log in (logs[0], logs[-1])]
    assert len(lines[0]) == 1
    assert lines[0] == lines[1]


# Checkpoints: whole ones are taken, all others are left out, whichever file is hurt and however.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the output folder of a Trainer with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    model = get_peft_model(
        saved_base(folder / "base"), PlasticityConfig(training="lora", target_data=random_images(), max_samples=4)
    )
    trainer_of(model, folder / "out", num_train_epochs=2, load_best_model_at_end=False).train()
    return folder / "out"


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"gone": Path.unlink, "empty": empty, "cut": cut, "flipped": flip}
FILES = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_left_out(damage: str, trained: Path, tmp_path: Path) -> None:
    for name in (*FILES, "trainer_state.json", "plasticity.json", "training_args.bin"):
        if damage == "flipped" and name not in ("optimizer.pt", "rng_state.pth"):
            continue  # JSON and safetensors have no check sums, and the others are mostly padding
        if damage == "gone" and name == "training_args.bin":
            continue  # nothing is resumed from it
        out = tmp_path / name
        shutil.copytree(trained, out)
        assert last_whole_checkpoint(out, also=["plasticity.json"]) == out / "checkpoint-12"
        DAMAGES[damage](out / "checkpoint-12" / name)
        reason = why_not_whole(out / "checkpoint-12", also=["plasticity.json"])
        assert name in reason
        assert last_whole_checkpoint(out, also=["plasticity.json"]) == out / "checkpoint-6", name
        shutil.rmtree(out)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"global_step": "12"}'])
def test_a_state_that_says_no_step_is_left_out(text: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / "checkpoint-12" / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(out) == out / "checkpoint-6"


def test_the_checkpoint_that_was_written_last_counts(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    assert last_whole_checkpoint(out) == out / "checkpoint-12"
    os.utime(out / "checkpoint-6" / "trainer_state.json")  # a new run, in the folder of an old one
    assert last_whole_checkpoint(out) == out / "checkpoint-6"
    (out / "checkpoint-6").rename(out / "checkpoint-7")
    assert "step 6" in why_not_whole(out / "checkpoint-7")
    assert last_whole_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("written", "processes", "whole"),
    [
        ("", 1, True),
        ("", 2, True),
        ("01", 2, True),
        ("01", 1, True),
        ("01", 3, True),
        ("0123", 2, True),
        ("0", 2, False),
        ("1", 2, False),
        ("02", 3, False),
        ("12", 3, False),
    ],
)
def test_a_checkpoint_of_another_number_of_processes_is_whole_if_each_saved_its_state(
    written: str, processes: int, whole: bool, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "checkpoint-6")
    checkpoint = out / "checkpoint-12"
    state = checkpoint / "rng_state.pth"
    for rank in written:
        shutil.copy(state, checkpoint / f"rng_state_{rank}.pth")
    if written:
        state.unlink()
    warnings: list[str] = []
    monkeypatch.setattr(checkpoints.logger, "warning", lambda message, *values: warnings.append(message % values))
    assert last_whole_checkpoint(out, processes=processes) == (checkpoint if whole else None)
    others = any("They draw other random numbers" in warning for warning in warnings)
    assert others == (whole and len(written or "0") != processes)
    assert whole == (why_not_whole(checkpoint, processes=processes) == "")
    assert why_not_whole(checkpoint, processes=None) == ""


def test_a_trainer_goes_on_from_a_checkpoint_of_weights_alone(trained: Path, tmp_path: Path) -> None:
    config = PlasticityConfig(training="lora", target_data=random_images(), max_samples=4)
    model = get_peft_model(saved_base(tmp_path / "base"), config)
    out = tmp_path / "out"
    options = {"save_only_model": True, "load_best_model_at_end": False, "num_train_epochs": 2}
    trainer_of(model, out, **options).train()
    assert last_whole_checkpoint(out) is None
    checkpoint = last_whole_checkpoint(out, save_only_model=True)
    assert checkpoint == out / "checkpoint-12"
    again = trainer_of(model, out, **{**options, "num_train_epochs": 3})
    assert again.train(resume_from_checkpoint=str(checkpoint)).global_step == 18
    (checkpoint / "adapter_model.safetensors").unlink()
    assert last_whole_checkpoint(out, save_only_model=True) != checkpoint


# Adapters: whatever is half there is refused, by a message that names it.


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = get_peft_model(tiny_model(), PlasticityConfig(training="lora", criterion="bound", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "plasticity.json"])
def test_a_half_written_adapter_is_refused(name: str, damage: str, adapter: Path) -> None:
    DAMAGES[damage](adapter / name)
    before = {key: value.clone() for key, value in tiny_model().state_dict().items()}
    model = tiny_model()
    if (name, damage) == ("plasticity.json", "gone"):  # a LoRA adapter like any other
        assert load_adapter(model, adapter).peft_config["default"].peft_type == "LORA"
        return
    with pytest.raises(PlasticityError, match=name):
        load_adapter(model, adapter)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name == "plasticity.json":
        with pytest.raises(PlasticityError, match=name):
            PlasticityReport.load(adapter / name)
    else:
        with pytest.raises(
            Exception, match=r"(?i)header|buffer|json|expecting|not find|locate|unterminated|offline|repo id"
        ):
            PeftModel.from_pretrained(tiny_model(), str(adapter))


def test_the_config_comes_last(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    get_peft_model(tiny_model(), PlasticityConfig(training="lora", criterion="bound")).save_pretrained(adapter)
    assert order[-1] == "adapter_config.json"
    assert "plasticity.json" in order
    assert not [*adapter.glob(".*"), *adapter.glob("_*")]


@pytest.mark.parametrize("stage", ["first", "second", "moving"])
def test_interrupted_a_folder_keeps_the_old_or_has_no_config(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("adapter_config.json", "weights"):
        (tmp_path / name).write_text("old")
    replace = os.replace

    def fails(a: Any, b: Any) -> None:
        if Path(b).name == "adapter_config.json":
            raise OSError("stopped")
        replace(a, b)

    if stage == "moving":
        monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="stopped"):  # noqa: PT012, SIM117
        with replaced_when_whole(tmp_path, last="adapter_config.json") as new:
            if stage == "first":
                raise OSError("stopped")
            (new / "weights").write_text("new")
            if stage == "second":
                raise OSError("stopped")
            (new / "adapter_config.json").write_text("new")
            (new / "second").mkdir()
            (new / "second" / "weights").write_text("new")
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    expected = (
        {"weights": "new", "second/weights": "new"}
        if stage == "moving"
        else {"adapter_config.json": "old", "weights": "old"}
    )
    assert found == expected


# Places that cannot be written to.


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that another user can look into."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_report_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measure_plasticity(tiny_model(), criterion="condition_number")
    report.save(tmp_path / "report.json")
    old = (tmp_path / "report.json").read_text()
    cases = {"missing/report.json": "No such file", "report.json/report.json": "Not a directory", ".": "directory"}
    for name, reason in cases.items():
        with pytest.raises(FileError, match=f"Cannot write .*{reason}"):
            report.save(tmp_path / name)

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"No space left on device\. The old file is unchanged") as caught:
        report.save(tmp_path / "report.json")
    assert caught.value.errno == 28
    assert (tmp_path / "report.json").read_text() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


def test_a_written_file_has_the_rights_of_the_old_one(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "text")
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new").chmod(0o600)
    write_text(tmp_path / "new", "other text")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").read_text() == "other text"


def test_errors_of_the_example_are_a_line_and_lose_nothing(tmp_path: Path, shared: Path, short: list[Any]) -> None:
    (tmp_path / "file").write_text("mine")
    out = shared / "out"
    out.mkdir(mode=0o755)
    (out / "plasticity.json").write_text("mine")
    shutil.copytree(out, tmp_path / "full")
    report = tmp_path / "report.json"
    measure_plasticity(tiny_model(), criterion="condition_number").save(report)
    cut(report)
    limit = 40_000  # more than a report has, and less than the adapter
    user = 65534 if os.getuid() == 0 else None
    if user is None:
        out.chmod(0o555)
    cases: list[tuple[str, list[Any], dict[str, Any]]] = [
        (r"Cannot write into --output_dir .*file: (File exists|Not a directory)", ["--output_dir", tmp_path / "file"],
         {}),
        (r"Cannot write into --output_dir .*out: Permission denied", ["--output_dir", out], {"user": user}),
        (r"OSError: Cannot write .*full/checkpoint-2: .*(File too large|os error 27)",
         ["--output_dir", tmp_path / "full"], {"limit": limit}),
        (r"ReportError: Cannot read the report .*gone.json: No such file", ["--output_dir", tmp_path / "a", "--report",
         tmp_path / "gone.json"], {}),
        (r"ReportError: Cannot read the report .*report.json: it is not a whole JSON file", ["--output_dir",
         tmp_path / "b", "--report", report], {}),
        (r"Cannot resume from .*checkpoint-3: there is no such folder", ["--output_dir", tmp_path / "c",
         "--resume_from_checkpoint", tmp_path / "checkpoint-3"], {}),
    ]  # fmt: skip
    ends, logs = run_and_kill(tmp_path, [{"arguments": [*short, *more], **how} for _, more, how in cases])
    assert ends == [1] * len(cases), logs
    for (message, _, _), log in zip(cases, logs, strict=True):
        assert "Traceback" not in log
        assert re.search(message, log.strip().splitlines()[-1]), log
    assert (tmp_path / "file").read_text() == "mine"
    assert (out / "plasticity.json").read_text() == "mine"
    assert (tmp_path / "full" / "plasticity.json").read_text() == "mine"


# Processes that die beside others.

KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from accelerate import PartialState
from peft import get_peft_model
from plasticity_peft import PlasticityConfig
from plasticity_peft.measuring.processes import this_process
from tests.support.models import random_images, tiny_model
from tests.support.training import trainer_of

stage, folder = sys.argv[1], Path(sys.argv[2])
rank, count = this_process()
assert count == 2
(folder / f"pid-{rank}").write_text(str(os.getpid()))

def die():
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

class Deadly(torch.utils.data.Dataset):
    read = 0
    def __len__(self):
        return 40
    def __getitem__(self, index):
        self.read += 1
        if stage == "probe" and self.read == 9:
            die()
        return random_images(40)[index]

config = PlasticityConfig(target_data=Deadly(), settle=None, batch_size=2)
model = get_peft_model(tiny_model(), config)
trainer = trainer_of(model, folder / "out", ddp_find_unused_parameters=False)
original, steps = trainer.training_step, []

def step(*args, **kwargs):
    steps.append(1)
    if len(steps) == 3:
        die()
    return original(*args, **kwargs)

trainer.training_step = step
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("stage", ["probe", "training"])
def test_where_a_process_is_killed_the_others_end(stage: str, machines: int, tmp_path: Path) -> None:
    """Every launcher ends with an error, within a minute after a process was killed."""
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    start = time.monotonic()
    results = launch(script, stage, tmp_path, processes=2, machines=machines)
    killed = (tmp_path / "pid-1").stat().st_mtime
    print(stage, machines, f"{time.monotonic() - start:.1f} s in all, {time.time() - killed:.1f} s after the start")
    assert time.time() - killed < 60
    assert all(result.returncode != 0 for result in results), [result.stderr for result in results]
    assert "SIGKILL" in "".join(result.stderr for result in results)
    for rank in range(2):
        assert not Path("/proc", (tmp_path / f"pid-{rank}").read_text()).exists()
