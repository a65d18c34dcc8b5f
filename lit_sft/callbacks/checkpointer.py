"""When checkpoints are saved, and where a run that goes on from one stands."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from typing_extensions import override

from lit_sft.checkpoint import data_position
from lit_sft.errors import UserError
from lit_sft.training import optim

log = logging.getLogger(__name__)

LOOK, LOOK_SECONDS = 1 / 50, 10.0
"""Between two looks at the clock: a share of `every_n_minutes`, and the most seconds."""


@dataclass
class CheckpointOptions:
    """When checkpoints are saved and how many are kept. One is always saved at the end of an epoch and of the run."""

    every_n_train_steps: int | None = None
    """Also after every n optimizer steps."""
    every_n_minutes: float | None = 30
    """Also when this much time has gone by since the last one."""
    keep_last: int = 2
    """Newest checkpoints that are kept, besides the best."""
    monitor: str = "val/loss"
    """Scalar by which the best checkpoint is chosen, where it is logged."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""
    async_save: bool = False
    """Write in the background, from a copy in host memory (as large as the checkpoint), while training goes on."""

    def __post_init__(self) -> None:
        for name in ("every_n_train_steps", "every_n_minutes", "keep_last"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"checkpoint.{name} is {value}, it must be positive (null turns a schedule off)")


class Files(Protocol):
    """What writes and reads, `CheckpointFiles`."""

    def path(self, run_folder: Path, step: int) -> Path:
        """Where the checkpoint of an optimizer step lies."""

    def go_back(self, path: Path, step: int, best_step: int | None) -> bool:
        """Makes it the last of its folder; whether the best one up to there is there, too."""

    def wait(self) -> None:
        """Until nothing is being written any more; raises what failed."""

    def check(self) -> None:
        """Raises what has failed in the background."""

    def teardown(self) -> None:
        """Until nothing is being written any more."""


class Checkpointer(Checkpoint):
    """Saves between optimizer steps; keeps the newest few and the best, with `last.ckpt` and `best.ckpt` as links to
    them.

    Args:
        options: When and how many.
        files: What writes them; also the trainer's plugin.
    """

    def __init__(self, options: CheckpointOptions, files: Files) -> None:
        self.options, self.files = options, files
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()
        self.looked, self.next_look = (0, time.monotonic()), 0
        """Step and time of the last look at the clock, and the step of the next."""
        self.improved = False
        self.owed = False
        """A save is due, but a validation comes first."""
        self.planned: int | None = None
        """Optimizer steps of the whole run, as the checkpoint has it."""

    @override
    def state_dict(self) -> dict[str, Any]:
        chosen_by = {"monitor": self.options.monitor, "mode": self.options.mode}
        return {"best_score": self.best_score, "best_step": self.best_step, **chosen_by}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        monitor, mode = self.options.monitor, self.options.mode
        before = state_dict.get("monitor", monitor), state_dict.get("mode", mode)  # an old checkpoint does not say
        if before == (monitor, mode):
            self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        elif state_dict["best_score"] is not None:
            log.warning(
                "checkpoint.monitor was %s (%s) and is %s (%s): the next validation is the best so far",
                *(*before, monitor, mode),
            )

    def go_on_from(self, trainer: L.Trainer, path: Path, step: int, run_folder: Path) -> None:
        """Makes the checkpoint that a run goes on from the last of its folder, and forgets a best score whose
        checkpoint is not there. All ranks call it, when everything is restored.

        Args:
            trainer: Of the run.
            path: The checkpoint.
            step: Its step.
            run_folder: What the run writes into; the checkpoint may be from elsewhere.
        """
        has_best, error = False, None
        if trainer.is_global_zero and path.absolute().parent.parent == run_folder.absolute():
            try:
                has_best = self.files.go_back(path, step, self.best_step)
            except UserError as failed:
                error = failed
        has_best, error = trainer.strategy.broadcast((has_best, error))
        if error is not None:
            raise error
        if self.best_step is not None and not has_best:
            log.info("the best checkpoint so far, of step %s, is gone: the next validation is the best", self.best_step)
            self.best_score = self.best_step = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.accumulate_grad_batches > 1:
            _refuse_saves_within_a_step(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for other in trainer.checkpoint_callbacks:
            if isinstance(other, ModelCheckpoint):  # else it saves the resumed step once more, within the next
                other._last_global_step_saved = trainer.global_step
        self.looked, self.next_look = (trainer.global_step, time.monotonic()), trainer.global_step
        if trainer.ckpt_path is not None:
            self._go_on(trainer)

    def _go_on(self, trainer: L.Trainer) -> None:
        """Says which settings of the optimizer are the checkpoint's, and that the schedule is that of now."""
        if others := optim.restored(trainer.optimizers[0]):
            log.warning("model.optimizer goes on as in the checkpoint: %s", "; ".join(others))
        before, now = optim.restore_lr(trainer.lr_scheduler_configs[0].scheduler)  # type: ignore[arg-type]
        steps = trainer.datamodule.total_steps  # type: ignore[attr-defined]
        if before != now or self.planned not in (None, steps):  # an older checkpoint does not say
            was = "" if self.planned in (None, steps) else f" ({self.planned:,} in the checkpoint)"
            log.info(
                "model.lr_schedule is computed anew, over %s steps in all%s: the next rate is %.4g, not %.4g",
                *(f"{steps:,}", was, now, before),
            )

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning logs by a count of its own, which it restores one too small or too large after some stops."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.files.check()
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or loop.batch_progress.is_last_batch:
            return  # the last step of an epoch is saved when it ends
        every = self.options.every_n_train_steps
        due = every is not None and trainer.global_step % every == 0
        if not due and self.options.every_n_minutes is not None:
            due = self._is_late(trainer, 60 * self.options.every_n_minutes)
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self.owed = self.owed or due
        if self.owed and not loop._should_check_val_fx(fetcher):  # else a resumed run would leave the validation out
            self.save(trainer)

    def _is_late(self, trainer: L.Trainer, seconds: float) -> bool:
        """Whether the last save is that long ago. All ranks must find the same, and to ask them stops a GPU: they are
        asked that seldom (`LOOK`), at steps that follow from the slowest rank.
        """
        step, now = trainer.global_step, time.monotonic()
        if step < self.next_look:
            return False
        found = [float(now - self.saved_at > seconds), (now - self.looked[1]) / max(1, step - self.looked[0])]
        if trainer.world_size > 1:
            told = torch.tensor(found, dtype=torch.float64, device=trainer.strategy.root_device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            found = told.tolist()
        self.looked = (step, now)
        self.next_look = step + max(1, int(min(seconds * LOOK, LOOK_SECONDS) / max(found[1], 1e-6)))
        return bool(found[0])

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(self.options.monitor)
        sign = 1 if self.options.mode == "min" else -1
        if score is not None and (self.best_score is None or sign * float(score) < sign * self.best_score):
            self.best_score, self.best_step, self.improved = float(score), trainer.global_step, True
        self.owed = self.owed or self.improved
        loop = trainer.fit_loop.epoch_loop
        if self.owed and not loop._should_accumulate() and not loop.batch_progress.is_last_batch:
            self.save(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer)
        self.files.wait()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.files.teardown()

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer"] = optim.name_of(trainer.optimizers[0])
        checkpoint["total_steps"] = trainer.datamodule.total_steps  # type: ignore[attr-defined]

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches: with another number of ranks or accumulation, its counters are rewritten.
        So is that of epochs, where `trainer.max_steps` ended one that now goes on.
        """
        state = checkpoint.get("SFTDataModule")
        if trainer.state.fn != "fit" or not state:
            return
        self.planned = checkpoint.get("total_steps")
        optim.check_same(pl_module.options.optimizer, checkpoint.get("optimizer"))  # type: ignore[union-attr, arg-type]
        for stop in trainer.early_stopping_callbacks:  # which would go on with the patience of the checkpoint
            checkpoint["callbacks"].get(stop.state_key, {}).update(patience=stop.patience)
        loops = checkpoint["loops"]["fit_loop"]
        position = data_position.position(
            state["position"], loops["epoch_loop.val_loop.batch_progress"]["total"], trainer
        )
        trainer.datamodule.position, trainer.datamodule.steps_done = position, checkpoint["global_step"]  # type: ignore[attr-defined]
        data_position.recount(loops["epoch_loop.batch_progress"], position, trainer)
        if state["position"][1]:
            for part in loops["epoch_progress"].values():
                part["processed"] = part["started"] - (position[1] > 0)
                part["completed"] = part["started"] - 1

    def save(self, trainer: L.Trainer) -> None:
        """Saves the state of this step, then drops what is no longer kept. All ranks call it, between two steps.

        Raises:
            UserError: It could not be written; on all ranks.
        """
        folder = Path(trainer.strategy.broadcast(str(trainer.log_dir)))
        path = self.files.path(folder, trainer.global_step)
        if self.saved_step != trainer.global_step or self.improved:
            if self.improved:  # a validation by the clock, within a step, is saved after the step
                self.best_step = trainer.global_step
            keep = {"best": self.improved, "keep_last": self.options.keep_last}
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            error = None
            try:
                trainer.strategy.save_checkpoint(checkpoint, path, storage_options=keep)
            except UserError as failed:
                error = failed
            if (error := trainer.strategy.broadcast(error)) is not None:
                raise error
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        self.improved = self.owed = False


def _refuse_saves_within_a_step(trainer: L.Trainer) -> None:
    """Refuses callbacks of the user's that would save between the micro-batches of an optimizer step, where no
    position and no gradients are kept.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback._train_time_interval is not None:
            raise UserError(
                "trainer.callbacks: ModelCheckpoint with train_time_interval saves within an optimizer step: set "
                "checkpoint.every_n_minutes in its place, which waits for the end of the step"
            )
        by_clock = trainer._val_check_time_interval is not None  # type: ignore[attr-defined]
        if by_clock and not callback._save_on_train_epoch_end:
            raise UserError(
                "trainer.val_check_interval by the clock lets ModelCheckpoint (trainer.callbacks) save within an "
                "optimizer step: set its save_on_train_epoch_end to true, or the interval to a number of forward passes"
            )
