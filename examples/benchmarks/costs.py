"""The cost of a training step by formula (`Selection.cost`), compared with what is measured.

    python examples/benchmarks/costs.py        ViT-S at 224 px, about four minutes on one core

A forward pass, a backward pass and a step of AdamW are timed in turns, on one thread. The activations are the bytes
that autograd keeps in a forward pass, weights and images excepted. All columns are ratios to finetuning everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from harness import StepArguments, classifier, in_turns, report, training_step
from peft import LoraConfig, get_peft_model
from step_cost import kept_bytes
from torch import nn
from transformers import HfArgumentParser

from plasticity_peft import measure_plasticity

KINDS = ("MHA", "FC1", "FC2")
LATE: dict[str, Any] = {"granularity": "component", "training": "full"}
CHOICES: dict[str, dict[str, Any]] = {
    "LoRA on all linear layers, r=8": {"candidates": KINDS, "top_k": 3},
    "LoRA on MHA, r=8": {"candidates": ("MHA",)},
    "MHA, full": {"candidates": ("MHA",), "training": "full"},
    "FC1, full": {"candidates": ("FC1",), "training": "full"},
    "FC2, full": {"candidates": ("FC2",), "training": "full"},
    "MHA and FC1, full": {"candidates": ("MHA", "FC1"), "top_k": 2, "training": "full"},
    "norms": {"candidates": ("LN1", "LN2"), "top_k": 2, "training": "full"},
    "MHA in 0.6 of the time, full": {"budget": "0.6 time", **LATE, "candidates": ("MHA",)},
    "all in 0.5 of the time, full": {"budget": "0.5 time", **LATE},
    "all in 0.3 of the memory, full": {"budget": "0.3 memory", **LATE},
}
COLUMNS = {
    "choice": "trained",
    "time": "time by formula",
    "measured_time": "measured",
    "activations": "activations by formula",
    "measured_activations": "measured",
    "parameters": "trained parameters",
}


@dataclass
class BenchmarkArguments(StepArguments):
    """The settings of the benchmark."""

    rounds: int = field(default=5, metadata={"help": "Number of timed rounds."})
    num_threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/benchmarks/costs.json", metadata={"help": "JSON file to write."})


def trained(arguments: BenchmarkArguments, modules: tuple[str, ...], mode: str) -> nn.Module:
    """Returns a model in which only some modules and the head train: by stock LoRA, or by requires_grad."""
    model = classifier(arguments)
    if mode == "lora":
        return get_peft_model(model, LoraConfig(target_modules=list(modules), modules_to_save=["classifier"]))
    model.requires_grad_(False)
    for path in (*modules, "classifier"):
        model.get_submodule(path).requires_grad_(True)
    return model


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.num_threads)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    scores = measure_plasticity(classifier(arguments), images, max_samples=8)
    selections = {name: scores.select(**options) for name, options in CHOICES.items()}
    models = {
        name: trained(arguments, chosen.modules, CHOICES[name].get("training", "lora"))
        for name, chosen in selections.items()
    }
    models["everything"] = classifier(arguments)
    times = in_turns({name: training_step(model, images) for name, model in models.items()}, arguments.rounds)
    batch = {"pixel_values": images, "labels": torch.arange(len(images)) % 10}
    kept = {name: kept_bytes(model, batch) for name, model in models.items()}
    rows = [
        {
            "choice": name,
            "time": chosen.cost.time,
            "measured_time": times[name] / times["everything"],
            "activations": chosen.cost.activations,
            "measured_activations": kept[name] / kept["everything"],
            "parameters": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
        }
        for name, chosen in selections.items()
    ]
    title = f"{arguments.size}, {arguments.image_size} px: a training step, everything in full is 1"
    report(title, COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
