"""A run that a signal ends: all ranks save at the same step and leave together; a SLURM job is
requeued.
"""

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
"""Lightning's counters of a validation that was stopped; with none of its batches done, it is
repeated as a whole.
"""


class StopOnSignal(StepCallback, Checkpoint):
    """Looks at the flag of `signals` between two optimizer steps, and between the batches of a
    validation; when any rank has it, all save, and leave together. As a `Checkpoint`, it is called
    after all other callbacks.

    Args:
        checkpointer: Saves, on all ranks.
        max_restarts: A SLURM job is not requeued more often.
    """

    def __init__(self, checkpointer: Checkpointer, max_restarts: int) -> None:
        self.checkpointer = checkpointer
        self.max_restarts = max_restarts
        self.signal: signal.Signals | None = None
        """What all ranks know."""
        self.is_saved = self.in_validation = False
        self.first_step = 0
        self.pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not signals.installed():
            return
        lightning_internals.replace_signal_handling(trainer, signals.install)
        pl_module.between_answers = lambda: self._stop_within(trainer)  # type: ignore[assignment]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if signals.installed():
            # A library may have taken them.
            signals.install()
            signals.wait(for_training=True)
        self.first_step = trainer.global_step
        if self._look(trainer):
            self._leave(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.is_saved:
            # Not sooner: by now the numbers of the last step are logged.
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
            # What is left is saved; it is finished.
            signals.wait(for_training=False)
        elif self._look(trainer):
            # Is saved; but it may still be on its way to the disk.
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
            progress["total"], progress["current"] = (
                dict(IN_VALIDATION),
                dict.fromkeys(IN_VALIDATION, 0),
            )

    def _stop_within(self, trainer: L.Trainer) -> None:
        """Where a validation, or the answers before the first step, can be given up; it is repeated
        from its start.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._look(trainer):
            return
        if trainer.validating and not is_between_steps(trainer):
            # One by the clock, within a step: nothing can be saved before that ends.
            return
        if trainer.validating:
            # Else these are the answers before the first step.
            self.in_validation = True
            self.checkpointer.save_and_wait(trainer)
        self._leave(trainer)

    def _look(self, trainer: L.Trainer) -> bool:
        """Whether a signal reached any rank. All of them ask at the same points of the run.

        On a GPU the answer is that to the last question but one: to wait for the device would cost
        more than to go one step further.
        """
        flag = signals.received() if signals.installed() else 0
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            # A copy would wait for the device.
            flags = torch.full((1,), flag, dtype=torch.int32, device=device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            flag = int(flags) if device.type != "cuda" else self._one_look_ago(flags)
        if flag and self.signal is None:
            self.signal = signals.SIGNALS[flag - 1]
        return self.signal is not None

    def _one_look_ago(self, flags: torch.Tensor) -> int:
        before = self.pending
        copy = torch.empty(1, dtype=flags.dtype, pin_memory=True)
        copy.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending = (copy, event)
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])

    def _leave(self, trainer: L.Trainer) -> NoReturn:
        """Ends this rank; only the first one's exit code tells, as a launcher ends all ranks when
        any of them fails.
        """
        assert self.signal is not None
        code, step = 128 + self.signal, trainer.global_step
        if trainer.is_global_zero:
            saved = f"after step {step}, which is saved" if step else "before the first step"
            log.info("stopped by %s %s", self.signal.name, saved)
            if slurm.job_id() is None:
                log.info("go on with the same command and --ckpt_path last")
            elif self.signal != signal.SIGINT:
                has_stepped = step > self.first_step
                code = 0 if slurm.requeue(self.signal, self.max_restarts, has_stepped) else code
        # A rank that left sooner would take the first one with it.
        trainer.strategy.barrier("leave")
        raise SystemExit(code if trainer.is_global_zero else 0)


def _is_over(trainer: L.Trainer) -> bool:
    """Whether the epoch that ends is the last. Not `fit_loop.done`, which rewrites the number of
    the epoch.
    """
    loop = trainer.fit_loop
    epochs: int = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    by_epochs = -1 != loop.max_epochs <= epochs  # type: ignore[operator]
    by_steps = -1 != loop.max_steps <= trainer.global_step
    can_stop_early = epochs >= (loop.min_epochs or 0) and trainer.global_step >= (
        loop.min_steps or 0
    )
    return by_epochs or by_steps or (trainer.should_stop and can_stop_early)
