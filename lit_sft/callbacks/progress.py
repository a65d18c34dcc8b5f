"""What a terminal shows of a training: Lightning's bar, which stops no device at every batch; in a
log, lines.
"""

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
"""Seconds."""
LINES_EVERY = 10.0
"""Seconds."""
LOSS, SPEED = "train/loss", "train/tokens_per_second"


class Progress(RichProgressBar):
    """Shows new numbers twice a second at most: to read one, the host waits until a GPU has done
    all that it was given, and meanwhile gives it nothing. The bar itself moves with every batch.
    """

    shown = 0.0
    """When numbers were read last."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from transformers.utils import logging as transformers_logging

        # The export's would be drawn across this one.
        transformers_logging.disable_progress_bar()
        super().on_train_start(trainer, pl_module)

    @override
    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """One line: of all columns only the bar gives way."""
        columns = super().configure_columns(trainer)
        for column in [*columns, self._metric_component]:
            if not isinstance(column, BarColumn):
                column.get_table_column = _unwrapped_column
        return columns  # type: ignore[no-any-return]

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Two numbers, for which 80 columns have place. What a validation found is told in a
        line.
        """
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
        """Whether the settings of a trainer ask for a bar and bring none of their own."""
        own = trainer.get("callbacks") or []
        bars = [
            callback
            for callback in (own if isinstance(own, list) else [own])
            if isinstance(callback, ProgressBar)
        ]
        return trainer.get("enable_progress_bar") is not False and not bars


def _unwrapped_column() -> Column:
    return Column(no_wrap=True)


class Lines(StepCallback):
    """Says how training goes: every ten seconds at most where there is no bar or it cannot be
    drawn, as in the log of a job; what a validation found, which a bar would overwrite; and why it
    ended early.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        self.last = 0.0
        self.first_step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # For another one than ours Lightning reads numbers at every batch.
        bar = trainer.progress_bar_callback
        pl_module.in_bar = bar is not None and not isinstance(bar, Progress)  # type: ignore[assignment]
        self.began, self.first_step = None, trainer.global_step
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping):
                # The checkpoint brings the reason of an earlier stop.
                callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.began is None:
            # Now, and not before the answers that come first.
            self.began = self.last = time.monotonic()

    @override
    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        now = time.monotonic()
        step = trainer.global_step
        steps = data_of(trainer).total_steps
        if now - self.last < LINES_EVERY and step < steps:
            return
        has_bar = trainer.progress_bar_callback is not None and rich.get_console().is_terminal
        if not trainer.is_global_zero or has_bar:
            return
        assert self.began is not None
        self.last = now
        left = timedelta(
            seconds=round((now - self.began) / max(1, step - self.first_step) * (steps - step))
        )
        numbers = trainer.callback_metrics
        log.info(
            "step %s of %s: loss %.4f, %s tokens/s, %s left",
            *(f"{step:,}", f"{steps:,}", numbers[LOSS], f"{numbers[SPEED]:,.0f}", left),
        )

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if trainer.state.fn == "fit" and not trainer.sanity_checking and found:
            values = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            log.info("step %s: %s", f"{trainer.global_step:,}", values)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not for signals, which end a run sooner, nor for failures."""
        step, steps = trainer.global_step, data_of(trainer).total_steps
        if trainer.is_global_zero and trainer.should_stop and step < steps:
            log.info("stopped at step %s of %s: %s", f"{step:,}", f"{steps:,}", _why(trainer))


def has_stopped_early(trainer: L.Trainer) -> bool:
    """Whether early stopping has no patience left, before the first step: it asks at a validation
    only, and a resumed run would go on to the next one. Its callback gets the reason, which the
    last line tells.
    """
    stopped = False
    for callback in trainer.early_stopping_callbacks:
        if callback.wait_count >= max(1, callback.patience):
            callback.stopping_reason, stopped = EarlyStoppingReason.PATIENCE_EXHAUSTED, True
    return stopped


def _why(trainer: L.Trainer) -> str:
    """Which callback has asked for a stop; Lightning says it where only its own messages are
    read.
    """
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
    count = callback.wait_count
    if callback.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
        return (
            f"{callback.monitor} did not improve for {count} validation{'s' if count > 1 else ''}"
        )
    if callback.stopping_reason == EarlyStoppingReason.NON_FINITE_METRIC:
        return f"{callback.monitor} is not finite"
    is_reached = callback.stopping_reason == EarlyStoppingReason.STOPPING_THRESHOLD
    return (
        f"{callback.monitor} is past EarlyStopping's"
        f" {'stopping' if is_reached else 'divergence'}_threshold"
    )
