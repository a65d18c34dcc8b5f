"""How fast training goes: tokens per second and tokens in all, without waiting for the device."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class Throughput(Callback):
    """Logs `train/tokens_per_second` and `train/num_tokens`, over all ranks, without waiting for the device."""

    def __init__(self) -> None:
        self.num_tokens: torch.Tensor | float = 0.0
        self.step_ended = 0.0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"num_tokens": float(self.num_tokens)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_tokens = state_dict["num_tokens"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_ended = time.monotonic()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_ended = time.monotonic()  # validation is not training time

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        now = time.monotonic()
        tokens = pl_module.window[2]  # type: ignore[index]
        self.num_tokens = tokens + self.num_tokens
        pl_module.log("train/tokens_per_second", (tokens / (now - self.step_ended)).float(), prog_bar=True)
        pl_module.log("train/num_tokens", self.num_tokens.double())
        self.step_ended = now
