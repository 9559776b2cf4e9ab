"""All that behaves differently on a GPU, in one run: measuring, training steps, memory, batches that do not fit.

    python examples/benchmarks/gpu.py                  on a GPU: ViT-B at 224 px, two minutes on an H100
    python examples/benchmarks/gpu.py --compile true   training steps compiled by torch.compile, too

It runs on a CPU as well, with a smaller model, and leaves out what needs a GPU. It prints the tables and writes them
as JSON and as Markdown. All ratios compare what ran in turns.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from costs import CHOICES, trained
from full_memory import BenchmarkArguments as MemoryArguments
from full_memory import row_of as full_memory
from harness import (
    MEASURES,
    SIZES,
    as_markdown,
    classifier,
    in_turns,
    training_step,
    vit_config,
    write_sections,
)
from peft import LoraConfig, get_peft_model
from probe import WAYS
from torch import nn
from transformers import BitsAndBytesConfig, HfArgumentParser, ViTForImageClassification, ViTModel
from transformers.utils import is_bitsandbytes_available
from transformers.utils.logging import disable_progress_bar

from plasticity_peft import PlasticityConfig, measure_plasticity
from plasticity_peft.components.architecture import find_architecture

Row = dict[str, Any]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEBIBYTE = 2**20


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    size: str = field(
        default="ViT-B" if ON_GPU else "ViT-S", metadata={"help": "ViT-S, ViT-B or ViT-L.", "choices": list(SIZES)}
    )
    image_size: int = field(default=224 if ON_GPU else 64, metadata={"help": "Pixels; patches are 16 wide."})
    batch_size: int = field(default=64 if ON_GPU else 4, metadata={"help": "Images per step, and pairs per pass."})
    samples: int = field(default=64 if ON_GPU else 8, metadata={"help": "Images or pairs to measure on."})
    rounds: int = field(default=10 if ON_GPU else 2, metadata={"help": "Number of timed rounds."})
    compile: bool = field(default=False, metadata={"help": "Time compiled training steps, too, which takes minutes."})
    sections: list[str] | None = field(default=None, metadata={"help": "Only these sections, by their function."})
    output: str = field(default="outputs/benchmarks/gpu.json", metadata={"help": "JSON file to write."})


def images_of(arguments: BenchmarkArguments, count: int, device: torch.device = DEVICE) -> torch.Tensor:
    """Returns random images, the same each time."""
    size = (count, 3, arguments.image_size, arguments.image_size)
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(device)


def peak_of(call: Callable[[], object]) -> float | None:
    """Returns the peak memory of the GPU during a call in MiB, above what was allocated before; None on a CPU."""
    if not ON_GPU:
        call()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE


def largest_difference(scores: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the largest relative difference."""
    return float(np.max(np.abs(np.array(scores) / np.array(reference) - 1)))


def measuring(arguments: BenchmarkArguments) -> Iterator[Row]:
    """Scores in each dtype, against those of the CPU in float32, and pairs a second"""
    pairs = images_of(arguments, arguments.samples, torch.device("cpu"))
    for name, options in MEASURES.items():
        reference = measure_plasticity(
            classifier(arguments), pairs, max_samples=arguments.samples, settle=None, **options
        )
        for precision, dtype in DTYPES.items():
            if dtype == torch.float16 and not ON_GPU:
                continue
            model = classifier(arguments).to(DEVICE, dtype)
            call = partial(
                measure_plasticity, model, pairs, max_samples=arguments.samples, settle=None,
                batch_size=arguments.batch_size, **options,
            )  # fmt: skip
            call()
            start = time.perf_counter()
            found = call()
            seconds = time.perf_counter() - start
            yield {
                "criterion": name,
                "dtype": precision,
                "largest relative difference": largest_difference(
                    [score.mean for score in found.scores], [score.mean for score in reference.scores]
                ),
                "same order of kinds": [row.unit for row in found.ranking()]
                == [row.unit for row in reference.ranking()],
                "images or pairs a second": arguments.samples / seconds,
                "peak MiB above the model": peak_of(call),
            }


def passes(arguments: BenchmarkArguments) -> Iterator[Row]:
    """A pass over pairs, against the straightforward procedure and two plain forward passes"""
    torch.manual_seed(0)
    model = ViTModel(vit_config(arguments.size, arguments.image_size), add_pooling_layer=False).eval().to(DEVICE)
    architecture = find_architecture(model)
    x, y = ({"pixel_values": batch} for batch in images_of(arguments, 2 * arguments.batch_size).chunk(2))
    with torch.no_grad():
        ways = {name: partial(way, model, architecture, x, y) for name, (_, way) in WAYS.items()}
        times = in_turns(ways, arguments.rounds)
        for name, way in ways.items():
            yield {
                "way": name,
                "pairs a second": arguments.batch_size / times[name],
                "time, ratio to two plain passes": times[name] / times["activation, two plain passes"],
                "peak MiB above the model": peak_of(way),
            }


def steps(arguments: BenchmarkArguments) -> Iterator[Row]:
    """A training step of each choice of the cost table: measured and by formula, everything in full is 1"""
    images = images_of(arguments, arguments.batch_size)
    report = measure_plasticity(classifier(arguments), images[:8].cpu(), max_samples=8)
    selections = {name: report.select(**options) for name, options in CHOICES.items()}

    def built(name: str) -> nn.Module:
        if name == "everything":
            return classifier(arguments).to(DEVICE)
        mode = CHOICES[name].get("training", "lora")
        return trained(arguments, selections[name].modules, mode).to(DEVICE)

    def once(name: str) -> None:
        step = training_step(built(name), images)
        step()
        step()

    peaks = {name: peak_of(partial(once, name)) for name in ("everything", *CHOICES)}
    times = in_turns({name: training_step(built(name), images) for name in peaks}, arguments.rounds)
    for name, chosen in selections.items():
        peak, everything = peaks[name], peaks["everything"]
        yield {
            "trained": name,
            "time": times[name] / times["everything"],
            "by formula": chosen.cost.time,
            "peak memory": peak / everything if peak and everything else None,
            "memory by formula": chosen.cost.memory,
            "peak MiB": peak,
            "seconds": times[name],
        }
    yield {"trained": "everything", "time": 1.0, "peak MiB": peaks["everything"], "seconds": times["everything"]}


def stock(arguments: BenchmarkArguments) -> Iterator[Row]:
    """A training step of this package, against stock PEFT on the same modules"""
    images = images_of(arguments, arguments.batch_size)
    compiled = {"eager": False, **({"compiled": True} if arguments.compile else {})}
    for mode in ("lora", "full"):
        config = PlasticityConfig(target_data=images[:32], max_samples=32, top_k=2, training=mode)
        ours = get_peft_model(classifier(arguments).to(DEVICE), config)
        lora = LoraConfig(target_modules=config.target_modules, modules_to_save=config.modules_to_save)
        theirs = get_peft_model(classifier(arguments).to(DEVICE), lora)
        for how, wanted in compiled.items():
            models = {"ours": ours, "stock": theirs}
            ways = {name: torch.compile(model) if wanted else model for name, model in models.items()}
            times = in_turns({name: training_step(way, images) for name, way in ways.items()}, arguments.rounds)
            yield {"training": mode, "step": how, "ours, s": times["ours"], "stock PEFT, s": times["stock"],
                   "ratio": times["ours"] / times["stock"]}  # fmt: skip


def full_mode(arguments: BenchmarkArguments) -> Iterator[Row]:
    """Peak memory of training one kind in full, against requires_grad alone and stock PEFT"""
    if not ON_GPU:
        return
    own = MemoryArguments(size=arguments.size, image_size=arguments.image_size)
    report = measure_plasticity(classifier(arguments), criterion="bound")
    full_memory("MHA", own, report, DEVICE)  # the first one allocates what stays
    for place in ("device", "cpu"):
        for kind in ("MHA", "FC1", "FC2"):
            yield {"adapted on": place, **full_memory(kind, replace(own, adapt_on=place), report, DEVICE)}


@contextmanager
def little_memory(mebibytes: float) -> Iterator[None]:
    """Inside, torch may allocate only so much more of the GPU than it has."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mebibytes * MEBIBYTE) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def halving(arguments: BenchmarkArguments) -> Iterator[Row]:
    """Measuring in batches that do not fit: halved, with the same scores"""
    if not ON_GPU:
        return
    pairs = images_of(arguments, 4 * arguments.samples, torch.device("cpu"))
    model = classifier(arguments).to(DEVICE)
    for name, options in MEASURES.items():
        call = partial(measure_plasticity, model, pairs, max_samples=len(pairs), settle=None, **options)
        needed = peak_of(lambda call=call: call(batch_size=len(pairs)))
        reference = call(batch_size=len(pairs))
        with little_memory(0.4 * (needed or 0.0)):
            found = call(batch_size=len(pairs))
        yield {
            "criterion": name,
            "MiB that a batch takes": needed,
            "MiB allowed": 0.4 * (needed or 0.0),
            "largest relative difference": largest_difference(
                [score.mean for score in found.scores], [score.mean for score in reference.scores]
            ),
        }


def copies(arguments: BenchmarkArguments) -> Iterator[Row]:
    """Measuring on images that are on the device already, and on images in CPU memory"""
    model = classifier(arguments).to(DEVICE)
    places = {"on the device": DEVICE, "in CPU memory": torch.device("cpu")}
    ways = {
        name: partial(
            measure_plasticity, model, images_of(arguments, 4 * arguments.samples, place), settle=None,
            max_samples=4 * arguments.samples, batch_size=arguments.batch_size,
        )
        for name, place in places.items()
    }  # fmt: skip
    times = in_turns(ways, max(1, arguments.rounds // 3))
    for name, seconds in times.items():
        yield {
            "images": name,
            "images a second": 4 * arguments.samples / seconds,
            "ratio": seconds / times["on the device"],
        }


def quantized(arguments: BenchmarkArguments) -> Iterator[Row]:
    """LoRA on 8-bit and 4-bit models by bitsandbytes"""
    if not is_bitsandbytes_available():
        return
    images = images_of(arguments, arguments.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        classifier(arguments).save_pretrained(folder)
        for bits in (8, 4):
            options = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": ["classifier"]}
            model = ViTForImageClassification.from_pretrained(
                folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": DEVICE}
            )
            adapted = get_peft_model(
                model, PlasticityConfig(target_data=images[:32], max_samples=32, candidates="MHA", training="lora")
            )
            step = training_step(adapted, images)
            step()
            yield {
                "bits": bits,
                "seconds a step": in_turns({"": step}, arguments.rounds)[""],
                "peak MiB": peak_of(step),
            }


SECTIONS: dict[str, Callable[[BenchmarkArguments], Iterator[Row]]] = {
    each.__name__: each for each in (measuring, passes, steps, stock, full_mode, halving, copies, quantized)
}


def write(
    path: Path, machine: Mapping[str, Any], arguments: BenchmarkArguments, found: Mapping[str, list[Row]]
) -> None:
    """Writes what was found so far as JSON, and as Markdown beside it."""
    where = f"{machine['device']}, torch {machine['torch']}; {arguments.size}, {arguments.image_size} px"
    titles = {name: str(section.__doc__) for name, section in SECTIONS.items()}
    write_sections(path, where, {"machine": machine, "arguments": asdict(arguments)}, found, titles)


def main() -> None:
    """Runs the sections one after the other. One that fails does not stop the others."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says that it casts, for each layer
    machine = {"device": torch.cuda.get_device_name() if ON_GPU else "CPU", "torch": torch.__version__}
    found: dict[str, list[Row]] = {}
    failed = []
    for name in arguments.sections or SECTIONS:
        found[name] = []
        try:
            for row in SECTIONS[name](arguments):
                found[name].append(row)
        except Exception as error:
            warnings.warn(f"{name}: {type(error).__name__}: {error}", stacklevel=1)
            failed.append(name)
        if found[name]:
            print(as_markdown(str(SECTIONS[name].__doc__), found[name]), end="\n\n", flush=True)
        write(Path(arguments.output), machine, arguments, found)
    if failed:
        raise SystemExit(f"These sections failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
