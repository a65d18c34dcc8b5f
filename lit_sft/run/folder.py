"""One run, one folder `version_N`, also over resumes: its number, its loggers, its config.yaml."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import distributed
from typing_extensions import override

from lit_sft import lightning_internals
from lit_sft.errors import UserError
from lit_sft.ranks import global_rank
from lit_sft.run import lock as run_lock
from lit_sft.run import loggers as run_loggers
from lit_sft.run import slurm
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


def loggers(root: Path) -> list[TensorBoardLogger | AppendingCSVLogger]:
    """TensorBoard and CSV in one folder; which one, `RunFolder` decides when all ranks are there."""
    return [TensorBoardLogger(str(root), name=LOGS), AppendingCSVLogger(str(root), name=LOGS)]


class RunFolder(Callback):
    """Chooses the run's folder on rank 0, tells the others, and writes config.yaml into it. A resumed run leaves what
    is there as it is until everything is restored and checked.

    Args:
        ckpt_path: The checkpoint that the run goes on from, or that it evaluates; its folder is used.
        first_step: The step that a resumed run starts with.
        save_config: Writes the configuration to a path.
        go_on_from: (trainer, checkpoint, its step, the run's folder): makes the checkpoint the last of the folder.
    """

    def __init__(
        self,
        ckpt_path: str | None,
        first_step: int | None,
        save_config: Callable[[Path], None],
        go_on_from: Callable[[L.Trainer, Path, int, Path], None],
    ) -> None:
        self.ckpt_path, self.first_step = ckpt_path, first_step
        self.save_config, self.go_on_from = save_config, go_on_from
        self.folder: Path | None = None
        self.is_known = False
        """Whether all ranks have it."""
        self.refusal: UserError | None = None
        """Why rank 0 did not get the folder, before it could tell the others."""
        self.config = ""
        self.has_begun = False

    def claim(self, trainer: L.Trainer, stage: str) -> None:
        """Chooses the folder on rank 0, and locks it where it is trained in; before `trainer.fit`, which opens the
        loggers before any callback is asked.

        Raises:
            UserError: Another run trains in it. With several ranks `setup` raises that, on all of them.
        """
        if global_rank() > 0:
            return
        is_new = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        folder = self._choose(Path(trainer.default_root_dir), stage, is_new)
        try:
            if stage == "fit":
                run_lock.hold(folder, slurm.job_id())
        except UserError as error:
            if trainer.num_devices * trainer.num_nodes == 1:
                raise
            self.refusal = error
            trainer.loggers = []  # which would write into it
            return
        if stage == "fit" and not (folder / CONFIG).exists():
            slurm.remember(folder)
        self._use(folder, trainer)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        chosen, refusal = trainer.strategy.broadcast((str(self.folder), self.refusal))
        if refusal is not None:
            raise refusal
        self._check_same_checkpoint(trainer)
        folder, self.is_known = Path(chosen), True
        if trainer.is_global_zero:
            if stage == "fit" and not (folder / CONFIG).exists():
                self._write_config(folder)
            log.info("run folder: %s", os.path.relpath(folder))
        else:
            self._use(folder, trainer)

    def _check_same_checkpoint(self, trainer: L.Trainer) -> None:
        """Each rank has looked for it by itself.

        Raises:
            UserError: They have found different ones; on all ranks.
        """
        if trainer.world_size == 1:
            return
        found = "no checkpoint"
        if self.ckpt_path is not None:
            path, run = Path(self.ckpt_path).absolute(), run_folder(self.ckpt_path)
            found = path.name if run is None else str(path.relative_to(run.parent))
            found += "" if self.first_step is None else f" (step {self.first_step})"
        all_found = [found] * trainer.world_size
        distributed.all_gather_object(all_found, found)
        for rank, other in enumerate(all_found):
            if other != all_found[0]:
                raise UserError(
                    f"rank 0 would go on from {all_found[0]}, rank {rank} from {other}: let trainer.default_root_dir "
                    "lie on a file system that all nodes share, or give the path of one checkpoint as --ckpt_path"
                )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin(trainer)

    def begin(self, trainer: L.Trainer, has_steps: bool = True) -> None:
        """From here on the folder is that of this run: its settings, no log of what it does again, no later checkpoint.
        Once, when the checkpoint is restored: other data, another model or another optimizer would have been refused
        by now. All ranks call it.

        Args:
            trainer: Of the run.
            has_steps: Whether there is a step left; else the folder keeps the settings that its steps were made with.
        """
        if self.has_begun or self.folder is None:
            return
        self.has_begun = True
        if self.ckpt_path is not None and self.first_step is not None:
            if trainer.is_global_zero:
                suffix = "" if has_steps else "; no step is left"
                log.info("resumed %s at step %s%s", self.ckpt_path, self.first_step, suffix)
            # before the job is written down: started again, it would take the last checkpoint of this folder
            self.go_on_from(trainer, Path(self.ckpt_path), self.first_step, self.folder)
        if not trainer.is_global_zero:
            return
        if not self.config and has_steps:
            slurm.remember(self.folder)
            self._write_config(self.folder)
        if self.first_step is not None:
            run_loggers.drop_from(trainer.loggers, self.first_step)

    def restore(self, folder: Path) -> None:
        """Writes again what the folder held from the start."""
        slurm.remember(folder)
        self._write_config(folder)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

    def _write_config(self, folder: Path) -> None:
        self.save_config(folder / CONFIG)
        self.config = (folder / CONFIG).read_text()

    def _use(self, folder: Path, trainer: L.Trainer) -> None:
        self.folder = folder
        for logger in trainer.loggers:
            if isinstance(logger, AppendingCSVLogger):
                logger.use_folder(folder)
            elif isinstance(logger, TensorBoardLogger):
                lightning_internals.move_tensorboard_logger(logger, folder)

    def _choose(self, root: Path, stage: str, is_new: bool) -> Path:
        if not is_new and self.ckpt_path is not None and (folder := run_folder(self.ckpt_path)) is not None:
            writable = os.access(folder, os.W_OK)  # else TensorBoard fails in a thread of its own, with a traceback
            if stage == "fit" or (writable and not run_lock.is_held(folder)):
                return folder
            reason = "a run still trains in it" if writable else "it cannot be written"
            log.info("%s: %s, what this one writes goes elsewhere", folder, reason)
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
