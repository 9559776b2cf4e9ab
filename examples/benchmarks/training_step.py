"""A training step of an adapter of this package, compared with stock PEFT on the same modules.

    python examples/benchmarks/training_step.py        ViT-S at 224 px, about three minutes on two cores

Both models train the same modules in the same way. A forward pass, a backward pass and a step of AdamW are timed in
turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from harness import SIZES, in_turns, report, vit_config
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import HfArgumentParser, ViTForImageClassification

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
class BenchmarkArguments:
    """The settings of the benchmark."""

    size: str = field(default="ViT-S", metadata={"help": "ViT-S, ViT-B or ViT-L.", "choices": list(SIZES)})
    image_size: int = field(default=224, metadata={"help": "Pixels; patches are 16 wide."})
    batch_size: int = field(default=8, metadata={"help": "Images per step."})
    top_k: int = field(default=2, metadata={"help": "Kinds that are trained."})
    rounds: int = field(default=15, metadata={"help": "Number of timed rounds."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/benchmarks/training_step.json", metadata={"help": "JSON file to write."})


def build(arguments: BenchmarkArguments) -> ViTForImageClassification:
    """Returns the model."""
    torch.manual_seed(0)
    return ViTForImageClassification(vit_config(arguments.size, arguments.image_size, num_labels=10))


def step_of(model: PeftModel, images: torch.Tensor) -> Callable[[], None]:
    """Returns a training step of the model."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    labels = torch.arange(len(images)) % 10

    def step() -> None:
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def row_of(arguments: BenchmarkArguments, training: str) -> dict[str, object]:
    """Returns the times of both in one training mode."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, arguments.image_size, arguments.image_size, generator=generator)
    options = {"max_samples": 32, "batch_size": 8, "top_k": arguments.top_k, "training": training}
    config = PlasticityConfig(target_data=images, **options)
    ours = get_peft_model(build(arguments), config)
    stock = get_peft_model(
        build(arguments), LoraConfig(target_modules=config.target_modules, modules_to_save=config.modules_to_save)
    )
    parameters = [model.get_nb_trainable_parameters()[0] for model in (stock, ours)]
    if parameters[0] != parameters[1]:
        raise RuntimeError(f"The two train different numbers of parameters: {parameters}.")
    batch = images[: arguments.batch_size]
    times = in_turns({"stock": step_of(stock, batch), "ours": step_of(ours, batch)}, arguments.rounds)
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
