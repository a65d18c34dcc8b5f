"""Restores the last row of metrics.csv, which a killed run may not have written."""

from __future__ import annotations

from typing import Any

import lightning as L
from typing_extensions import override

from lit_sft import lightning_internals
from lit_sft.callbacks.step_callback import StepCallback
from lit_sft.run.loggers import AppendingCSVLogger


class LastRow(StepCallback):
    """Keeps the metrics that were logged last in the checkpoint.

    The checkpoint of a step is written before its row of metrics. If a run is killed in between,
    the resumed run writes the row. This callback must come after all callbacks that log.
    """

    def __init__(self) -> None:
        self.row: dict[str, float] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.row = state_dict["row"]

    @override
    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        metrics = lightning_internals.metrics_to_log(trainer)
        if metrics is not None:
            step = lightning_internals.logged_step(trainer)
            self.row = {**metrics, "epoch": trainer.current_epoch, "step": step}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = dict(self.row)
        step = int(row.pop("step", -1))
        loggers = [each for each in trainer.loggers if isinstance(each, AppendingCSVLogger)]
        if not row or not loggers or not trainer.is_global_zero:
            return
        if loggers[0].experiment.has(step, row.keys()):
            return
        for logger in trainer.loggers:
            logger.log_metrics(row, step)
            logger.save()
