"""A separate random state for a `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def own_random_state(
    seed: int | None = None, devices: Iterable[torch.device] = ()
) -> Iterator[None]:
    """Restores the random state after a `with` block, whatever the block has drawn.

    Args:
        seed: Seed for the block. None continues from the caller's random state.
        devices: Devices on which the block draws numbers, beside the CPU.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=gpus):
        if seed is not None:
            _seed(seed, on_gpus=bool(gpus))
        yield


def devices_of(model: nn.Module) -> set[torch.device]:
    """Returns the devices of a model's parameters."""
    return {parameter.device for parameter in model.parameters()}


def _seed(seed: int, on_gpus: bool) -> None:
    if on_gpus:
        torch.manual_seed(seed)
    else:
        # `torch.manual_seed` would also seed the GPUs, whose states are not restored.
        torch.default_generator.manual_seed(seed)
