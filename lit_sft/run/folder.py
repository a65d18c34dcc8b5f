"""The folder `version_N` of a run, which a resumed run keeps: its number and its loggers."""

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
from lit_sft.checkpoint import files as checkpoint_files
from lit_sft.errors import UserError
from lit_sft.run import lock as run_lock
from lit_sft.run import remains
from lit_sft.run.loggers import AppendingCSVLogger
from lit_sft.run.remains import CONFIG

log = logging.getLogger(__name__)

LOGS = "lightning_logs"


@dataclass
class EarlyStoppingOptions:
    """When training stops because a scalar no longer improves."""

    monitor: str = "val/loss"
    """Scalar that is watched."""
    patience: int = 3
    """Validations without improvement before the run stops."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""


def check_monitor(group: str, options: Any, scores: Sequence[str], validated: bool) -> None:
    """Checks before a run that the monitored scalar is logged, and that its mode is right.

    Args:
        group: The name of the settings, for messages.
        options: Settings with `monitor` and `mode`.
        scores: Names of the scores of generated answers.
        validated: Whether there is a validation set.

    Raises:
        UserError: The scalar is not logged, or the mode is the wrong one for it.
    """
    larger = [f"val/{name}" for name in ("token_accuracy", *scores)] if validated else []
    smaller = ["val/loss", "val/perplexity"] if validated else []
    known = ["train/loss", *smaller, *larger]
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
    """What is allowed when a run resumes."""

    allow_other_data: bool = False
    """Resume even if the data, template, tokenizer or `model.quantization` differ from those of the
    checkpoint.
    """
    max_restarts: int = 50
    """A SLURM job that was restarted this often is not requeued any more."""


def run_folder(ckpt_path: str | Path) -> Path | None:
    """Returns the run's folder that holds a checkpoint; None if the checkpoint lies elsewhere."""
    folder = Path(ckpt_path).absolute().parent.parent
    return folder if (folder / CONFIG).is_file() else None


def loggers(root: Path) -> list[TensorBoardLogger | AppendingCSVLogger]:
    """Returns the default loggers, TensorBoard and CSV.

    `RunFolder` chooses their folder later, when all ranks have met.

    Args:
        root: `trainer.default_root_dir`.
    """
    return [TensorBoardLogger(str(root), name=LOGS), AppendingCSVLogger(str(root), name=LOGS)]


def use_folder(loggers: Iterable[Any], folder: Path) -> None:
    """Makes the TensorBoard and CSV loggers write into a run's folder; others are not changed."""
    for logger in loggers:
        if isinstance(logger, AppendingCSVLogger):
            logger.use_folder(folder)
        elif isinstance(logger, TensorBoardLogger):
            lightning_internals.move_tensorboard_logger(logger, folder)


def choose_folder(root: Path, stage: str, ckpt_path: str | None, step: int | None) -> Path:
    """Returns the folder of the checkpoint's run, or makes a new one.

    Args:
        root: `trainer.default_root_dir`.
        stage: The command, such as `fit`.
        ckpt_path: The checkpoint to resume from or to evaluate; None for a new folder.
        step: The step of the checkpoint that `fit` resumes from; None for other commands.
    """
    folder = None if ckpt_path is None else run_folder(ckpt_path)
    if folder is None:
        return _new_folder(root / LOGS)
    reason = _reason_to_leave(folder, stage, step)
    if reason is None:
        remains.use_folder(folder)
        return folder
    new = _new_folder(root / LOGS)
    log.info("%s: %s; this run writes into %s", folder, reason, new)
    return new


def _reason_to_leave(folder: Path, stage: str, step: int | None) -> str | None:
    """Returns why a command must not write into the folder of its checkpoint; None if it may.

    Args:
        folder: The folder of the checkpoint's run.
        stage: The command.
        step: The step of the checkpoint that `fit` resumes from; None for other commands.
    """
    is_held = run_lock.is_held(folder)
    if stage == "fit":
        # While a run trains in the folder, `fit` stays, and the lock refuses it: the other run may
        # have saved a later checkpoint since this one looked for the last.
        is_older = step is not None and not is_held and checkpoint_files.has_later(folder, step)
        return f"it has a checkpoint after step {step}" if is_older else None
    # Without write permission TensorBoard would fail in its own thread, with a traceback.
    if not os.access(folder, os.W_OK):
        return "it cannot be written"
    return "a run still trains in it" if is_held else None


def _new_folder(logs: Path) -> Path:
    """Makes and returns the folder with the next free number."""
    remains.make_parents(logs)
    while True:
        numbers = [-1]
        for path in logs.iterdir():
            match = re.fullmatch(r"version_(\d+)", path.name)
            if match:
                numbers.append(int(match[1]))
        folder = logs / f"version_{max(numbers) + 1}"
        try:
            remains.make_folder(folder)
        except FileExistsError:
            # Another run has just taken this number.
            continue
        return folder
