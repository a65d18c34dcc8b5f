"""The progress bar: Lightning's, which does not stop the device at every batch."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from typing_extensions import override

NUMBERS_EVERY = 0.5
"""Seconds."""


class Progress(RichProgressBar):
    """Shows new numbers twice a second at most: to read one, the host waits until a GPU has done all that it was
    given, and meanwhile gives it nothing. The bar itself moves with every batch.
    """

    shown = 0.0
    """When numbers were read last."""

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
        bars = [callback for callback in (own if isinstance(own, list) else [own]) if isinstance(callback, ProgressBar)]
        return trainer.get("enable_progress_bar") is not False and not bars
