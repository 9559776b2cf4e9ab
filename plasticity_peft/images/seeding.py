"""Random numbers of this process on the CPU, seeded without touching an accelerator."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_cpu(*numbers: int) -> None:
    """Seeds python, numpy and torch's generator on the CPU by these numbers.

    `torch.manual_seed` would seed every accelerator of the machine too, whether a model is on it or not.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.default_generator.manual_seed(int(state[0]))
