"""Shows the progress of training: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import lightning as L
import rich
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, RichProgressBar, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from rich.progress import BarColumn
from rich.table import Column
from typing_extensions import override

from lit_sft.callbacks.step_callback import StepCallback
from lit_sft.datamodule import data_of

log = logging.getLogger(__name__)

NUMBERS_EVERY = 0.5
"""Seconds between two updates of the numbers beside the bar."""
LINES_EVERY = 10.0
"""Seconds between two lines in a log."""
LOSS = "train/loss"
SPEED = "train/tokens_per_second"


class Progress(RichProgressBar):
    """Lightning's progress bar, which reads new numbers at most twice a second.

    To read a number, the host waits for a GPU to finish all queued work, and queues nothing
    meanwhile. The bar itself moves with every batch.
    """

    shown = 0.0
    """Time at which numbers were read last."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from transformers.utils import logging as transformers_logging

        # transformers' bar during the export would be drawn across this one.
        transformers_logging.disable_progress_bar()
        super().on_train_start(trainer, pl_module)

    @override
    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Keeps everything in one line: on a narrow terminal only the bar itself shrinks."""
        columns = super().configure_columns(trainer)
        for column in [*columns, self._metric_component]:
            if not isinstance(column, BarColumn):
                column.get_table_column = _unwrapped_column
        return columns  # type: ignore[no-any-return]

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Returns the two numbers that fit into 80 columns; `Lines` logs those of a validation."""
        metrics = trainer.callback_metrics
        shown: dict[str, Any] = {}
        if LOSS in metrics:
            shown["loss"] = float(metrics[LOSS])
        if SPEED in metrics:
            shown["tokens/s"] = f"{metrics[SPEED]:,.0f}"
        return shown

    @override
    def _update_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_last = trainer.training and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if is_last or not trainer.training or time.monotonic() - self.shown >= NUMBERS_EVERY:
            self.shown = time.monotonic()
            super()._update_metrics(trainer, pl_module)

    @staticmethod
    def is_wanted(trainer: Any) -> bool:
        """Whether our bar is shown: it is not turned off, and the user has set no other bar.

        Args:
            trainer: The settings of the trainer.
        """
        if trainer.get("enable_progress_bar") is False:
            return False
        own = trainer.get("callbacks") or []
        callbacks = own if isinstance(own, list) else [own]
        return not any(isinstance(callback, ProgressBar) for callback in callbacks)


def _unwrapped_column() -> Column:
    return Column(no_wrap=True)


class Lines(StepCallback):
    """Logs the progress of training in lines.

    Without a bar, as in the log of a job, there is a line at most every ten seconds. The scores of
    a validation, and the reason of an early stop, are always logged, because a bar would overwrite
    them.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        """Time at which the first batch started."""
        self.last = 0.0
        """Time of the last line."""
        self.first_step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Another bar than ours makes Lightning read numbers at every batch.
        bar = trainer.progress_bar_callback
        pl_module.in_bar = bar is not None and not isinstance(bar, Progress)  # type: ignore[assignment]
        self.began = None
        self.first_step = trainer.global_step
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping):
                # The checkpoint may hold the reason of an earlier stop.
                callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Measured from here, because answers are generated before the first batch.
        if self.began is None:
            self.began = self.last = time.monotonic()

    @override
    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        now = time.monotonic()
        step = trainer.global_step
        steps = data_of(trainer).total_steps
        if now - self.last < LINES_EVERY and (steps is None or step < steps):
            return
        has_bar = trainer.progress_bar_callback is not None and rich.get_console().is_terminal
        if not trainer.is_global_zero or has_bar:
            return
        assert self.began is not None
        self.last = now
        seconds_per_step = (now - self.began) / max(1, step - self.first_step)
        numbers = trainer.callback_metrics
        line = f"loss {numbers[LOSS]:.4f}, {numbers[SPEED]:,.0f} tokens/s"
        if steps is not None:
            left = timedelta(seconds=round(seconds_per_step * (steps - step)))
            line = f"{line}, {left} left"
        log.info("%s: %s", _of(step, steps), line)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        found = []
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                found.append(f"{name} {value:.4f}")
        if found:
            log.info("step %s: %s", f"{trainer.global_step:,}", ", ".join(found))

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs why training stopped early. Lightning skips this hook after signals and failures."""
        step, steps = trainer.global_step, data_of(trainer).total_steps
        if trainer.is_global_zero and trainer.should_stop and (steps is None or step < steps):
            log.info("stopped at %s: %s", _of(step, steps), _why(trainer))


def _of(step: int, steps: int | None) -> str:
    """Returns the step, and the number of all steps if it is known."""
    return f"step {step:,}" if steps is None else f"step {step:,} of {steps:,}"


def has_stopped_early(trainer: L.Trainer) -> bool:
    """Whether early stopping had no patience left in the checkpoint of a resumed run.

    Early stopping only decides after a validation, so a run that it has ended would train on until
    the next validation. The reason is set in its callback, for the last line of the log.
    """
    stopped = False
    for callback in trainer.early_stopping_callbacks:
        if callback.wait_count >= max(1, callback.patience):
            callback.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
            stopped = True
    return stopped


def _why(trainer: L.Trainer) -> str:
    """Returns which callback stopped training, and why. Lightning only logs it as a message."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any((timer.time_remaining() or 0) < 0 for timer in callbacks if isinstance(timer, Timer)):
        return "trainer.max_time is over (it counts earlier starts, too)"
    for callback in callbacks:
        if (
            isinstance(callback, EarlyStopping)
            and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED
        ):
            return _why_early(callback)
    return "a callback asked for it"


def _why_early(callback: EarlyStopping) -> str:
    """Returns why early stopping stopped training."""
    if callback.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
        count = callback.wait_count
        validations = "validations" if count > 1 else "validation"
        return f"{callback.monitor} did not improve for {count} {validations}"
    if callback.stopping_reason == EarlyStoppingReason.NON_FINITE_METRIC:
        return f"{callback.monitor} is not finite"
    is_reached = callback.stopping_reason == EarlyStoppingReason.STOPPING_THRESHOLD
    threshold = "stopping_threshold" if is_reached else "divergence_threshold"
    return f"{callback.monitor} is past EarlyStopping's {threshold}"
