"""Seeds all random numbers of an optimizer step from its number, so no generator state is saved."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators, on all devices.

    Args:
        key: Everything that the numbers depend on, such as (seed, step, rank).
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
