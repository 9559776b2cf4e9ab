"""What a training step costs, by formula: time, memory and parameters of a choice, against finetuning everything.

`plasticity_peft.measuring.costs` counts operations and bytes in one forward and backward pass of one image. From these
counts follows the cost of any choice:

- Gradients flow back from the head to the first block that contains a trained component. The blocks before it need no
  backward pass, and keep no activations.
- In full mode, a component adds the gradient of its weights, and the inputs that this gradient needs. LoRA adds its
  own products, and keeps the same inputs.
- Trained parameters add their gradients and the two moments of Adam.

Time is proportional to the counted operations: two for a product of two numbers that is added to a sum, and
`WORK_PER_ELEMENT` for every number that an elementwise operation writes, because such operations wait for memory. So
times are comparable as ratios on one model, and `examples/benchmarks/costs.py` compares them with measured ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, NamedTuple

from annotated_types import Len

from plasticity_peft.constraints import STRICT, Count, NonNegative, PositiveCount
from plasticity_peft.errors import ConfigError

WORK_PER_ELEMENT = 100
"""Operations that take as long as writing one number of an elementwise operation."""
UPDATE_WORK = 10 * WORK_PER_ELEMENT
"""Operations of Adam for one parameter."""
STEP_IMAGES = 32
"""Number of images in the training step whose cost is given."""


@dataclass(frozen=True)
class BlockCost:
    """One block, for one image, if nothing in it trains."""

    forward: Count
    """Operations of the forward pass."""
    backward: Count
    """Operations of the gradient of its input."""
    saved: Count
    """Bytes that the forward pass keeps for this gradient."""


@dataclass(frozen=True)
class ComponentCost:
    """What one component adds, for one image, if it trains."""

    block: Count
    """Number of its block, from 0 in the order in which the blocks run."""
    weights: Count
    """Operations of the gradient of its weights."""
    saved: Count
    """Bytes that the forward pass keeps for this gradient."""
    tokens: tuple[Count, ...]
    """Number of tokens that pass each of its layers."""


class Trained(NamedTuple):
    """One trained component: its row in `Costs.components`, and how it trains."""

    row: int
    parameters: int
    lora: tuple[tuple[int, int, int], ...] = ()
    """(rank, inputs, outputs) of each of its layers; empty if its own weights train."""


@dataclass(frozen=True)
class Cost:
    """What a training step costs with a choice of components. The head is not counted as trained.

    The ratios are to finetuning everything.
    """

    time: NonNegative
    """Time of a step, as a ratio."""
    memory: NonNegative
    """Memory of weights, gradients, the moments of Adam and kept activations, as a ratio."""
    activations: NonNegative
    """Memory of kept activations, as a ratio."""
    activation_bytes: Count
    """Bytes of kept activations, for one image."""
    optimizer_bytes: Count
    """Bytes of gradients and moments of Adam, the head not counted."""
    file_bytes: Count
    """Bytes of the adapter in a file, the head not counted."""

    __pydantic_config__: ClassVar[dict[str, bool]] = STRICT

    @property
    def file_size(self) -> str:
        """`file_bytes` as text, such as "13.5 MiB"."""
        large = self.file_bytes >= 2**19
        return f"{self.file_bytes / 2**20:.1f} MiB" if large else f"{self.file_bytes / 1024:.0f} KiB"

    def __str__(self) -> str:
        return (
            f"{self.time:.2f} of the time and {self.memory:.2f} of the memory of a training step that finetunes "
            f"everything; {self.file_size} in a file"
        )


@dataclass(frozen=True)
class Costs:
    """What was counted in a model, from which the cost of every choice follows."""

    image: Annotated[tuple[PositiveCount, ...], Len(1)]
    """Shape of the image: usually (channels, height, width)."""
    number_bytes: PositiveCount
    """Bytes of one number of a weight."""
    weight_bytes: PositiveCount
    """Bytes of the weights of the whole model."""
    weights: PositiveCount
    """Number of weights of the whole model."""
    blocks: Annotated[tuple[BlockCost, ...], Len(1)]
    """In the order in which they run."""
    components: Annotated[tuple[ComponentCost, ...], Len(1)]
    """In the order of the scores."""
    outside_forward: Count
    """Operations of the forward pass outside of the blocks."""
    outside_saved: Count
    """Bytes that are kept outside of the blocks if everything trains."""

    def of(self, trained: Sequence[Trained]) -> Cost:
        """Returns the cost of training some components.

        The gradient of what lies outside of the blocks is taken to be as much work as its forward pass.
        """
        forward, all_time, all_memory, all_saved = self._everything
        work, saved = self._of_images(trained)
        parameters = sum(part.parameters for part in trained)
        added = sum(part.parameters for part in trained if part.lora)
        time = STEP_IMAGES * (forward + work) + UPDATE_WORK * parameters
        memory = self.weight_bytes + self.number_bytes * added + self._state(parameters) + STEP_IMAGES * saved
        return Cost(
            time=round(time / all_time, 4),
            memory=round(memory / all_memory, 4),
            activations=round(saved / all_saved, 4) if all_saved else 0.0,
            activation_bytes=saved,
            optimizer_bytes=self._state(parameters),
            file_bytes=self.number_bytes * parameters,
        )

    def _state(self, parameters: int) -> int:
        """Returns the bytes of the gradients of some parameters, and of their two moments."""
        return 3 * self.number_bytes * parameters

    @cached_property
    def _everything(self) -> tuple[int, int, int, int]:
        """The work of a forward pass, and the time, memory and kept bytes of finetuning everything."""
        forward = self.outside_forward + sum(block.forward for block in self.blocks)
        work, saved = self._of_images([Trained(row, 0) for row in range(len(self.components))])
        saved += self.outside_saved
        time = STEP_IMAGES * (forward + work + self.outside_forward) + UPDATE_WORK * self.weights
        return forward, time, self.weight_bytes + self._state(self.weights) + STEP_IMAGES * saved, saved

    def _of_images(self, trained: Sequence[Trained]) -> tuple[int, int]:
        """Returns the operations of the backward pass of one image, and of LoRA's forward pass, and the kept bytes."""
        if not trained:
            return 0, 0
        work, saved = self._from_block[min(self.components[part.row].block for part in trained)]
        for part in trained:
            more = self._of_part.get(part) or self._of_part.setdefault(part, self._added_by(part))
            work, saved = work + more[0], saved + more[1]
        return work, saved

    @cached_property
    def _from_block(self) -> list[tuple[int, int]]:
        """The operations of a backward pass that ends at a block, and the kept bytes, for every block."""
        backward, saved = ([getattr(block, name) for block in self.blocks] for name in ("backward", "saved"))
        return [(sum(backward[first:]), sum(saved[first:])) for first in range(len(self.blocks))]

    @cached_property
    def _of_part(self) -> dict[Trained, tuple[int, int]]:
        """What trained components add. The search for what fits into a budget asks for each of them many times."""
        return {}

    def _added_by(self, part: Trained) -> tuple[int, int]:
        """Returns the operations and the kept bytes that a trained component adds."""
        component = self.components[part.row]
        work, saved = 0 if part.lora else component.weights, component.saved
        for tokens, (rank, inputs, outputs) in zip(component.tokens, part.lora, strict=False):
            work += tokens * _lora_work(rank, inputs, outputs)
            saved += tokens * rank * self.number_bytes
        return work, saved


def _lora_work(rank: int, inputs: int, outputs: int) -> int:
    """Returns the operations of LoRA for one token: its forward pass, and the gradients of A, B and its input."""
    products = 3 * 2 * rank * (inputs + outputs)
    # The output of A, that of B, which is scaled and added; backward the scaled gradient, and the sum at the input.
    elements = 2 * rank + 4 * outputs + inputs
    return products + WORK_PER_ELEMENT * elements


def check_known(costs: Costs | None, budget: object) -> Costs:
    """Returns the costs. Raises ConfigError if they are unknown."""
    if costs is None:
        raise ConfigError(
            f"budget={budget!r} needs the costs of training, which the report does not contain: it is of an older "
            "release, or they could not be counted when the model was measured. Measure again, or give a share of the "
            "parameters."
        )
    return costs
