"""Tokens per second, FLOPs utilization and peak memory, counted in the same way for any trainer."""

from __future__ import annotations

import time
from typing import Any

import torch

from lit_sft.model import memory_estimate
from lit_sft.model.attention.implementation import attention_of
from lit_sft.training.flops import peak_flops, step_cost


class Speed:
    """Measures tokens, time and memory between the warm-up and the last optimizer step."""

    def __init__(self, device: torch.device, warm_steps: int) -> None:
        self.device, self.warm_steps, self.on_gpu = device, warm_steps, device.type == "cuda"
        self.before = memory_estimate.resident()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)
        """[3] tokens, targets and squares of example lengths, on the device to avoid a sync."""
        self.began = 0.0

    def add(self, batch: Any) -> None:
        """Counts a forward pass, from ids, labels and positions [1, T].

        The square of a length is 1 + 3 + 5 + ..., a sum over positions.
        """
        input_ids, labels, position_ids = batch["input_ids"], batch["labels"], batch["position_ids"]
        # Copying a number to the device would synchronize, so the tensor is made there.
        tokens = torch.full((), input_ids.numel(), dtype=torch.int64, device=labels.device)
        sums = torch.stack([tokens, (labels >= 0).sum(), (2 * position_ids + 1).sum()])
        self.sums += sums.to(self.device, non_blocking=True)

    def step_ended(self, step: int) -> None:
        """Ends a step; the clock starts at the end of the warm-up."""
        if step == self.warm_steps:
            self.sums.zero_()
            self.began = self._now()

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def read(self, lm: Any, steps: int) -> dict[str, Any]:
        """Returns the figures at the end of the last step."""
        seconds = self._now() - self.began
        tokens, targets, squares = self.sums.tolist()
        peak = (
            torch.cuda.max_memory_allocated(self.device)
            if self.on_gpu
            else memory_estimate.resident(peak=True) - self.before
        )
        operations = step_cost(lm).of(tokens, targets, squares) / seconds
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(operations / peak_flops(self.device, torch.bfloat16), 4),
            "peak_gb": round(peak / 1e9, 3),
            "seconds": round(seconds, 2),
            "tokens": tokens,
            "targets": targets,
            "steps": steps - self.warm_steps,
            "attention": attention_of(lm),
            "device": torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu",
            "torch": torch.__version__,
        }
