"""Logs speed and memory of every optimizer step, without waiting for the device."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from lit_sft.callbacks.step_callback import StepCallback
from lit_sft.model import memory_estimate
from lit_sft.training.flops import StepCost, peak_flops, step_cost


class Throughput(StepCallback):
    """Logs speed and memory after each optimizer step.

    - `train/tokens_per_second`: tokens of all ranks, without the time of validations and saves
    - `train/trained_tokens_per_second`: the same for tokens with a loss
    - `train/num_tokens`: tokens of all ranks since the run began, resumes included
    - `train/mfu`: model FLOPs utilization, as a share of the peak of all devices
    - `train/data_wait`: share of the step's time that this rank waited for batches
    - `train/peak_memory_gb`: peak memory of the device, or of the process on a CPU, in 1e9 bytes

    With several ranks, at the steps that are logged:

    - `train/tokens_per_second_min`, `train/tokens_per_second_max`: the slowest and fastest rank
    - `train/data_wait_max`: the rank that waited longest
    """

    def __init__(self) -> None:
        self.num_tokens: torch.Tensor | float = 0.0
        self.cost: StepCost | None = None
        self.step_began = 0.0
        """Time at which the current optimizer step began."""
        self.waited = 0.0
        """Seconds that the loader had waited for batches when the current step began."""
        self.paused = True
        """Whether a validation or a save came after the last step. Its time does not count."""
        self.tokens = 0
        """Tokens of this rank in the current optimizer step."""
        self.squares = 0
        """Sum of the squared lengths of the examples in the current step, on this rank."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"num_tokens": float(self.num_tokens)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_tokens = state_dict["num_tokens"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cost = step_cost(pl_module.model.lm)  # type: ignore[union-attr, arg-type]
        half = torch.float16 if trainer.precision.startswith("16") else torch.bfloat16
        dtype = torch.float32 if trainer.precision.startswith("32") else half
        self.peak = peak_flops(pl_module.device, dtype) * trainer.world_size

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = True

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.paused = True

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        waited = trainer.train_dataloader.waited  # type: ignore[union-attr]
        # A new loader counts from 0.
        self.waited = min(self.waited, waited)
        # With tokens, the pause was a validation by the clock, within an optimizer step.
        if self.paused and not self.tokens:
            self.step_began = time.monotonic() - (waited - self.waited)
        self.paused = False
        if batch["rows"][0] >= 0:
            self.tokens += sum(batch["lengths"])
            self.squares += sum(length * length for length in batch["lengths"])

    @override
    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        _, targets, tokens, *_ = pl_module.window
        seconds = time.monotonic() - self.step_began
        loader: Any = trainer.train_dataloader
        waited = loader.waited - self.waited
        self.waited += waited
        self.num_tokens = tokens + self.num_tokens
        pl_module.log(
            "train/tokens_per_second", (tokens / seconds).float(), prog_bar=pl_module.in_bar
        )
        pl_module.log("train/trained_tokens_per_second", (targets / seconds).float())
        pl_module.log("train/num_tokens", torch.as_tensor(self.num_tokens).double())
        # Tensors, because Lightning would copy plain numbers to the device and wait for it.
        pl_module.log("train/data_wait", torch.tensor(waited / seconds))
        pl_module.log("train/peak_memory_gb", torch.tensor(peak_memory(pl_module.device) / 1e9))
        assert self.cost is not None
        # Assumes that the other ranks have the same sum of squared lengths.
        operations = self.cost.of(tokens, targets, self.squares * trainer.world_size)
        pl_module.log("train/mfu", torch.as_tensor(operations / (seconds * self.peak)).float())
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.world_size > 1 and every and trainer.global_step % every == 0:
            own = torch.tensor([self.tokens / seconds, waited / seconds], device=pl_module.device)
            speeds, waits = trainer.strategy.all_gather(own).unbind(-1)
            pl_module.log("train/tokens_per_second_min", speeds.min())
            pl_module.log("train/tokens_per_second_max", speeds.max())
            pl_module.log("train/data_wait_max", waits.max())
        self.step_began = time.monotonic()
        self.tokens = 0
        self.squares = 0


def peak_memory(device: torch.device) -> int:
    """Returns peak memory in bytes: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory_estimate.resident(peak=True)
