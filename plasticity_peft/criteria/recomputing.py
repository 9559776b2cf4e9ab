"""Memory for time: what a block computes is let go after the pass forward, and computed again on the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, each of the blocks keeps its inputs alone for the pass backward (activation checkpointing).

    The blocks' modules, and the hooks on them, are called twice, the second time during the pass backward. All of a
    block is called again, its last layer too, for whose gradient torch would not need it.
    """
    with ExitStack() as stack:
        stack.enter_context(set_checkpoint_early_stop(False))
        for block in blocks:
            stack.enter_context(_recomputed(block))
        yield


@contextmanager
def _recomputed(block: nn.Module) -> Iterator[None]:
    own = vars(block).get("forward")  # Accelerate puts one there
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
