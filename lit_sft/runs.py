"""One run, one folder `version_N`, also over resumes: its number, its loggers, its config.yaml."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from lit_sft import locking
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


def check_monitor(group: str, options: Any, scores: Sequence[str], validated: bool) -> None:
    """Whether a scalar is logged at all, and better in the direction that is said; else a run shows it when it is over.

    Args:
        group: The settings' name.
        options: With `monitor` and `mode`.
        scores: Names of the scores of answers.
        validated: Whether there is a validation set.

    Raises:
        UserError: It is not.
    """
    larger = [f"val/{name}" for name in ("token_accuracy", *scores)] if validated else []
    known = ["train/loss", *(["val/loss", "val/perplexity"] if validated else []), *larger]
    if options.monitor not in known:
        raise UserError(f"{group}.monitor {options.monitor} is not logged by this run, which logs {', '.join(known)}")
    mode = "max" if options.monitor in larger else "min"
    if options.mode != mode:
        better = "larger" if mode == "max" else "smaller"
        raise UserError(
            f"{group}.mode is {options.mode}, but {better} is better for {options.monitor}: set it to {mode}"
        )


@dataclass
class ResumeOptions:
    """What a resumed run insists on."""

    allow_other_data: bool = False
    """Go on although data, template, tokenizer or `model.quantization` are not those of the checkpoint."""
    max_restarts: int = 50
    """A SLURM job that was started again this often is not requeued any more."""


def run_folder(ckpt_path: str | Path) -> Path | None:
    """The `version_N` folder that a checkpoint lies in, if it lies in one."""
    folder = Path(ckpt_path).absolute().parent.parent
    return folder if (folder / CONFIG).is_file() else None


class MetricsFile(ExperimentWriter):
    """Lightning's metrics.csv, which goes on with the file it finds and is whole whenever the run is killed.

    Args:
        log_dir: The run's folder.
        first_step: Rows from this step on were logged after the checkpoint that a run resumes from; they are dropped.
    """

    def __init__(self, log_dir: str, first_step: int | None) -> None:
        super().__init__(log_dir)
        rows = _read_rows(Path(self.metrics_file_path))
        self.rows = [row for row in rows if first_step is None or row.get("step", 0) < first_step]
        self._record(self.rows)
        if self.rows or rows:
            self._replace(self.rows)

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Whether a row of this step with these columns is there."""
        return any(row.get("step") == step and set(names) <= row.keys() for row in self.rows)

    @override
    def save(self) -> None:
        """Appends; rewrites where there is a new column, or no file."""
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        self.rows += rows
        if self._record(rows) or not os.path.exists(self.metrics_file_path):  # it may have been removed
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

    @override
    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the file."""


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger with our file.

    Attributes:
        first_step: The step that a resumed run starts with.
    """

    first_step: int | None = None

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        if not isinstance(self._experiment, MetricsFile):
            self._experiment = MetricsFile(self.log_dir, self.first_step)
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


def loggers(root: Path) -> list[TensorBoardLogger | AppendingCSVLogger]:
    """TensorBoard and CSV in one folder; which one, `RunFolder` decides when all ranks are there."""
    return [TensorBoardLogger(str(root), name=LOGS), AppendingCSVLogger(str(root), name=LOGS)]


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


class RunFolder(Callback):
    """Chooses the run's folder on rank 0, tells the others, and writes config.yaml into it.

    Args:
        ckpt_path: The checkpoint that the run goes on from, or that it evaluates; its folder is used.
        first_step: The step that a resumed run starts with.
        save_config: Writes the configuration to a path.
        job: Id of the SLURM job that the run is in.
    """

    def __init__(
        self,
        ckpt_path: str | None,
        first_step: int | None,
        save_config: Callable[[Path], None],
        job: str | None = None,
    ) -> None:
        self.ckpt_path, self.first_step, self.save_config, self.job = ckpt_path, first_step, save_config, job
        self.folder: Path | None = None
        self.is_known = False
        """Whether all ranks have it."""
        self.refusal: UserError | None = None
        """Why rank 0 did not get the folder, before it could tell the others."""
        self.config = ""

    def claim(self, trainer: L.Trainer, stage: str) -> None:
        """Chooses the folder on rank 0, and locks it where it is trained in; before `trainer.fit`, which opens the
        loggers before any callback is asked.

        Raises:
            UserError: Another run trains in it. With several ranks `setup` raises that, on all of them.
        """
        if global_rank() > 0:
            return
        folder = self._choose(Path(trainer.default_root_dir), stage)
        try:
            if stage == "fit":
                locking.hold(folder, self.job)
        except UserError as error:
            if trainer.num_devices * trainer.num_nodes == 1:
                raise
            self.refusal = error
            trainer.loggers = []  # which would write into it
            return
        self._use(folder, trainer)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        chosen, refusal = trainer.strategy.broadcast((str(self.folder), self.refusal))
        if refusal is not None:
            raise refusal
        folder, self.is_known = Path(chosen), True
        if trainer.is_global_zero:
            if stage == "fit":
                self.save_config(folder / CONFIG)
                self.config = (folder / CONFIG).read_text()
            log.info("run folder: %s", os.path.relpath(folder))
        else:
            self._use(folder, trainer)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

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

    def _choose(self, root: Path, stage: str) -> Path:
        if self.ckpt_path is not None and (folder := run_folder(self.ckpt_path)) is not None:
            if stage == "fit" or not locking.is_held(folder):
                return folder
            log.info("%s: a run still trains in it, what this one writes goes elsewhere", folder)
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
