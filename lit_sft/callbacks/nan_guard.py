"""Optimizer steps whose loss or gradient is no number: the run stops, or leaves a few out, before
weights change.
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

log = logging.getLogger(__name__)

RANKS_AGREE = 1e-3
"""Relative difference of gradient norms that rounding may make on devices of different kinds."""
SHOWN_BATCHES = 8
"""Micro-batches whose rows are named for a step; of more, only the number is told."""


@dataclass
class FaultOptions:
    """What happens at an optimizer step whose loss or gradient norm is NaN or infinite."""

    skip_steps: int = 0
    """Such steps that may follow each other, each left out and counted; one more stops the run. 0:
    the first does.
    """
    grad_norm_limit: float | None = None
    """Gradient norm, before clipping, above which a step counts as one of them. null: none."""

    def __post_init__(self) -> None:
        if self.skip_steps < 0:
            raise UserError(f"faults.skip_steps is {self.skip_steps}, it must be 0 or more")
        if self.grad_norm_limit is not None and not self.grad_norm_limit > 0:
            raise UserError(
                f"faults.grad_norm_limit is {self.grad_norm_limit}, it must be positive (null: no"
                " limit)"
            )


class MicroBatch(NamedTuple):
    """One forward pass of the step."""

    rank: int
    rows: tuple[int, ...]
    loss: Tensor | float


class Step(NamedTuple):
    """An optimizer step whose numbers are on their way from the device."""

    number: int
    batches: list[MicroBatch]
    """Of this rank."""
    numbers: Tensor
    """[3] on the host: loss, gradient norm, and by which share of their mean the norms of the step
    before differ.
    """
    arrived: torch.cuda.Event | None
    """Reached by the device when `numbers` can be read."""


class Guard(StepCallback):
    """Looks at the loss and the gradient norm of every step, which are the same on all ranks,
    before weights change.

    To look, the host waits for the device; its next step is not prepared meanwhile. A fused
    optimizer can leave a step out by itself (`found_inf`, made for gradient scalers), so that the
    host may look one step later: it does so on a GPU, and always before a checkpoint is saved.

    That the norm is the same on all ranks is looked at, too: where gradients are not reduced any
    more (DDP loses its hooks when a parameter is replaced, or gets another type for a while), every
    rank would train alone. Norms are summed over ranks with the loss of the next step, so this
    costs no message of its own.

    Args:
        options: When to stop.
    """

    def __init__(self, options: FaultOptions) -> None:
        self.options = options
        self.skipped = 0
        """Steps left out in all."""
        self.in_a_row = 0
        self.batches: list[MicroBatch] = []
        self.step: Step | None = None
        """One that is not yet judged."""
        self.norm: Tensor | None = None
        """Of the step before, as this rank has it."""
        self.agree = RANKS_AGREE
        self.trainer: L.Trainer | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        # Nothing is saved that stands on a wrong step.
        self.judge()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer, pl_module.guard = trainer, self.inspect  # type: ignore[assignment]

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
            pl_module.window[3:] = torch.stack([self.norm, self.norm.square()])  # type: ignore[index, operator, assignment]

    def inspect(self, optimizer: Optimizer, window: Tensor, norm: Tensor) -> None:
        """Called when the gradients of a step are final.

        Args:
            optimizer: Is about to step.
            window: [5] over all ranks: loss sum, targets, tokens, sum and sum of squares of the
                norms before.
            norm: [] of the gradients over all ranks, before clipping.

        Raises:
            UserError: This step, or the one before it, is wrong, and may not be left out.
        """
        assert self.trainer is not None
        self.agree = max(RANKS_AGREE, torch.finfo(norm.dtype).eps)
        # That of offloaded gradients is on the CPU.
        norm = norm.to(window.device).double()
        mean, square = window[3:] / self.trainer.world_size
        # Their deviation, the same on all ranks.
        apart = (square - mean.square()).clamp(min=0).sqrt() / mean
        self.norm = norm
        self.judge()
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            norm = norm.nan_to_num(
                0,
                0,
                0,
                # A scaler finds its scale by infinite gradients, which it leaves out itself.
            )
        numbers = torch.stack([window[0] / window[1].clamp(min=1), norm, apart])
        deferred = _can_defer(optimizer, numbers)
        if deferred:
            bad = ~(numbers[:2].isfinite().all() & (norm <= self._limit))
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.step = _on_its_way(self.trainer.global_step + 1, self.batches, numbers)
        if not deferred and self.judge():
            # Without gradients an optimizer changes neither weights nor state.
            optimizer.zero_grad(set_to_none=True)

    @property
    def _limit(self) -> float:
        return math.inf if self.options.grad_norm_limit is None else self.options.grad_norm_limit

    def judge(self) -> bool:
        """Looks at the step that was not yet judged: whether it is left out. The same on all
        ranks.
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
        above = (
            f", above faults.grad_norm_limit {self._limit:g}"
            if self._limit < norm < math.inf
            else ""
        )
        what = f"step {step.number}: the loss is {loss:g}, the gradient norm {norm:g}{above}"
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
    """Whether the optimizer can leave a step out before the host has looked at it."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return (
        numbers.is_cuda
        and bool(optimizer.defaults.get("fused"))
        and not any(isinstance(p, DTensor) for p in parameters)
    )


def _on_its_way(number: int, batches: list[MicroBatch], numbers: Tensor) -> Step:
    if not numbers.is_cuda:
        return Step(number, batches, numbers, None)
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Step(number, batches, host, arrived)


def _places(trainer: L.Trainer, batches: list[MicroBatch]) -> str:
    """The rows of the micro-batches whose loss is wrong, on all ranks, or of all micro-batches if
    none is; and a weight that is wrong itself, if there is one. All ranks call it.
    """
    here = [
        batch._replace(loss=float(batch.loss))
        for batch in batches
        if any(row >= 0 for row in batch.rows)
    ]
    parts: list[Any] = [(here, _wrong_weight(trainer))]
    if trainer.world_size > 1:
        parts *= trainer.world_size
        torch.distributed.all_gather_object(parts, parts[0])
    everywhere = [batch for part, _ in parts for batch in part]
    wrong = [batch for batch in everywhere if not math.isfinite(batch.loss)] or everywhere
    rows = data_of(trainer).data.rows["train"]
    texts = []
    for batch in wrong[:SHOWN_BATCHES]:
        named = ", ".join(dict.fromkeys(rows.where(row) for row in batch.rows if row >= 0))
        texts.append(f"{f'rank {batch.rank}: ' if trainer.world_size > 1 else ''}{named}")
    more = f" and {len(wrong) - SHOWN_BATCHES} more" if len(wrong) > SHOWN_BATCHES else ""
    weight = next((f"; the weight {name} is not finite itself" for _, name in parts if name), "")
    return f"the batch{'es' if len(wrong) > 1 else ''} of {'; of '.join(texts)}{more}{weight}"


def _wrong_weight(trainer: L.Trainer) -> str | None:
    for name, parameter in trainer.lightning_module.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not bool(local.isfinite().all()):
            return name.removeprefix("model.lm.")
    return None
