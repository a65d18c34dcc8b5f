"""What a run logs: metrics.csv and TensorBoard's events, which a resumed run goes on with."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override


class MetricsFile(ExperimentWriter):
    """Lightning's metrics.csv, which goes on with the file it finds and is whole whenever the run is killed. The file
    stays as it is until something is logged or dropped: a run that is refused meanwhile was not here.

    Args:
        log_dir: The run's folder.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.rows = _read_rows(Path(self.metrics_file_path))
        self._record(self.rows)
        self.is_ours = False
        """Whether the file holds these rows and nothing else; one that is found may end within a row."""

    def drop_from(self, first_step: int) -> None:
        """Drops what was logged of this step and later ones."""
        self.rows = [row for row in self.rows if row.get("step", 0) < first_step]
        if os.path.exists(self.metrics_file_path):
            self._replace(self.rows)

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Whether a row of this step with these columns is there."""
        return any(row.get("step") == step and set(names) <= row.keys() for row in self.rows)

    @override
    def save(self) -> None:
        """Appends; rewrites where there is a new column, or no file that is ours."""
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        self.rows += rows
        is_there = self.is_ours and os.path.exists(self.metrics_file_path)  # it may have been removed
        if self._record(rows) or not is_there:
            self._replace(self.rows)
        else:
            with open(self.metrics_file_path, "a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(rows)

    def _record(self, rows: list[dict[str, float]]) -> bool:
        """Whether there are columns that were not there before."""
        new = set().union(*rows) - set(self.metrics_keys)
        self.metrics_keys = sorted({*self.metrics_keys, *new})
        return bool(new)

    def _replace(self, rows: list[dict[str, float]]) -> None:
        aside = Path(f"{self.metrics_file_path}.tmp")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(aside, self.metrics_file_path)
        self.is_ours = True

    @override
    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the file."""


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger with our file."""

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        if not isinstance(self._experiment, MetricsFile):
            self._experiment = MetricsFile(self.log_dir)
        return self._experiment


def _read_rows(path: Path) -> list[dict[str, float]]:
    """All rows but one that was cut off within."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [
        {key: _number(value) for key, value in row.items() if value not in ("", None)}
        for row in csv.DictReader(line for line in lines if line.endswith("\n"))
    ]


def _number(text: str) -> float:
    """An int where it was written as one."""
    return int(text) if text.isdigit() else float(text)


def drop_from(loggers: Iterable[Any], first_step: int) -> None:
    """Drops what was logged of this step and later ones; on rank 0.

    Args:
        loggers: Of the trainer; those of the user's own stay as they are.
        first_step: The step that a resumed run starts with.
    """
    for logger in loggers:
        if isinstance(logger, AppendingCSVLogger):
            logger.experiment.drop_from(first_step)
        elif isinstance(logger, TensorBoardLogger):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # its own import waits for a run, too

            # What `purge_step` writes when the file is opened, which is before the checkpoint is read.
            start = Event(step=first_step, session_log=SessionLog(status=SessionLog.START))
            logger.experiment._get_file_writer().add_event(start)


class LastRow(Callback):
    """Remembers in checkpoints what was logged last: that of a step is written before its row, and a run that is
    killed in between gets the row when it goes on. Comes after all callbacks that log.
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
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logged, loop = trainer._logger_connector, trainer.fit_loop
        if logged.should_update_logs and not loop._should_accumulate():
            values = {name: float(value) for name, value in logged.metrics["log"].items()}
            self.row = {**values, "epoch": trainer.current_epoch, "step": loop.epoch_loop._batches_that_stepped}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = dict(self.row)
        step = int(row.pop("step", -1))
        files = [logger.experiment for logger in trainer.loggers if isinstance(logger, AppendingCSVLogger)]
        if not row or not trainer.is_global_zero or not files or files[0].has(step, row.keys()):
            return
        for logger in trainer.loggers:
            logger.log_metrics(row, step)
            logger.save()
