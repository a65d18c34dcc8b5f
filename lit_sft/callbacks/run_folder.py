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
from lit_sft.run import remains, slurm
from lit_sft.run.folder import CONFIG, choose_folder, run_folder, use_folder

log = logging.getLogger(__name__)


class RunFolder(Callback):
    """Chooses the run's folder on rank 0, tells the other ranks, and writes config.yaml into it.

    A resumed run changes nothing in its folder until everything is restored and checked.

    Args:
        ckpt_path: The checkpoint to resume from or to evaluate; the run uses its folder.
        first_step: The step that a resumed run starts at.
        save_config: A function that writes the config to a path.
        checkpointer: Points best.ckpt at the best checkpoint when a run resumes.
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
        """Whether all ranks know the folder."""
        self.refusal: UserError | None = None
        """Why rank 0 did not get the folder, until it can tell the other ranks."""
        self.config = ""
        """The text of config.yaml, for checkpoints."""
        self.has_begun = False

    def claim(self, trainer: L.Trainer, stage: str, missing: UserError | None = None) -> None:
        """Chooses the folder on rank 0, and locks it for training.

        It is called before `trainer.fit`, which opens the loggers before it calls any callback.

        Args:
            trainer: The trainer.
            stage: The command, such as `fit`.
            missing: The error of rank 0 if it has not found the checkpoint `last`.

        Raises:
            UserError: There is no checkpoint, or another run trains in the folder. With several
                ranks `setup` raises it, on all of them.
        """
        if global_rank() > 0:
            return
        if missing is not None:
            self._refuse(trainer, missing)
            return
        ckpt_path = None if trainer.fast_dev_run else self.ckpt_path  # type: ignore[attr-defined]
        folder = choose_folder(Path(trainer.default_root_dir), stage, ckpt_path, self.first_step)
        try:
            if stage == "fit":
                run_lock.hold(folder, slurm.job_id())
        except UserError as error:
            self._refuse(trainer, error)
            return
        if stage == "fit" and not (folder / CONFIG).exists():
            slurm.remember(folder)
        self.folder = folder
        use_folder(trainer.loggers, folder)

    def _refuse(self, trainer: L.Trainer, error: UserError) -> None:
        """Raises an error of rank 0, or with several ranks keeps it for `setup`.

        Raises:
            UserError: The error, if there is one rank.
        """
        if trainer.num_devices * trainer.num_nodes == 1:
            raise error
        self.refusal = error
        # The loggers would write into the folder of another run.
        trainer.loggers = []

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
        """Checks that all ranks have found the same checkpoint; each has searched by itself.

        Raises:
            UserError: The ranks have found different checkpoints; raised on all ranks.
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
        """Returns the checkpoint's path below `lightning_logs`, as paths may differ by node."""
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
        """Makes the folder that of the resumed run, once everything is restored and checked.

        Rows of metrics that will be logged again are dropped, and config.yaml is written. All ranks
        call it; further calls do nothing.

        Args:
            trainer: The trainer.
            has_steps: Whether a step is left. If not, the folder keeps the config that its steps
                were made with.
        """
        if self.has_begun or self.folder is None:
            return
        self.has_begun = True
        if self.ckpt_path is not None and self.first_step is not None:
            if trainer.is_global_zero:
                suffix = "" if has_steps else "; no step is left"
                log.info("resumed %s at step %s%s", self.ckpt_path, self.first_step, suffix)
            self.checkpointer.restore_best(trainer, self.folder)
        if not trainer.is_global_zero:
            return
        if not self.config and has_steps:
            slurm.remember(self.folder)
            self._write_config(self.folder)
        if self.first_step is not None:
            run_loggers.drop_from(trainer.loggers, self.first_step)

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step > (self.first_step or 0):
            remains.keep()

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config

    def _write_config(self, folder: Path) -> None:
        self.save_config(folder / CONFIG)
        self.config = (folder / CONFIG).read_text()


class LeaveFolder(Checkpoint):
    """Unlocks the run's folder after the last write. As a `Checkpoint` it is called last.

    Args:
        run_folder: Knows the folder, which rank 0 has locked.
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
