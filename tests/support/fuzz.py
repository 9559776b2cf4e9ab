"""A fuzzer for what reads files of others: `PlasticityReport.load`, `PlasticityReport.from_dict` and `load_adapter`.

    python -m tests.support.fuzz --inputs 100000 --seed 0

Valid files are damaged, byte by byte or in their structure. What comes out must be an error of ours, or something that
works; a model that was not adapted must be as it was. The process may not grow by more than `--memory` GiB, and an
input may not take longer than `--seconds`. Inputs that break a rule are kept under `--keep`, and the status is 1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import faulthandler
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from plasticity_peft import (
    PlasticityConfig,
    PlasticityError,
    PlasticityReport,
    find_components,
    load_adapter,
    measure_plasticity,
)
from tests.support.models import random_images, tiny_model

IMAGES = random_images(4)
OLD = Path(__file__).parent / "releases" / "transformers-4.57.6" / "vit" / "lora"
"""An adapter in the first version of the format, under the module names of another release."""
FILES = ("plasticity.json", "adapter_config.json", "adapter_model.safetensors")
TOKENS = [
    b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"\0",
    b"\xff\xfe", b"null", b"true", b'"', b"{}", b"[]", b",", b":", b"../", b".*", b"(a+)+$", b"\\u0000", b"1.5", b"-1",
    b"F8_E4M3", b"I64", b"F64", b"BOOL", b"data_offsets", b"__metadata__", b"shape", b"lora_", b"base_model.model.",
]  # fmt: skip
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf, "", "x",
    "../../x", "(a+)+(a+)+$", ".*", "\0", "\ud800", "x" * 2000, [], {}, [[]], [None], {"": None}, ["MHA"], "MHA",
    "full", "block", "component", "pissa", "gaussian", {"(.*)*x": 1}, [["a", "b"]], [10**9, 10**9], [-1], "classifier",
    ["classifier"],
]  # fmt: skip


class TooLongError(BaseException):
    """An input took longer than it may."""


def valid_folders(folder: Path) -> list[Path]:
    """Returns adapters that load, of each kind."""
    report = measure_plasticity(tiny_model(), IMAGES, inputs="embedding", max_samples=4)
    options: dict[str, Any] = {"report": report, "r": 2, "top_k": 2, "candidates": ("MHA", "LN1")}
    configs: dict[str, Any] = {
        "lora": PlasticityConfig(**{"training": "lora", **options}),
        "full": PlasticityConfig(training="full", **options),
        "dora": PlasticityConfig(use_dora=True, granularity="component", **{"training": "lora", **options}),
    }
    paths = [path for part in find_components(tiny_model()) if part.kind == "FC1" for path in part.modules]
    configs["plain"] = LoraConfig(
        r=2, target_modules=paths, modules_to_save=["classifier"], alpha_pattern={paths[0]: 3}, use_rslora=True
    )
    for name, config in configs.items():
        get_peft_model(tiny_model(), config).save_pretrained(folder / name)
    shutil.copytree(OLD, folder / "old")
    return [folder / name for name in (*configs, "old")]


# -------------------------------------------------------------------------------------------------- mutations


def damaged(raw: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Returns the bytes with a few of them changed, removed, repeated, or replaced by others."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 512))
        how = rng.randrange(7)
        if how == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[place : place + length] = rng.randbytes(length)
        elif how == 2:
            del data[place : place + length]
        elif how == 3:
            data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
        elif how == 4:
            data[place : place + rng.choice((0, length))] = rng.choice(TOKENS)
        elif how == 5:
            del data[place:]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[place : place + length] = other[start : start + length]
    return bytes(data)


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value within a value."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def restructured(values: Any, rng: random.Random) -> Any:
    """Returns a JSON value with some values dropped, repeated, replaced, renamed or buried."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = list(places(values))
        if not paths:
            break
        path = rng.choice(paths)
        parent = values
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        how = rng.randrange(7)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif how == 2 and isinstance(parent, dict):
            parent[rng.choice(["x", "", "lora_alpha", "kind", "../x", str(key) * 2])] = parent.pop(key)
        elif how == 3:
            for _ in range(rng.choice((1, 3, 200))):
                parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
        elif how == 4:
            other = values
            for step in rng.choice(paths)[: rng.choice((1, 2, 3))]:
                other = other[step] if isinstance(other, (dict, list)) and _has(other, step) else other
            parent[key] = copy.deepcopy(other)
        elif how == 5 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * rng.choice((-1, 0, 10, 10**6, 1e300, 0.5)) if abs(parent[key]) < 1e9 else 0
        else:
            parent[key] = copy.deepcopy(rng.choice(STRANGE))
    return values


def _has(values: Any, step: Any) -> bool:
    return step in values if isinstance(values, dict) else isinstance(step, int) and step < len(values)


def rebuilt(raw: bytes, rng: random.Random) -> bytes:
    """Returns a safetensors file with another header, or other tensors behind it."""
    (size,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    if rng.random() < 0.5:
        header = restructured(header, rng)
    else:
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        how = rng.randrange(5)
        if how == 0:
            entry["dtype"] = rng.choice(["F16", "BF16", "I32", "U8", "BOOL", "F64", "F8_E5M2", "C64", "x"])
        elif how == 1:
            entry["shape"] = [rng.choice((0, 1, 2, 3, 16, 10**9, 2**62)) for _ in range(rng.randrange(4))]
        elif how == 2:
            rng.shuffle(entry["shape"])
        elif how == 3:
            new = name.replace(rng.choice(["layers.0", "layer.0", "lora_A", "weight", "classifier", "."]), rng.choice(
                ["layers.1", "layers.9", "lora_B", "bias", "vit", "..", "embeddings", "x" * 2000, "lora_magnitude"]
            ))  # fmt: skip
            header[new] = header.pop(name)
        else:
            body = damaged(body, [body], rng)[: len(body)].ljust(len(body), b"\xff")
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", rng.choice((len(text),) * 20 + (0, 2**40))) + text + body


# ----------------------------------------------------------------------------------------------------- checks


class Fuzzer:
    """Makes inputs, feeds them, and counts what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.folder = folder
        self.sources = valid_folders(folder / "valid")
        self.raw = {
            source: {name: (source / name).read_bytes() for name in FILES if (source / name).exists()}
            for source in self.sources
        }
        self.reports = [source for source in self.sources if FILES[0] in self.raw[source]]
        self.all = [raw for files in self.raw.values() for raw in files.values()]
        self.work = folder / "work"
        self.base = tiny_model()
        self.weights = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.requires = {name: p.requires_grad for name, p in self.base.named_parameters()}
        self.model = copy.deepcopy(self.base)
        self.counts: collections.Counter[str] = collections.Counter()
        self.last: dict[str, bytes] = {}

    def one(self) -> None:
        """Makes one input and feeds it."""
        target: Callable[[], str] = self.rng.choice((self.report_values, self.report_file, self.adapter))
        outcome = target()
        self.counts[f"{target.__name__}: {outcome}"] += 1

    def report_values(self) -> str:
        """Feeds `PlasticityReport.from_dict` a changed report."""
        source = self.rng.choice(self.reports)
        values = restructured(json.loads(self.raw[source][FILES[0]]), self.rng)
        self.last = {"values.txt": repr(values).encode("utf-8", "backslashreplace")}
        return _read(lambda: PlasticityReport.from_dict(values))

    def report_file(self) -> str:
        """Feeds `PlasticityReport.load` a changed file."""
        raw = self._changed(self.rng.choice(self.reports), FILES[0])
        path = self.folder / "report.json"
        path.write_bytes(raw)
        self.last = {FILES[0]: raw}
        return _read(lambda: PlasticityReport.load(path))

    def adapter(self) -> str:
        """Feeds `load_adapter` a folder in which one file is changed, or two."""
        source = self.rng.choice(self.sources)
        files = dict(self.raw[source])
        for name in self.rng.sample(sorted(files), self.rng.choice((1, 1, 1, 2)) if len(files) > 1 else 1):
            files[name] = self._changed(source, name)
        if self.rng.random() < 0.02:
            files.pop(self.rng.choice(sorted(files)))
        self.last = files
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name, raw in files.items():
            (self.work / name).write_bytes(raw)
        try:
            loaded = load_adapter(self.model, self.work)
        except PlasticityError as error:
            assert str(error)  # noqa: PT017
            self._check_model()
            return type(error).__name__
        with torch.no_grad():
            loaded(pixel_values=IMAGES)
        self.model = copy.deepcopy(self.base)
        return "loaded"

    def _changed(self, source: Path, name: str) -> bytes:
        raw = self.raw[source][name]
        if self.rng.random() < 0.4:
            return damaged(raw, self.all, self.rng)
        if name == FILES[2]:
            return rebuilt(raw, self.rng)
        text = json.dumps(restructured(json.loads(raw), self.rng))
        return text.encode("utf-8", "surrogatepass")

    def _check_model(self) -> None:
        state = self.model.state_dict()
        assert state.keys() == self.weights.keys(), "the model was changed"
        assert all(torch.equal(value, self.weights[name]) for name, value in state.items()), "weights were changed"
        assert {name: p.requires_grad for name, p in self.model.named_parameters()} == self.requires, "flags"


def _read(load: Callable[[], PlasticityReport]) -> str:
    try:
        report = load()
    except PlasticityError as error:
        assert str(error)  # noqa: PT017
        return type(error).__name__
    assert str(report)
    assert len(report.select(top_k=1, granularity="component").units) == 1
    assert PlasticityReport.from_dict(report.to_dict()) == report
    return "accepted"


@contextmanager
def limited(memory: float) -> Iterator[None]:
    """Inside, the process may take so many GiB of addresses more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + int(memory * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    inputs: int, seed: int, *, seconds: float = 10, memory: float = 1, minutes: float = 1e6, keep: Path | None = None
) -> dict[str, Any]:
    """Returns what came of the inputs: counts by outcome, the slowest input, and the failures."""
    end = time.monotonic() + 60 * minutes
    failures: list[str] = []
    slowest = 0.0

    def stop(*_: object) -> None:
        raise TooLongError

    handler = signal.signal(signal.SIGALRM, stop)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzzer = Fuzzer(Path(folder), seed)
        with limited(memory):
            for number in range(inputs):
                if time.monotonic() > end:
                    break
                start = time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, seconds)
                faulthandler.dump_traceback_later(10 * seconds, exit=True)  # where a signal does not get through
                try:
                    fuzzer.one()
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    failures.append(f"input {number}: {''.join(traceback.format_exception(error))}")
                    fuzzer.model = copy.deepcopy(fuzzer.base)
                    for name, raw in fuzzer.last.items() if keep else ():
                        (keep / f"{number}").mkdir(parents=True, exist_ok=True)
                        (keep / f"{number}" / name).write_bytes(raw)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    faulthandler.cancel_dump_traceback_later()
                slowest = max(slowest, time.perf_counter() - start)
    signal.signal(signal.SIGALRM, handler)
    return {"counts": dict(sorted(fuzzer.counts.items())), "slowest": slowest, "failures": failures}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10, help="what an input may take")
    parser.add_argument("--memory", type=float, default=1, help="GiB that the process may grow by")
    parser.add_argument("--minutes", type=float, default=1e6, help="ends after so many, whatever was asked for")
    parser.add_argument("--keep", type=Path, help="folder for inputs that break a rule")
    options = parser.parse_args()
    start = time.perf_counter()
    found = fuzz(**vars(options))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for outcome, count in found["counts"].items():
        print(f"{count:8,}  {outcome}")
    for failure in found["failures"][:20]:
        print(failure, file=sys.stderr)
    seconds = time.perf_counter() - start
    done = sum(found["counts"].values()) + len(found["failures"])
    print(f"{done:,} inputs, seed {options.seed}: {len(found['failures'])} failures, {seconds:.0f} s")
    print(f"slowest input {found['slowest']:.2f} s, peak memory {peak:.2f} GiB")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
