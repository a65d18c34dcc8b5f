"""Stops the run, or skips the step, before a loss or gradient that is not finite changes weights.

On a GPU the host reads the loss and gradient norm of a step one step later, when they have long
arrived. To read them within the step would synchronize the device between the backward pass and the
optimizer, and nothing of the next micro-batch could be queued meanwhile. A fused optimizer makes
the delay safe: it skips the step by itself if its `found_inf` is set on the device (torch made this
for gradient scalers). Every other optimizer, and the CPU, is judged within the step.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_sft.callbacks.step_callback import StepCallback
from lit_sft.datamodule import data_of
from lit_sft.errors import UserError
from lit_sft.module import LOSS_SUM, NORM_SUM, NUM_TARGETS

log = logging.getLogger(__name__)

RANKS_AGREE = 1e-3
"""Relative difference between the gradient norms of ranks that rounding can explain."""
SHOWN_BATCHES = 8
"""Most micro-batches of a step whose rows a message names; further ones are only counted."""


@dataclass
class FaultOptions:
    """What happens at an optimizer step whose loss or gradient norm is NaN or infinite."""

    skip_steps: int = 0
    """How many such steps in a row are skipped. One more stops the run; 0 stops at the first."""
    grad_norm_limit: float | None = None
    """Gradient norm, before clipping, above which a step counts as faulty, too; null: no limit."""

    def __post_init__(self) -> None:
        if self.skip_steps < 0:
            raise UserError(f"faults.skip_steps is {self.skip_steps}, it must be 0 or more")
        if self.grad_norm_limit is not None and not self.grad_norm_limit > 0:
            raise UserError(
                f"faults.grad_norm_limit is {self.grad_norm_limit}, it must be positive (null: no"
                " limit)"
            )


class MicroBatch(NamedTuple):
    """One forward pass of an optimizer step."""

    rank: int
    rows: tuple[int, ...]
    loss: Tensor | float


class Step(NamedTuple):
    """An optimizer step whose numbers are being copied from the device."""

    number: int
    batches: list[MicroBatch]
    """The micro-batches of this rank."""
    numbers: Tensor
    """[3] on the host: the loss, the gradient norm, and the relative deviation between the ranks'
    gradient norms of the step before.
    """
    arrived: torch.cuda.Event | None
    """Recorded after the copy; None on a CPU, where `numbers` can be read at once."""


class Guard(StepCallback):
    """Checks the loss and the gradient norm of every step; both are the same on all ranks.

    It also checks that the ranks have the same gradient norm. If gradients are no longer reduced
    (DDP loses its hooks when a parameter is replaced, or changes its dtype for a while), every rank
    would train alone. The norms travel with the loss of the next step, so this costs no
    communication of its own.

    A step is always judged before a checkpoint of it is saved.

    Args:
        options: When to skip a step, and when to stop.
    """

    def __init__(self, options: FaultOptions) -> None:
        self.options = options
        self.skipped = 0
        """All steps that were skipped."""
        self.in_a_row = 0
        """Skipped steps since the last good one."""
        self.batches: list[MicroBatch] = []
        self.step: Step | None = None
        """The latest step, until it is judged."""
        self.norm: Tensor | None = None
        """The gradient norm of the step before, on this rank."""
        self.agree = RANKS_AGREE
        """Relative difference of norms that is accepted; larger for a dtype with less precision."""
        self.trainer: L.Trainer | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        # Judge the latest step first, so that no checkpoint holds the result of a faulty one.
        self.judge()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.in_a_row = state_dict["in_a_row"]

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer = trainer
        pl_module.guard = self.inspect  # type: ignore[assignment]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches = []
        self.batches.append(MicroBatch(trainer.global_rank, batch["rows"], math.nan))

    @override
    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        self.batches[-1] = self.batches[-1]._replace(loss=loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.norm is not None:
            pl_module.window[NORM_SUM:] = torch.stack([self.norm, self.norm.square()])  # type: ignore[index, operator, assignment]

    def inspect(self, optimizer: Optimizer, window: Tensor, norm: Tensor) -> None:
        """Checks a step; the module calls it when the gradients are final.

        Args:
            optimizer: The optimizer, which is about to step.
            window: [5] Sums over all ranks: losses, targets, tokens, and the gradient norms of the
                step before and their squares.
            norm: [] The norm of the reduced gradients, before clipping.

        Raises:
            UserError: This step or the one before it is faulty and may not be skipped.
        """
        assert self.trainer is not None
        self.agree = max(RANKS_AGREE, torch.finfo(norm.dtype).eps)
        # The norm of offloaded gradients is on the CPU.
        norm = norm.to(window.device).double()
        mean, square = window[NORM_SUM:] / self.trainer.world_size
        # The relative standard deviation of the norms, the same on all ranks.
        apart = (square - mean.square()).clamp(min=0).sqrt() / mean
        self.norm = norm
        self.judge()
        # A gradient scaler finds its scale by infinite gradients, and skips their steps itself.
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            norm = norm.nan_to_num(nan=0, posinf=0, neginf=0)
        numbers = torch.stack([window[LOSS_SUM] / window[NUM_TARGETS].clamp(min=1), norm, apart])
        deferred = _can_defer(optimizer, numbers)
        if deferred:
            bad = ~(numbers[:2].isfinite().all() & (norm <= self._limit))
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.step = _on_its_way(self.trainer.global_step + 1, self.batches, numbers)
        if not deferred and self.judge():
            # Without gradients the optimizer changes neither weights nor its state.
            optimizer.zero_grad(set_to_none=True)

    @property
    def _limit(self) -> float:
        return math.inf if self.options.grad_norm_limit is None else self.options.grad_norm_limit

    def judge(self) -> bool:
        """Reads the numbers of the latest step, if that is not done yet.

        All ranks call it, and get the same result.

        Returns:
            Whether the step is skipped.

        Raises:
            UserError: The step is faulty and may not be skipped, or the ranks' gradients differ.
        """
        step, self.step = self.step, None
        if step is None:
            return False
        if step.arrived is not None:
            step.arrived.synchronize()
        loss, norm, apart = step.numbers.tolist()
        if apart > self.agree:
            raise UserError(
                f"step {step.number - 1}: the gradient norms of the ranks differ by {apart:.1%}:"
                " gradients are not reduced over ranks; look for what replaces parameters"
                " (trainer.callbacks?), or report it"
            )
        if math.isfinite(loss) and math.isfinite(norm) and norm <= self._limit:
            self.in_a_row = 0
            return False
        assert self.trainer is not None
        self.in_a_row += 1
        what = f"step {step.number}: the loss is {loss:g}, the gradient norm {norm:g}"
        if self._limit < norm < math.inf:
            what += f", above faults.grad_norm_limit {self._limit:g}"
        places = _places(self.trainer, step.batches)
        if self.in_a_row > self.options.skip_steps:
            before = f" after {self.in_a_row - 1} that were left out" if self.in_a_row > 1 else ""
            raise UserError(
                f"{what}{before}; {places}; look at these rows, lower the learning rate, or raise"
                " faults.skip_steps"
            )
        self.skipped += 1
        log.warning(
            "%s: left out (%s in a row, %s in all); %s", what, self.in_a_row, self.skipped, places
        )
        return True

    @override
    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        if self.options.skip_steps:
            pl_module.log("train/skipped_steps", float(self.skipped))

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.judge()


def _can_defer(optimizer: Optimizer, numbers: Tensor) -> bool:
    """Whether the optimizer skips a faulty step by itself, so that the host may judge it later."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return (
        numbers.is_cuda
        and bool(optimizer.defaults.get("fused"))
        and not any(isinstance(p, DTensor) for p in parameters)
    )


def _on_its_way(number: int, batches: list[MicroBatch], numbers: Tensor) -> Step:
    """Starts to copy the numbers of a step to the host."""
    if not numbers.is_cuda:
        return Step(number, batches, numbers, None)
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Step(number, batches, host, arrived)


def _places(trainer: L.Trainer, batches: list[MicroBatch]) -> str:
    """Describes where a faulty step comes from. All ranks call it.

    It names the rows of the micro-batches on all ranks whose loss is not finite, or of all
    micro-batches if every loss is finite. It also names a weight that is not finite itself.

    Args:
        trainer: The trainer.
        batches: The micro-batches of this rank.
    """
    here = []
    for batch in batches:
        # A rank without rows in this step runs a filler, whose row is -1.
        if any(row >= 0 for row in batch.rows):
            here.append(batch._replace(loss=float(batch.loss)))
    parts: list[Any] = [(here, _wrong_weight(trainer))]
    if trainer.world_size > 1:
        parts *= trainer.world_size
        torch.distributed.all_gather_object(parts, parts[0])
    everywhere = [batch for part, _ in parts for batch in part]
    not_finite = [batch for batch in everywhere if not math.isfinite(batch.loss)]
    text = _describe(trainer, not_finite or everywhere)
    for _, weight in parts:
        if weight:
            return f"{text}; the weight {weight} is not finite itself"
    return text


def _describe(trainer: L.Trainer, batches: list[MicroBatch]) -> str:
    """Names the rows of micro-batches, and the ranks that had them."""
    rows = data_of(trainer).data.rows["train"]
    texts = []
    for batch in batches[:SHOWN_BATCHES]:
        # Each place once, in order.
        places = dict.fromkeys(rows.where(row) for row in batch.rows if row >= 0)
        rank = f"rank {batch.rank}: " if trainer.world_size > 1 else ""
        texts.append(rank + ", ".join(places))
    noun = "batches" if len(batches) > 1 else "batch"
    num_more = len(batches) - SHOWN_BATCHES
    more = f" and {num_more} more" if num_more > 0 else ""
    return f"the {noun} of {'; of '.join(texts)}{more}"


def _wrong_weight(trainer: L.Trainer) -> str | None:
    """Returns the name of the first weight that is not finite on this rank; None if all are."""
    for name, parameter in trainer.lightning_module.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not bool(local.isfinite().all()):
            return name.removeprefix("model.lm.")
    return None
