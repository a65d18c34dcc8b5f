"""Operations of a training step, and how many a device can do: the two sides of model FLOPs
utilization.

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
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
"""Dense bf16 operations per second with fp32 accumulation, by a part of the device's name; the
first that fits.
"""


@dataclass(frozen=True)
class StepCost:
    """What a model costs: a multiplication and an addition count as two operations.

    Per weight: 2 forward, 2 for the gradient by the input, 2 for its own gradient where it is
    trained (Kaplan et al. 2020, arXiv:2001.08361). The head counts for target positions only, and
    attention for the causal half of each example's square, since nothing else is computed. What
    checkpointing recomputes does not count.
    """

    frozen: int
    """Weights of matrix products outside the head that get no gradient."""
    trained: int
    """Those that do."""
    head: int
    """V x D."""
    head_is_trained: bool
    scores: int
    """Layers x heads x head size: operations of attention per pair of positions, over 4."""

    def of(self, tokens: float, targets: float, squares: float) -> float:
        """Operations of a step.

        Args:
            tokens: All of them.
            targets: Positions that the head runs on.
            squares: Sum of the squares of the example lengths.
        """
        head = self.head * (6 if self.head_is_trained else 4)
        return (
            tokens * (4 * self.frozen + 6 * self.trained)
            + targets * head
            + 6 * self.scores * squares
        )


def step_cost(lm: PreTrainedModel) -> StepCost:
    """Counts a loaded model; adapters are in it. Of experts all count, of 4-bit weights their
    number.
    """
    output = lm.get_output_embeddings()
    skip = {
        id(parameter)
        for module in (output, lm.get_input_embeddings())
        for parameter in module.parameters()
    }
    weights = {id(p): p for p in lm.parameters() if p.ndim > 1 and id(p) not in skip}
    trained = sum(p.numel() for p in weights.values() if p.requires_grad)
    # Two 4-bit weights share a byte.
    frozen = sum(
        p.numel() * (2 if p.dtype == torch.uint8 else 1)
        for p in weights.values()
        if not p.requires_grad
    )
    head = next(output.parameters()) if isinstance(output, nn.Module) else None
    config = lm.config.get_text_config()
    # None in a state space model.
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
    """Operations per second of a device: from its datasheet, else the best of a few matrix
    products, measured once.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        if not re.search(r"Laptop|\bD$|\bMIG\b", name):
            # Slower than what their names begin with, and parts of one.
            for part, value in DATASHEET.items():
                if re.search(rf"\b{part}\b", name):
                    # An L40 is no L4.
                    return value
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        # The last element waits for the device.
        (left @ right)[-1, -1].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
