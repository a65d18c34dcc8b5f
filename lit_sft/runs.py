"""One run, one folder `version_N`, also over resumes: its number, its loggers, its config.yaml."""

from __future__ import annotations

import csv
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from lit_sft.prepare import global_rank
from lit_sft.types import UserError

log = logging.getLogger(__name__)

LOGS = "lightning_logs"
CONFIG = "config.yaml"


@dataclass
class EarlyStoppingOptions:
    """Stops when a scalar no longer improves."""

    monitor: str = "val/loss"
    """Scalar that is watched."""
    patience: int = 3
    """Validations without improvement before the run stops."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""

    def check(self, metrics: Sequence[str], validated: bool) -> None:
        """Whether the scalar is logged at all; Lightning would find out after an epoch.

        Args:
            metrics: Names of the generation metrics.
            validated: Whether there is a validation set.

        Raises:
            UserError: It is not.
        """
        names = ("loss", "perplexity", "token_accuracy", *metrics) if validated else ()
        known = ["train/loss", *(f"val/{name}" for name in names)]
        if self.monitor not in known:
            raise UserError(
                f"early_stopping.monitor {self.monitor} is not logged by this run, which logs {', '.join(known)}"
            )


@dataclass
class ResumeOptions:
    """What a resumed run insists on."""

    allow_other_data: bool = False
    """Go on although data, template or tokenizer are not those of the checkpoint."""
    max_restarts: int = 50
    """A SLURM job that was started again this often is not requeued any more."""


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
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            rows = _read_rows(path, self.first_step)
            path.unlink(missing_ok=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*exists and is not empty.*")
                writer = super().experiment
            writer.metrics = rows + writer.metrics
            writer.save()
        return super().experiment


def _read_rows(path: Path, first_step: int | None) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [
            {key: _number(value) for key, value in row.items() if value not in ("", None)}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if first_step is None or row.get("step", 0) < first_step]


def _number(text: str) -> float:
    """An int where it was written as one."""
    return int(text) if text.isdigit() else float(text)


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

    def claim(self, trainer: L.Trainer) -> None:
        """Chooses the folder on rank 0; before `trainer.fit`, which opens the loggers before any callback is asked."""
        if global_rank() == 0:
            self._use(self._choose(Path(trainer.default_root_dir)), trainer)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = Path(trainer.strategy.broadcast(str(self.folder)))
        if trainer.is_global_zero:
            if stage == "fit":
                self.save_config(folder / CONFIG)
            log.info("run folder: %s", os.path.relpath(folder))
        else:
            self._use(folder, trainer)

    def _use(self, folder: Path, trainer: L.Trainer) -> None:
        self.folder = folder
        for logger in trainer.loggers:
            if isinstance(logger, (TensorBoardLogger, AppendingCSVLogger)):
                logger._version = int(folder.name.removeprefix("version_"))
                logger._root_dir, logger._name = str(folder.parent.parent), folder.parent.name
                if isinstance(logger, AppendingCSVLogger):
                    logger.first_step = self.first_step
                elif self.first_step is not None:
                    logger._kwargs["purge_step"] = self.first_step

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
