"""The folder of a run: chosen and locked when the run begins, unlocked when it ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import distributed
from typing_extensions import override

from lit_sft.callbacks.checkpointer import Checkpointer
from lit_sft.errors import UserError
from lit_sft.ranks import global_rank
from lit_sft.run import lock as run_lock
from lit_sft.run import loggers as run_loggers
from lit_sft.run import slurm
from lit_sft.run.folder import CONFIG, choose_folder, run_folder, use_folder

log = logging.getLogger(__name__)


class RunFolder(Callback):
    """Chooses the run's folder on rank 0, tells the others, and writes config.yaml into it. A
    resumed run leaves what is there as it is until everything is restored and checked.

    Args:
        ckpt_path: The checkpoint that the run goes on from, or that it evaluates; its folder is
            used.
        first_step: The step that a resumed run starts with.
        save_config: Writes the configuration to a path.
        checkpointer: Makes the checkpoint the last of the folder.
    """

    def __init__(
        self,
        ckpt_path: str | None,
        first_step: int | None,
        save_config: Callable[[Path], None],
        checkpointer: Checkpointer,
    ) -> None:
        self.ckpt_path = ckpt_path
        self.first_step = first_step
        self.save_config = save_config
        self.checkpointer = checkpointer
        self.folder: Path | None = None
        self.is_known = False
        """Whether all ranks have it."""
        self.refusal: UserError | None = None
        """Why rank 0 did not get the folder, before it could tell the others."""
        self.config = ""
        self.has_begun = False

    def claim(self, trainer: L.Trainer, stage: str) -> None:
        """Chooses the folder on rank 0, and locks it where it is trained in; before `trainer.fit`,
        which opens the loggers before any callback is asked.

        Raises:
            UserError: Another run trains in it. With several ranks `setup` raises that, on all of
                them.
        """
        if global_rank() > 0:
            return
        ckpt_path = None if trainer.fast_dev_run else self.ckpt_path  # type: ignore[attr-defined]
        folder = choose_folder(Path(trainer.default_root_dir), stage, ckpt_path)
        try:
            if stage == "fit":
                run_lock.hold(folder, slurm.job_id())
        except UserError as error:
            if trainer.num_devices * trainer.num_nodes == 1:
                raise
            self.refusal = error
            # Which would write into it.
            trainer.loggers = []
            return
        if stage == "fit" and not (folder / CONFIG).exists():
            slurm.remember(folder)
        self.folder = folder
        use_folder(trainer.loggers, folder)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        chosen, refusal = trainer.strategy.broadcast((str(self.folder), self.refusal))
        if refusal is not None:
            raise refusal
        self._check_same_checkpoint(trainer)
        folder = Path(chosen)
        self.is_known = True
        if trainer.is_global_zero:
            if stage == "fit" and not (folder / CONFIG).exists():
                self._write_config(folder)
            log.info("run folder: %s", os.path.relpath(folder))
        else:
            self.folder = folder
            use_folder(trainer.loggers, folder)

    def _check_same_checkpoint(self, trainer: L.Trainer) -> None:
        """Each rank has looked for it by itself.

        Raises:
            UserError: They have found different ones; on all ranks.
        """
        if trainer.world_size == 1:
            return
        found = self._checkpoint_name()
        all_found = [found] * trainer.world_size
        distributed.all_gather_object(all_found, found)
        for rank, other in enumerate(all_found):
            if other != all_found[0]:
                raise UserError(
                    f"rank 0 would go on from {all_found[0]}, rank {rank} from {other}: let"
                    " trainer.default_root_dir lie on a file system that all nodes share, or give"
                    " the path of one checkpoint as --ckpt_path"
                )

    def _checkpoint_name(self) -> str:
        """The checkpoint without the folders above its run, which may be others on each node."""
        if self.ckpt_path is None:
            return "no checkpoint"
        path = Path(self.ckpt_path).absolute()
        run = run_folder(self.ckpt_path)
        name = path.name if run is None else str(path.relative_to(run.parent))
        return name if self.first_step is None else f"{name} (step {self.first_step})"

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin(trainer)

    def begin(self, trainer: L.Trainer, has_steps: bool = True) -> None:
        """From here on the folder is that of this run: its settings, no log of what it does again,
        no later checkpoint. Once, when the checkpoint is restored: other data, another model or
        another optimizer would have been refused by now. All ranks call it.

        Args:
            trainer: Of the run.
            has_steps: Whether there is a step left; else the folder keeps the settings that its
                steps were made with.
        """
        if self.has_begun or self.folder is None:
            return
        self.has_begun = True
        if self.ckpt_path is not None and self.first_step is not None:
            if trainer.is_global_zero:
                suffix = "" if has_steps else "; no step is left"
                log.info("resumed %s at step %s%s", self.ckpt_path, self.first_step, suffix)
            # Before the job is written down: started again, it would take the last checkpoint of
            # this folder.
            self.checkpointer.resume_from(
                trainer, Path(self.ckpt_path), self.first_step, self.folder
            )
        if not trainer.is_global_zero:
            return
        if not self.config and has_steps:
            slurm.remember(self.folder)
            self._write_config(self.folder)
        if self.first_step is not None:
            run_loggers.drop_from(trainer.loggers, self.first_step)

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config

    def _write_config(self, folder: Path) -> None:
        self.save_config(folder / CONFIG)
        self.config = (folder / CONFIG).read_text()


class LeaveFolder(Checkpoint):
    """Unlocks the run's folder when nothing is written into it any more: as a `Checkpoint`, it is
    called last.

    Args:
        run_folder: Knows the folder once it is chosen; on rank 0, where it was locked.
    """

    def __init__(self, run_folder: RunFolder) -> None:
        self.run_folder = run_folder

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.run_folder.folder is not None:
            run_lock.release(self.run_folder.folder)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")
