"""One run, one folder `version_N`, also over resumes: its number, its loggers, its config.yaml."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

log = logging.getLogger(__name__)

LOGS = "lightning_logs"
CONFIG = "config.yaml"


def run_folder(ckpt_path: str | Path) -> Path | None:
    """The `version_N` folder that a checkpoint lies in, if it lies in one."""
    folder = Path(ckpt_path).absolute().parent.parent
    return folder if (folder / CONFIG).is_file() else None


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger, which deletes the file it finds; this one goes on with it.

    Attributes:
        first_step: Rows from this step on were logged after the checkpoint that a run resumes from; they are dropped.
    """

    first_step: int | None = None

    @property
    @override
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            rows = _read_rows(path, self.first_step)
            path.unlink(missing_ok=True)
            writer = super().experiment
            writer.metrics = rows + writer.metrics
            writer.save()
        return super().experiment


def _read_rows(path: Path, first_step: int | None) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [
            {key: float(value) for key, value in row.items() if value not in ("", None)} for row in csv.DictReader(file)
        ]
    rows = [row for row in rows if first_step is None or row.get("step", 0) < first_step]
    return [{**row, "step": int(row["step"])} for row in rows]


def loggers(root: Path) -> list[TensorBoardLogger | AppendingCSVLogger]:
    """TensorBoard and CSV in one folder; which one, `RunFolder` decides when all ranks are there."""
    return [TensorBoardLogger(str(root), name=LOGS), AppendingCSVLogger(str(root), name=LOGS)]


class RunFolder(Callback):
    """Chooses the run's folder on rank 0, tells the others, and writes config.yaml into it.

    Args:
        ckpt_path: The checkpoint that the run goes on from, or that it evaluates; its folder is used.
        first_step: The step that a resumed run starts with.
        save_config: Writes the configuration to a path.
    """

    def __init__(self, ckpt_path: str | None, first_step: int | None, save_config: Callable[[Path], None]) -> None:
        self.ckpt_path, self.first_step, self.save_config = ckpt_path, first_step, save_config
        self.folder: Path | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.folder is not None:
            return
        folder = str(self._choose(Path(trainer.default_root_dir))) if trainer.is_global_zero else ""
        self.folder = Path(trainer.strategy.broadcast(folder))
        for logger in trainer.loggers:
            if isinstance(logger, (TensorBoardLogger, AppendingCSVLogger)):
                logger._version = int(self.folder.name.removeprefix("version_"))
                logger._root_dir, logger._name = str(self.folder.parent.parent), self.folder.parent.name
                if isinstance(logger, TensorBoardLogger) and self.first_step is not None:
                    logger._kwargs["purge_step"] = self.first_step
                elif isinstance(logger, AppendingCSVLogger):
                    logger.first_step = self.first_step
        if trainer.is_global_zero and stage == "fit":
            self.save_config(self.folder / CONFIG)
        log.info("run folder: %s", os.path.relpath(self.folder))

    def _choose(self, root: Path) -> Path:
        if self.ckpt_path is not None and (folder := run_folder(self.ckpt_path)) is not None:
            return folder
        logs = root / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        while True:  # another run may take the number in between
            taken = [int(m[1]) for p in logs.iterdir() if (m := re.fullmatch(r"version_(\d+)", p.name))]
            folder = logs / f"version_{max(taken, default=-1) + 1}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
