"""One run, one folder `version_N`, also over resumes: its number, its loggers, its config.yaml."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import TensorBoardLogger

from lit_sft import lightning_internals
from lit_sft.errors import UserError
from lit_sft.run import lock as run_lock
from lit_sft.run.loggers import AppendingCSVLogger

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
    """Whether a scalar is logged at all, and better in the direction that is said; else a run shows
    it when it is over.

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
        raise UserError(
            f"{group}.monitor {options.monitor} is not logged by this run, which logs"
            f" {', '.join(known)}"
        )
    mode = "max" if options.monitor in larger else "min"
    if options.mode != mode:
        better = "larger" if mode == "max" else "smaller"
        raise UserError(
            f"{group}.mode is {options.mode}, but {better} is better for {options.monitor}: set it"
            f" to {mode}"
        )


@dataclass
class ResumeOptions:
    """What a resumed run insists on."""

    allow_other_data: bool = False
    """Go on although data, template, tokenizer or `model.quantization` are not those of the
    checkpoint.
    """
    max_restarts: int = 50
    """A SLURM job that was started again this often is not requeued any more."""


def run_folder(ckpt_path: str | Path) -> Path | None:
    """The `version_N` folder that a checkpoint lies in, if it lies in one."""
    folder = Path(ckpt_path).absolute().parent.parent
    return folder if (folder / CONFIG).is_file() else None


def loggers(root: Path) -> list[TensorBoardLogger | AppendingCSVLogger]:
    """TensorBoard and CSV in one folder; which one, `RunFolder` decides when all ranks are
    there.
    """
    return [TensorBoardLogger(str(root), name=LOGS), AppendingCSVLogger(str(root), name=LOGS)]


def use_folder(loggers: Iterable[Any], folder: Path) -> None:
    """Makes TensorBoard's and our CSV logger write into a run's folder. Other loggers stay as they
    are.
    """
    for logger in loggers:
        if isinstance(logger, AppendingCSVLogger):
            logger.use_folder(folder)
        elif isinstance(logger, TensorBoardLogger):
            lightning_internals.move_tensorboard_logger(logger, folder)


def choose_folder(root: Path, stage: str, ckpt_path: str | None) -> Path:
    """Returns the folder of the checkpoint's run, or makes a new one.

    Args:
        root: `trainer.default_root_dir`.
        stage: `fit` insists on the folder of its checkpoint; others write elsewhere where they
            would disturb a run.
        ckpt_path: The checkpoint that a run goes on from, or that is evaluated; None for a new
            folder in any case.
    """
    folder = None if ckpt_path is None else run_folder(ckpt_path)
    if folder is None:
        return _new_folder(root / LOGS)
    # Into a folder that cannot be written TensorBoard would fail in a thread of its own, with a
    # traceback.
    is_writable = os.access(folder, os.W_OK)
    if stage == "fit" or (is_writable and not run_lock.is_held(folder)):
        return folder
    reason = "a run still trains in it" if is_writable else "it cannot be written"
    log.info("%s: %s, what this one writes goes elsewhere", folder, reason)
    return _new_folder(root / LOGS)


def _new_folder(logs: Path) -> Path:
    logs.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [-1]
        for path in logs.iterdir():
            match = re.fullmatch(r"version_(\d+)", path.name)
            if match:
                numbers.append(int(match[1]))
        folder = logs / f"version_{max(numbers) + 1}"
        try:
            folder.mkdir()
        except FileExistsError:
            # Another run has taken the number in between.
            continue
        return folder
