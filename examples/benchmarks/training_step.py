"""A training step of an adapter of this package, compared with stock PEFT on the same modules.

    python examples/benchmarks/training_step.py        ViT-S at 224 px, about three minutes on two cores

Both models train the same modules in the same way. A forward pass, a backward pass and a step of AdamW are timed in
turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from harness import StepArguments, classifier, in_turns, report, training_step
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser

from plasticity_peft import PlasticityConfig

COLUMNS = {
    "training": "training",
    "units": "chosen",
    "parameters": "trained parameters",
    "stock": "stock PEFT, s",
    "ours": "ours, s",
    "ratio": "ratio",
}


@dataclass
class BenchmarkArguments(StepArguments):
    """The settings of the benchmark."""

    top_k: int = field(default=2, metadata={"help": "Kinds that are trained."})
    rounds: int = field(default=15, metadata={"help": "Number of timed rounds."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/benchmarks/training_step.json", metadata={"help": "JSON file to write."})


def row_of(arguments: BenchmarkArguments, training: str) -> dict[str, object]:
    """Returns the times of both in one training mode."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, arguments.image_size, arguments.image_size, generator=generator)
    options = {"max_samples": 32, "batch_size": 8, "top_k": arguments.top_k, "training": training}
    config = PlasticityConfig(target_data=images, **options)
    ours = get_peft_model(classifier(arguments), config)
    stock = get_peft_model(
        classifier(arguments), LoraConfig(target_modules=config.target_modules, modules_to_save=config.modules_to_save)
    )
    parameters = [model.get_nb_trainable_parameters()[0] for model in (stock, ours)]
    if parameters[0] != parameters[1]:
        raise RuntimeError(f"The two train different numbers of parameters: {parameters}.")
    batch = images[: arguments.batch_size]
    times = in_turns({"stock": training_step(stock, batch), "ours": training_step(ours, batch)}, arguments.rounds)
    return {
        "training": training,
        "units": " ".join(config.selection.units),
        "parameters": parameters[1],
        **times,
        "ratio": times["ours"] / times["stock"],
    }


def main() -> None:
    """Prints the table and writes the numbers."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.num_threads)
    rows = [row_of(arguments, training) for training in ("lora", "full")]
    title = f"{arguments.size}, {arguments.image_size} px: a training step on {arguments.batch_size} images"
    report(title, COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
