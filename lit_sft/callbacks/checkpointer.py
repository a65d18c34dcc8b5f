"""When checkpoints are saved, and what is restored when a run resumes."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from typing_extensions import override

from lit_sft import lightning_internals
from lit_sft.callbacks.step_callback import StepCallback, is_between_steps
from lit_sft.checkpoint import data_position
from lit_sft.checkpoint import files as checkpoint_files
from lit_sft.checkpoint.io import CheckpointFiles
from lit_sft.datamodule import data_of
from lit_sft.errors import UserError
from lit_sft.training import optim

log = logging.getLogger(__name__)

LOOK = 1 / 50
"""Time between two looks at the clock, as a share of `every_n_minutes`."""
LOOK_SECONDS = 10.0
"""Longest time between two looks at the clock."""


@dataclass
class CheckpointOptions:
    """When checkpoints are saved, besides the end of epoch and run, and how many are kept."""

    every_n_train_steps: int | None = None
    """Also save after every n optimizer steps."""
    every_n_minutes: float | None = 30
    """Also save when this many minutes have passed since the last checkpoint."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept, besides the best."""
    monitor: str = "val/loss"
    """Scalar by which the best checkpoint is chosen, if it is logged."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""
    async_save: bool = False
    """Write in the background, from a copy in host memory (as large as the checkpoint), while
    training goes on.
    """

    def __post_init__(self) -> None:
        for name in ("every_n_train_steps", "every_n_minutes", "keep_last"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(
                    f"checkpoint.{name} is {value}, it must be positive (null turns a schedule off)"
                )


class Checkpointer(StepCallback, Checkpoint):
    """Saves checkpoints between optimizer steps, and keeps the newest few and the best.

    The links `last.ckpt` and `best.ckpt` point at the newest and the best checkpoint.

    Args:
        options: When checkpoints are saved, and how many are kept.
        files: Writes the checkpoints; it is the trainer's checkpoint plugin, too.
    """

    def __init__(self, options: CheckpointOptions, files: CheckpointFiles) -> None:
        self.options = options
        self.files = files
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()
        self.looked = (0, time.monotonic())
        """Step and time of the last look at the clock."""
        self.next_look = 0
        """Step of the next look at the clock."""
        self.improved = False
        """Whether the last validation is the best so far, and not yet saved."""
        self.owed = False
        """Whether a save is due that waits for a validation."""
        self.planned: int | None = None
        """Number of optimizer steps that the run planned when the checkpoint was saved."""

    @override
    def state_dict(self) -> dict[str, Any]:
        chosen_by = {"monitor": self.options.monitor, "mode": self.options.mode}
        return {"best_score": self.best_score, "best_step": self.best_step, **chosen_by}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        monitor = self.options.monitor
        mode = self.options.mode
        # Older checkpoints do not hold `monitor` and `mode`.
        before = (state_dict.get("monitor", monitor), state_dict.get("mode", mode))
        if before == (monitor, mode):
            self.best_score = state_dict["best_score"]
            self.best_step = state_dict["best_step"]
        elif state_dict["best_score"] is not None:
            log.warning(
                "checkpoint.monitor was %s (%s) and is %s (%s): the next validation is the best"
                " so far",
                *(*before, monitor, mode),
            )

    def restore_best(self, trainer: L.Trainer, run_folder: Path) -> None:
        """Points best.ckpt at the best checkpoint so far, or forgets its score if it is gone.

        It is also gone if the run continues in another folder than that of its checkpoint. All
        ranks call it, after everything is restored.

        Args:
            trainer: The trainer.
            run_folder: The folder of the run.
        """
        if self.best_step is None:
            return
        has_best = False
        if trainer.is_global_zero:
            has_best = checkpoint_files.restore_best(run_folder, self.best_step)
        if trainer.strategy.broadcast(has_best):
            return
        log.info(
            "the best checkpoint so far, of step %s, is not in the folder of this run: the next"
            " validation is the best",
            self.best_step,
        )
        self.best_score = None
        self.best_step = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.accumulate_grad_batches > 1:
            _refuse_saves_within_a_step(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for other in trainer.checkpoint_callbacks:
            if isinstance(other, ModelCheckpoint):
                lightning_internals.mark_as_saved(other, trainer.global_step)
        self.looked = (trainer.global_step, time.monotonic())
        self.next_look = trainer.global_step
        if trainer.ckpt_path is not None:
            self._report_optimizer(trainer)

    def _report_optimizer(self, trainer: L.Trainer) -> None:
        """Logs which optimizer settings come from the checkpoint, and how the schedule changes.

        The learning rate schedule always follows the current config.
        """
        others = optim.restored(trainer.optimizers[0])
        if others:
            log.warning("model.optimizer goes on as in the checkpoint: %s", "; ".join(others))
        before, now = optim.restore_lr(trainer.lr_scheduler_configs[0].scheduler)  # type: ignore[arg-type]
        steps = data_of(trainer).total_steps
        # Older checkpoints do not hold the planned number of steps.
        is_other_plan = self.planned not in (None, steps)
        in_all = "no number of steps" if steps is None else f"{steps:,} steps in all"
        if before != now or is_other_plan:
            was = f" ({self.planned:,} in the checkpoint)" if is_other_plan else ""
            log.info(
                "model.lr_schedule is computed anew, over %s%s: the next rate is %.4g, not %.4g",
                *(in_all, was, now, before),
            )

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        lightning_internals.set_logged_step(trainer, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.files.check()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        # After the last step of an epoch, `on_train_epoch_end` saves.
        if trainer.is_last_batch:
            return
        if self._is_due(trainer):
            self.owed = True
        # Validate first: a run that resumes from a checkpoint would skip a validation due at it.
        if self.owed and not lightning_internals.validation_is_due(trainer):
            self.save(trainer)

    def _is_due(self, trainer: L.Trainer) -> bool:
        every = self.options.every_n_train_steps
        if every is not None and trainer.global_step % every == 0:
            return True
        minutes = self.options.every_n_minutes
        return minutes is not None and self._is_late(trainer, 60 * minutes)

    def _is_late(self, trainer: L.Trainer, seconds: float) -> bool:
        """Whether the last save is older than this; the same answer on all ranks.

        The ranks agree by a collective that synchronizes a GPU. So they look at the clock rarely
        (see `LOOK`), at steps that all of them compute from the slowest rank.
        """
        step = trainer.global_step
        if step < self.next_look:
            return False
        now = time.monotonic()
        looked_step, looked_at = self.looked
        is_late = now - self.saved_at > seconds
        seconds_per_step = (now - looked_at) / max(1, step - looked_step)
        if trainer.world_size > 1:
            found = [float(is_late), seconds_per_step]
            largest = torch.tensor(found, dtype=torch.float64, device=trainer.strategy.root_device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            late, seconds_per_step = largest.tolist()
            is_late = bool(late)
        self.looked = (step, now)
        until_next_look = min(seconds * LOOK, LOOK_SECONDS)
        self.next_look = step + max(1, int(until_next_look / max(seconds_per_step, 1e-6)))
        return is_late

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(self.options.monitor)
        if score is not None and self._is_best(float(score)):
            self.best_score = float(score)
            self.best_step = trainer.global_step
            self.improved = True
        if self.improved:
            self.owed = True
        if self.owed and is_between_steps(trainer) and not trainer.is_last_batch:
            self.save(trainer)

    def _is_best(self, score: float) -> bool:
        if self.best_score is None:
            return True
        if self.options.mode == "min":
            return score < self.best_score
        return score > self.best_score

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer)
        self.files.wait()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.files.teardown()

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["optimizer"] = optim.name_of(trainer.optimizers[0])
        checkpoint["total_steps"] = data_of(trainer).total_steps

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" or not checkpoint.get(data_position.DATA_MODULE):
            return
        if "averaging_state" in checkpoint:
            raise UserError(
                "the checkpoint holds averaged weights (WeightAveraging), which is not supported:"
                " begin a new run (without --ckpt_path) from the exported weights"
            )
        _refuse_an_earlier_end(trainer, checkpoint)
        self.planned = checkpoint.get("total_steps")
        optim.check_same(pl_module.options.optimizer, checkpoint.get("optimizer"))  # type: ignore[union-attr, arg-type]
        # The config decides the patience, and not the state in the checkpoint.
        for stop in trainer.early_stopping_callbacks:
            checkpoint["callbacks"].get(stop.state_key, {}).update(patience=stop.patience)
        data_position.restore(checkpoint, trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Saves a checkpoint of this step, and removes those no longer kept.

        All ranks call it, between two optimizer steps.

        Raises:
            UserError: The checkpoint could not be written; raised on all ranks.
        """
        folder = Path(trainer.strategy.broadcast(str(trainer.log_dir)))
        if self.improved:
            # After a validation by the clock, within a step, the best step is this later one.
            self.best_step = trainer.global_step
        if self.saved_step != trainer.global_step or self.improved:
            self._write(trainer, checkpoint_files.path_of(folder, trainer.global_step))
        self.saved_step = trainer.global_step
        self.saved_at = time.monotonic()
        self.improved = False
        self.owed = False

    def _write(self, trainer: L.Trainer, path: Path) -> None:
        policy = checkpoint_files.KeepPolicy(
            is_best=self.improved, keep_last=self.options.keep_last
        )
        checkpoint = lightning_internals.dump_checkpoint(trainer)
        error: UserError | None = None
        try:
            trainer.strategy.save_checkpoint(checkpoint, path, storage_options=policy)
        except UserError as failed:
            error = failed
        error = trainer.strategy.broadcast(error)
        if error is not None:
            raise error

    def save_and_wait(self, trainer: L.Trainer) -> None:
        """Saves a checkpoint that is on disk when this returns. All ranks call it."""
        self.save(trainer)
        self.files.wait()


def _refuse_an_earlier_end(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuses to resume behind the end that the settings ask for.

    Raises:
        UserError: The checkpoint has more steps or epochs than the run may make.
    """
    epoch, steps_in_epoch = checkpoint[data_position.DATA_MODULE]["position"]
    step = checkpoint["global_step"]
    remedy = "raise it, or begin a new run (without --ckpt_path)"
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if -1 != trainer.max_steps < step:
        raise UserError(
            f"the checkpoint has made {step:,} steps, and trainer.max_steps is"
            f" {trainer.max_steps:,}: {remedy}"
        )
    begun = epoch + (1 if steps_in_epoch else 0)
    if trainer.max_epochs not in (None, -1) and begun > trainer.max_epochs:  # type: ignore[operator]
        raise UserError(
            f"the checkpoint lies in epoch {begun}, and trainer.max_epochs is"
            f" {trainer.max_epochs}: {remedy}"
        )


def _refuse_saves_within_a_step(trainer: L.Trainer) -> None:
    """Refuses a user's `ModelCheckpoint` that would save within an optimizer step.

    A checkpoint holds neither the position between micro-batches nor their gradients.

    Raises:
        UserError: There is such a callback.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if lightning_internals.saves_by_clock(callback):
            raise UserError(
                "trainer.callbacks: ModelCheckpoint with train_time_interval saves within an"
                " optimizer step: set checkpoint.every_n_minutes in its place, which waits for the"
                " end of the step"
            )
        by_clock = lightning_internals.validates_by_clock(trainer)
        if by_clock and not lightning_internals.saves_at_epoch_end_only(callback):
            raise UserError(
                "trainer.val_check_interval by the clock lets ModelCheckpoint (trainer.callbacks)"
                " save within an optimizer step: set its save_on_train_epoch_end to true, or the"
                " interval to a number of forward passes"
            )
