"""The names that every stage shares: the five kinds of component, and one component of one block.

Nothing here needs a model or torch. The annotations are validated when a component is read from a file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Len

from plasticity_peft.constraints import Count, PositiveCount, Text, one_of

KINDS = ("LN1", "MHA", "LN2", "FC1", "FC2")
"""The paper's five kinds, in the order in which a pre-norm block calls them."""

MATRIX_KINDS = ("MHA", "FC1", "FC2")
"""The kinds that hold weight matrices: what LoRA can train."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One component of one block: the unit that the paper measures, and that trains or stays frozen as a whole."""

    stage: Count | None = None
    """Index of the stage that contains the block, in a hierarchical model; None in all others."""
    block: Count
    """Index of the block, 0 next to the embeddings. In a hierarchical model, each stage starts at 0."""
    kind: Annotated[str, one_of(KINDS)]
    """One of `KINDS`."""
    path: Text
    """Path of the module that maps the component's input to its output. A gated FC1 has two; this is the first."""
    modules: Annotated[tuple[Text, ...], Len(1)]
    """Paths of the linear layers, or of the norm, that contain its weights, in the model that was inspected."""
    parameters: PositiveCount
    """Weights and biases in `modules`: what `training="full"` trains."""
    features: tuple[tuple[PositiveCount, PositiveCount], ...] = ()
    """(inputs, outputs) of each linear layer, in the order of `modules`; empty for a norm, which LoRA cannot adapt."""

    @property
    def block_id(self) -> str:
        """The block as canonical ids name it: "3", or "2.3" for block 3 of stage 2."""
        return str(self.block) if self.stage is None else f"{self.stage}.{self.block}"

    @property
    def id(self) -> str:
        """Canonical id, such as "3.MHA". It stays the same if a release of transformers renames modules."""
        return f"{self.block_id}.{self.kind}"

    def is_among(self, units: Collection[str]) -> bool:
        """Returns whether some units contain this component: its kind or its canonical id is one of them."""
        return self.kind in units or self.id in units


def block_ids(components: Iterable[Component]) -> list[str]:
    """Returns the blocks of some components, each once, in their order."""
    return list(dict.fromkeys(part.block_id for part in components))
