"""FLOPs of a training step and peak FLOPs of a device, for the model FLOPs utilization (MFU).

Letters: W weights of matrix products, V vocabulary, D hidden size.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DATASHEET = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
"""Part of a device's name -> dense bf16 FLOPs per second with fp32 accumulation.

The first part that matches counts. `lightning.fabric.utilities.throughput.get_available_flops` is
no replacement: Lightning 2.6 finds no H200, B200, H20 or MI300X, states the rate of sparse products
for the H100 NVL and of the plain cores for A40 and RTX cards, and takes an L40S for an L4 and a
slice of an H100 for the whole device.
"""


@dataclass(frozen=True)
class StepCost:
    """Sizes of a model that decide the FLOPs of a step.

    FLOPs per token and weight: 2 in the forward pass, 2 for the gradient of the input, and 2 for
    the gradient of the weight if it is trained (Kaplan et al. 2020, arXiv:2001.08361). The head
    counts for target positions only, attention for the causal half of each example's square:
    nothing else is computed. Recomputation by gradient checkpointing does not count.
    """

    frozen: int
    """Frozen weights of matrix products outside the head."""
    trained: int
    """Trained weights of matrix products outside the head."""
    head: int
    """Weights of the head, V x D."""
    head_is_trained: bool
    scores: int
    """Layers x heads x head size: a quarter of the FLOPs of attention per pair of positions."""

    def of(self, tokens: float, targets: float, squares: float) -> float:
        """Returns the FLOPs of a step.

        Args:
            tokens: Number of tokens.
            targets: Number of target positions.
            squares: Sum of the squares of the example lengths.
        """
        per_token = 4 * self.frozen + 6 * self.trained
        per_target = self.head * (6 if self.head_is_trained else 4)
        return tokens * per_token + targets * per_target + 6 * self.scores * squares


def step_cost(lm: PreTrainedModel) -> StepCost:
    """Counts the weights of a loaded model with its adapters. All experts count."""
    output = lm.get_output_embeddings()
    skip = {
        id(parameter)
        for module in (output, lm.get_input_embeddings())
        for parameter in module.parameters()
    }
    weights = {id(p): p for p in lm.parameters() if p.ndim > 1 and id(p) not in skip}
    trained = sum(p.numel() for p in weights.values() if p.requires_grad)
    frozen = 0
    for parameter in weights.values():
        if not parameter.requires_grad:
            # Two 4-bit weights share a byte.
            per_element = 2 if parameter.dtype == torch.uint8 else 1
            frozen += parameter.numel() * per_element
    head = next(output.parameters()) if isinstance(output, nn.Module) else None
    config = lm.config.get_text_config()
    # A state space model has no attention heads.
    heads = getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return StepCost(
        frozen,
        trained,
        0 if head is None else head.numel(),
        head is not None and head.requires_grad,
        config.num_hidden_layers * heads * size,
    )


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the peak FLOPs per second of a device.

    From `DATASHEET`; for any other device the fastest of a few matrix products, measured once.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        stated = _datasheet_flops(torch.cuda.get_device_name(device))
        if stated is not None:
            return stated
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        # Reading an element waits for the device.
        (left @ right)[-1, -1].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _datasheet_flops(name: str) -> float | None:
    # Laptop and D variants are slower than the device of the same name, and a MIG is a part of it.
    if re.search(r"Laptop|\bD$|\bMIG\b", name):
        return None
    for part, value in DATASHEET.items():
        # Whole words: an L40 is no L4.
        if re.search(rf"\b{part}\b", name):
            return value
    return None
