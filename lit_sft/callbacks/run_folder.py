"""The run's folder: when somebody removes it during the run, and when the run leaves it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lit_sft.callbacks.step_callback import StepCallback
from lit_sft.run import lock as run_lock

log = logging.getLogger(__name__)


class KeepFolder(StepCallback):
    """Makes the run's folder anew where it was removed, before something is written into it: TensorBoard would go on
    writing into a file that nobody can open.

    Args:
        config: Name of the file of settings, which tells whether the folder is there.
        restore: Writes it into the folder, and what else is there from the start.
    """

    def __init__(self, config: str, restore: Callable[[Path], None]) -> None:
        self.config, self.restore = config, restore
        self.folder: Path | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = trainer.log_dir  # a collective call
        self.folder = None if folder is None or not trainer.is_global_zero else Path(folder)

    @override
    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        if self.folder is None or (self.folder / self.config).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.restore(self.folder)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # The writer opens a new file for the next event.
                logger.experiment.close()
        log.warning("%s was removed during the run: made anew, what TensorBoard had before is lost", self.folder)


class LeaveFolder(Checkpoint):
    """Unlocks the run's folder when nothing is written into it any more: as a `Checkpoint`, it is called last.

    Args:
        folder: Tells it, once it is chosen; on rank 0, where it was locked.
    """

    def __init__(self, folder: Callable[[], Path | None]) -> None:
        self.folder = folder

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if (folder := self.folder()) is not None:
            run_lock.release(folder)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
