"""What a run logs: metrics.csv and TensorBoard's events, which a resumed run goes on with."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from lit_sft.files import atomic_write, check_not_removed


class MetricsFile(ExperimentWriter):
    """Lightning's metrics.csv, which goes on with the file it finds and is whole whenever the run
    is killed. The file stays as it is until something is logged or dropped: a run that is refused
    meanwhile was not here.

    Args:
        log_dir: The run's folder.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.rows = _read_rows(Path(self.metrics_file_path))
        self._record(self.rows)
        self.is_ours = False
        """Whether the file holds these rows and nothing else; one that is found may end within a
        row.
        """

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
        """Appends rows, or rewrites the file if it has a new column or is not ours yet.

        Raises:
            UserError: The folder of the run was removed.
        """
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        check_not_removed(Path(self.metrics_file_path).parent)
        self.rows += rows
        # It may have been removed.
        is_there = self.is_ours and os.path.exists(self.metrics_file_path)
        if self._record(rows) or not is_there:
            self._replace(self.rows)
        else:
            with open(self.metrics_file_path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(rows)

    def _record(self, rows: list[dict[str, float]]) -> bool:
        """Whether there are columns that were not there before."""
        new = set().union(*rows) - set(self.metrics_keys)
        self.metrics_keys = sorted({*self.metrics_keys, *new})
        return bool(new)

    def _replace(self, rows: list[dict[str, float]]) -> None:
        with atomic_write(Path(self.metrics_file_path), newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        self.is_ours = True

    @override
    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the file."""


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger with our file, in a folder that may be chosen after the logger is
    made.
    """

    def use_folder(self, folder: Path) -> None:
        """Writes into a folder from now on; called before the first metric."""
        # `CSVLogger` reads `_save_dir`, its base class in Fabric `_root_dir`.
        self._save_dir = self._root_dir = str(folder.parent.parent)
        self._name = folder.parent.name
        self._version = folder.name

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
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
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
            # Its own import waits for a run, too.
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # What `purge_step` writes when the file is opened, which is before the checkpoint is
            # read.
            start = Event(step=first_step, session_log=SessionLog(status=SessionLog.START))
            logger.experiment.file_writer.add_event(start)
