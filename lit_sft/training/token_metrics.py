"""Loss, perplexity and token accuracy of a data set."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_sft.types import LossOutput


class TokenMetrics(Metric):
    """Loss, perplexity and accuracy, averaged over all targets of all ranks."""

    full_state_update = False
    loss_sum: Tensor
    num_targets: Tensor
    num_correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss_sum", "num_targets", "num_correct"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: LossOutput) -> None:
        """Adds the sums of a batch."""
        self.loss_sum += output.loss_sum
        self.num_targets += output.num_targets
        self.num_correct += output.num_correct

    def compute(self) -> dict[str, Tensor]:
        """Returns [] fp32 tensors by name."""
        num_targets = self.num_targets.clamp(min=1)
        loss = self.loss_sum / num_targets
        values = {
            "loss": loss,
            "perplexity": loss.exp(),
            "token_accuracy": self.num_correct / num_targets,
        }
        return {name: value.float() for name, value in values.items()}
