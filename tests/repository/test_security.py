"""What docs/security.md says: nothing that others wrote is executed, and nothing leaves."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import REPOSITORY
from tests.support.processes import environment, python

EXECUTE = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
UNPICKLE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib"}
PROGRAMS = {"subprocess", "pty", "ctypes", "runpy", "importlib.util", "code"}
CALLS = {
    "import_module", "resolve_name", "read_pickle", "system", "popen", "execv", "execve", "spawnv", "unsafe_load",
    "full_load", "load_state_dict_from_url", "hub.load", "load_dynamic_module", "get_class_from_dynamic_module",
}  # fmt: skip
"""Functions, by the end of their name, that run what they are given or read it from elsewhere."""
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell", "custom_generate"}
"""Arguments that allow it, unless they are literally False."""


def dotted(node: ast.expr) -> str:
    """Returns `a.b.c` of an expression, with "" for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(source: str) -> Iterator[str]:
    """Yields what a file does that could execute what others wrote, or reach for the network by itself."""
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in modules:
            if {name, name.split(".")[0]} & (UNPICKLE | NETWORK | PROGRAMS):
                yield f"line {node.lineno}: imports {name}"
        if isinstance(node, ast.Call):
            yield from calls(node, dotted(node.func))


def calls(node: ast.Call, name: str) -> Iterator[str]:
    """Yields what is wrong with one call of the function `name`."""
    given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if name in EXECUTE or any(f".{name}".endswith(f".{end}") for end in CALLS):
        yield f"line {node.lineno}: calls {name}"
    for keyword in KEYWORDS & set(given):
        if not (isinstance(given[keyword], ast.Constant) and given[keyword].value is False):
            yield f"line {node.lineno}: {keyword} is not False"
    if name.split(".")[-2:] == ["torch", "load"]:
        only = given.get("weights_only")
        if not (isinstance(only, ast.Constant) and only.value is True):
            yield f"line {node.lineno}: torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.load_all"):
        yield f"line {node.lineno}: {name}"


ALLOWED: dict[str, tuple[str, ...]] = {
    "plasticity_peft/extras.py": ("calls import_module",),  # of the name of an extra, which is written in our code
    "plasticity_peft/criteria/registry.py": ("calls resolve_name",),  # of a built-in criterion
    # Of the modules that the user names with --plugin, whose purpose it is that they are executed.
    "plasticity_peft/cli/plugins.py": ("calls import_module", "imports importlib.util"),
    "examples/benchmarks/startup.py": ("imports subprocess",),  # to start the command line
    "examples/benchmarks/streaming.py": ("imports subprocess",),  # to start itself, for a peak of memory of its own
    "examples/benchmarks/scaling.py": ("imports subprocess",),  # to start itself by `accelerate launch`
}
FILES = sorted([*(REPOSITORY / "plasticity_peft").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_file_executes_what_others_wrote(path: Path) -> None:
    allowed = ALLOWED.get(str(path.relative_to(REPOSITORY)), ())
    assert not [finding for finding in findings(path.read_text()) if not finding.endswith(allowed)]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import load", "import joblib", "import urllib.request", "import requests",
        "from socket import create_connection", "import subprocess", "eval('1')", "exec(text)", "__import__(name)",
        "importlib.import_module(name)", "pkgutil.resolve_name(name)", "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)", "np.load(path, allow_pickle=True)", "pd.read_pickle(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "f(trust_remote_code=flag)", "yaml.load(text)",
        "os.system('ls')", "torch.hub.load('a', 'b')", "yaml.unsafe_load(text)",
    ],
)  # fmt: skip
def test_what_would_be_found(line: str) -> None:
    assert list(findings(line))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "torch.load(p, weights_only=True)",
        "json.loads(t)",
        "f(trust_remote_code=False)",
        "re.compile(p)",
    ],
)
def test_what_is_harmless(line: str) -> None:
    assert not list(findings(line))


WATCHED = """
import os, pathlib, sys, tempfile, warnings
warnings.simplefilter("ignore")
import matplotlib
matplotlib.use("agg")
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
import scipy.stats, pydantic, accelerate.utils  # imported on use otherwise
from plasticity_peft import PlasticityConfig, PlasticityReport, load_adapter, measure_plasticity

folder = pathlib.Path(sys.argv[1])
network, written = [], []
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg",
           "urllib.Request", "http.client.connect"}
PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"}

def watch(event, arguments):
    if event in NETWORK or event in PROGRAMS:
        network.append((event, str(arguments)))
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open" and (set(str(arguments[1])) & set("wax+") or (arguments[2] or 0) & writes):
        written.append(str(arguments[0]))

config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
                   patch_size=4, num_labels=3)
torch.manual_seed(0)
ViTForImageClassification(config).save_pretrained(folder / "base")
base = lambda: ViTForImageClassification.from_pretrained(folder / "base")
images = torch.rand(12, 3, 8, 8)
data = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(images)]
measure_plasticity(base(), images, max_samples=4)  # once unwatched, so that lazy imports are done
model = base()
sys.addaudithook(watch)

report = measure_plasticity(model, images, max_samples=8)
measure_plasticity(model, images, criterion="rate_of_change", inputs="embedding", max_samples=8)
measure_plasticity(model, data, criterion="gradient_norm", max_samples=8)
print(report)
assert not written, f"measuring wrote {written}"
report.save(folder / "report.json")
loaded = PlasticityReport.load(folder / "report.json")
adapted = get_peft_model(model, PlasticityConfig(report=loaded, training="lora"))
arguments = TrainingArguments(output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=4,
                              report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
                              remove_unused_columns=False)
Trainer(model=adapted, args=arguments, train_dataset=data).train()
adapted.save_pretrained(folder / "adapter")
load_adapter(base(), folder / "adapter")
PeftModel.from_pretrained(base(), folder / "adapter")
temporary = os.path.realpath(tempfile.gettempdir())
here = (str(folder.resolve()), temporary, os.devnull)
elsewhere = [path for path in written if not os.path.realpath(path).startswith(here) and not path.isdigit()]
assert not elsewhere, f"written elsewhere: {elsewhere}"
assert not network, f"reached for: {network}"
print("reached for nothing")
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
assert not network, f"reached for: {network}"
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Returns a process that measures, trains, saves and loads, and then reaches out.

    The libraries are not told to stay offline: that they have no reason to go online is what is shown.
    """
    online = {key: value for key, value in environment().items() if not key.endswith("_OFFLINE")}
    folder = tmp_path_factory.mktemp("watched")
    return python("-c", WATCHED, folder, env={**online, "PYTHONDONTWRITEBYTECODE": "1"})


def test_measuring_training_saving_and_loading_reach_for_nothing(watched: subprocess.CompletedProcess[str]) -> None:
    assert watched.stdout.splitlines()[-1:] == ["reached for nothing"], watched.stderr


def test_reaching_out_would_be_seen(watched: subprocess.CompletedProcess[str]) -> None:
    assert watched.returncode == 1
    seen = ("reached for: [('socket.connect'", "reached for: [('socket.getaddrinfo'")
    assert any(text in watched.stderr for text in seen), watched.stderr
