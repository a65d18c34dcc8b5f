"""Loggers that a resumed run appends to: metrics.csv and TensorBoard events."""

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
    """Lightning's metrics.csv, continued by a resumed run and never torn by a kill.

    The file on disk changes only when a row is logged or dropped, so a resume that is refused
    leaves it as it was.

    Args:
        log_dir: The run's folder.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.rows = _read_rows(Path(self.metrics_file_path))
        self._record(self.rows)
        self.is_ours = False
        """Whether we have written the whole file. A file that was found may end with half a row."""

    def drop_from(self, first_step: int) -> None:
        """Drops the rows of this step and of later ones."""
        self.rows = [row for row in self.rows if row.get("step", 0) < first_step]
        if os.path.exists(self.metrics_file_path):
            self._replace(self.rows)

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Whether there is a row of this step that has these columns."""
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
        # Somebody may have removed the file.
        is_there = self.is_ours and os.path.exists(self.metrics_file_path)
        if self._record(rows) or not is_there:
            self._replace(self.rows)
        else:
            with open(self.metrics_file_path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(rows)

    def _record(self, rows: list[dict[str, float]]) -> bool:
        """Adds the columns of these rows, and returns whether any of them is new."""
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
        """Does nothing: Lightning would delete the file that it finds."""


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger with our `MetricsFile`, and with a folder that is chosen later."""

    def use_folder(self, folder: Path) -> None:
        """Sets the folder to write into. Call it before the first metric is logged."""
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
    """Reads all complete rows; a last line without a line break was cut off by a kill."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for row in csv.DictReader(line for line in lines if line.endswith("\n")):
        rows.append({key: _number(value) for key, value in row.items() if value not in ("", None)})
    return rows


def _number(text: str) -> float:
    """Parses a number; digits alone make an int."""
    return int(text) if text.isdigit() else float(text)


def drop_from(loggers: Iterable[Any], first_step: int) -> None:
    """Drops what was logged for this step and later ones. Rank 0 calls it.

    Args:
        loggers: The loggers of the trainer. Only TensorBoard and our CSV logger are changed.
        first_step: The step at which the resumed run starts.
    """
    for logger in loggers:
        if isinstance(logger, AppendingCSVLogger):
            logger.experiment.drop_from(first_step)
        elif isinstance(logger, TensorBoardLogger):
            # Imported here, because only a resumed run needs it.
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # `purge_step` would write this event when the file is opened. But the step is only
            # known when the checkpoint has been read.
            start = Event(step=first_step, session_log=SessionLog(status=SessionLog.START))
            logger.experiment.file_writer.add_event(start)
