"""A random state of its own for the time of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def own_random_state(
    seed: int | None = None, devices: Iterable[torch.device] = ()
) -> Iterator[None]:
    """Keeps the random numbers that a block draws from changing those that follow it.

    Args:
        seed: Starts the block's random state; None continues that of the caller.
        devices: Where the block draws numbers besides the CPU.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=gpus):
        if seed is not None:
            _seed(seed, on_gpus=bool(gpus))
        yield


def devices_of(model: nn.Module) -> set[torch.device]:
    """The devices of a model's parameters."""
    return {parameter.device for parameter in model.parameters()}


def _seed(seed: int, on_gpus: bool) -> None:
    if on_gpus:
        torch.manual_seed(seed)
    else:
        # `torch.manual_seed` would also seed the GPUs, whose states were not saved.
        torch.default_generator.manual_seed(seed)
