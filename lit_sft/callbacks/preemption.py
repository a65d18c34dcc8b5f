"""Ends a run on a signal: all ranks save at the same step and exit; a SLURM job is requeued."""

from __future__ import annotations

import logging
import signal
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed as dist
from typing_extensions import override

from lit_sft import lightning_internals, signals
from lit_sft.callbacks.checkpointer import Checkpointer
from lit_sft.callbacks.step_callback import StepCallback, is_between_steps
from lit_sft.run import slurm

log = logging.getLogger(__name__)

IN_VALIDATION = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
"""Lightning's counters of a validation without a finished batch. A resumed run repeats it whole."""


class StopOnSignal(StepCallback, Checkpoint):
    """Saves and exits on all ranks if any of them has received a signal.

    It reads the flag of `signals` between two optimizer steps, and between the batches of a
    validation. As a `Checkpoint` it is called after all other callbacks.

    Args:
        checkpointer: Saves the checkpoint.
        max_restarts: Most restarts of a SLURM job.
    """

    def __init__(self, checkpointer: Checkpointer, max_restarts: int) -> None:
        self.checkpointer = checkpointer
        self.max_restarts = max_restarts
        self.signal: signal.Signals | None = None
        """The signal that all ranks know of."""
        self.is_saved = False
        """Whether a checkpoint is saved, and the run exits before the next step."""
        self.in_validation = False
        """Whether the checkpoint is saved within a validation."""
        self.first_step = 0
        """The step that this start of the run began at."""
        self.pending: tuple[torch.Tensor, torch.cuda.Event] | None = None
        """The latest flag of all ranks on its way from a GPU, and the event after its copy."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not signals.installed():
            return
        lightning_internals.replace_signal_handling(trainer, signals.install)
        pl_module.between_answers = lambda: self._stop_within(trainer)  # type: ignore[assignment]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if signals.installed():
            # A library may have replaced the handlers.
            signals.install()
            signals.wait(for_training=True)
        self.first_step = trainer.global_step
        if self._look(trainer):
            self._leave(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Exit here and not in `on_step_end`: Lightning logs the metrics of a step after it.
        if self.is_saved:
            self._leave(trainer)

    @override
    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        if not self._look(trainer):
            return
        if not trainer.is_last_batch and not lightning_internals.validation_is_due(trainer):
            self.checkpointer.save_and_wait(trainer)
            self.is_saved = True

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_within(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._stop_within(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _is_over(trainer):
            # The run is about to end: let it finish its save and export.
            signals.wait(for_training=False)
        elif self._look(trainer):
            # `Checkpointer` has saved, but its thread may still be writing.
            self.checkpointer.save_and_wait(trainer)
            self._leave(trainer)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        signals.wait(for_training=False)

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.in_validation:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress["total"] = dict(IN_VALIDATION)
            progress["current"] = dict.fromkeys(IN_VALIDATION, 0)

    def _stop_within(self, trainer: L.Trainer) -> None:
        """Exits within a validation, or within the answers before the first step.

        A resumed run repeats them from their start.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._look(trainer):
            return
        # A validation by the clock runs within an optimizer step, where nothing can be saved.
        if trainer.validating and not is_between_steps(trainer):
            return
        # Before the first step there is nothing to save.
        if trainer.validating:
            self.in_validation = True
            self.checkpointer.save_and_wait(trainer)
        self._leave(trainer)

    def _look(self, trainer: L.Trainer) -> bool:
        """Whether any rank has received a signal. All ranks call it at the same points of the run.

        On a GPU it uses the flag of the call before: to read the newest one would synchronize the
        device.
        """
        flag = signals.received() if signals.installed() else 0
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            # `full` makes the tensor on the device. A copy from the host would synchronize it.
            flags = torch.full((1,), flag, dtype=torch.int32, device=device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            flag = int(flags) if device.type != "cuda" else self._one_look_ago(flags)
        if flag and self.signal is None:
            self.signal = signals.SIGNALS[flag - 1]
        return self.signal is not None

    def _one_look_ago(self, flags: torch.Tensor) -> int:
        """Starts to copy a flag to the host, and returns the flag of the call before."""
        before = self.pending
        copy = torch.empty(1, dtype=flags.dtype, pin_memory=True)
        copy.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending = (copy, event)
        if before is None:
            return 0
        flag, copied = before
        copied.synchronize()
        return int(flag)

    def _leave(self, trainer: L.Trainer) -> NoReturn:
        """Exits this rank, after requeueing a SLURM job.

        Only rank 0 exits with a code other than 0: a launcher kills all ranks when one of them
        fails.

        Raises:
            SystemExit: Always.
        """
        assert self.signal is not None
        code = 128 + self.signal
        step = trainer.global_step
        if trainer.is_global_zero:
            saved = f"after step {step}, which is saved" if step else "before the first step"
            log.info("stopped by %s %s", self.signal.name, saved)
            if slurm.job_id() is None and step:
                log.info("go on with the same command and --ckpt_path last")
            elif self.signal != signal.SIGINT:
                has_stepped = step > self.first_step
                if slurm.requeue(self.signal, self.max_restarts, has_stepped):
                    code = 0
        # A rank that exits earlier could end rank 0 before it is done.
        trainer.strategy.barrier("leave")
        raise SystemExit(code if trainer.is_global_zero else 0)


def _is_over(trainer: L.Trainer) -> bool:
    """Whether the epoch that ends is the last one.

    Lightning's `fit_loop.done` cannot be asked, because it changes the number of the epoch.
    """
    loop = trainer.fit_loop
    epochs: int = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    by_epochs = -1 != loop.max_epochs <= epochs  # type: ignore[operator]
    by_steps = -1 != loop.max_steps <= trainer.global_step
    can_stop_early = epochs >= (loop.min_epochs or 0) and trainer.global_step >= (
        loop.min_steps or 0
    )
    return by_epochs or by_steps or (trainer.should_stop and can_stop_early)
