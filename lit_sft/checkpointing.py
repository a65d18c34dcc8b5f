"""Checkpoints: written aside, synced and renamed; found again, and recognized when they are torn."""

from __future__ import annotations

import logging
import os
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from typing_extensions import override

from lit_sft.types import UserError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
LAST = "last.ckpt"
BEST = "best.ckpt"


@dataclass
class CheckpointOptions:
    """When checkpoints are saved and how many are kept. One is always saved at the end of an epoch and of the run."""

    every_n_train_steps: int | None = None
    """Also after every n optimizer steps."""
    every_n_minutes: float | None = 30
    """Also when this much time has gone by since the last one."""
    keep_last: int = 2
    """Newest checkpoints that are kept, besides the best."""
    monitor: str = "val/loss"
    """Scalar by which the best checkpoint is chosen, where it is logged."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""

    def __post_init__(self) -> None:
        for name in ("every_n_train_steps", "every_n_minutes", "keep_last"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"checkpoint.{name} is {value}, it must be positive (null turns a schedule off)")


class AtomicCheckpointIO(TorchCheckpointIO):
    """A file is whole or not there: written beside its place, synced to disk, renamed. Read without running any
    pickled code.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise UserError(
                f"the checkpoint {path} could not be written ({error.strerror}); earlier ones are untouched"
            ) from error
        except RuntimeError as error:  # torch's writer reports a full disk this way
            if "PytorchStreamWriter" not in str(error):
                raise
            raise UserError(
                f"the checkpoint {path} could not be written (is the disk full?); earlier ones are untouched"
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    @override
    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a checkpoint to the CPU; only tensors and plain values, never code.

    Raises:
        UserError: It is not there, torn, or holds something else than plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"--ckpt_path {path}: there is no such checkpoint")
    if not is_intact(Path(path)):
        raise UserError(
            f"--ckpt_path {path} is damaged; use an earlier one, or --ckpt_path last to take the newest that is whole"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--ckpt_path {path} cannot be read as a checkpoint of lit_sft: {reason}") from error


def is_intact(path: Path) -> bool:
    """Whether a checkpoint file is complete: torch writes zip files, whose directory is at the end and names all
    checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def find_last(logs: Path, run: str = "version_*") -> Path | None:
    """The newest intact checkpoint of any run below `lightning_logs`; torn ones are passed over with a message."""
    files = [path for path in logs.glob(f"{run}/{FOLDER}/step=*.ckpt") if not path.is_symlink()]
    for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        if is_intact(path):
            return path
        log.warning("%s is torn: passed over", path)
    return None


def step_of(path: Path) -> int | None:
    """The number of optimizer steps in a checkpoint's name."""
    name = path.resolve().stem
    return int(name.removeprefix("step=")) if name.startswith("step=") else None


class Checkpointer(Checkpoint):
    """Saves between optimizer steps; keeps the newest few and the best, with `last.ckpt` and `best.ckpt` as links to
    them.

    Args:
        options: When and how many.
    """

    def __init__(self, options: CheckpointOptions) -> None:
        self.options = options
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()
        self.improved = False
        self.owed = False
        """A save is due, but a validation comes first."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_step": self.best_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or loop.batch_progress.is_last_batch:
            return  # the last step of an epoch is saved when it ends
        every = self.options.every_n_train_steps
        due = every is not None and trainer.global_step % every == 0
        if not due and self.options.every_n_minutes is not None:
            late = time.monotonic() - self.saved_at > 60 * self.options.every_n_minutes
            due = trainer.strategy.reduce_boolean_decision(late, all=False)
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self.owed = self.owed or due
        if self.owed and not loop._should_check_val_fx(fetcher):  # else a resumed run would leave the validation out
            self.save(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(self.options.monitor)
        sign = 1 if self.options.mode == "min" else -1
        if score is not None and (self.best_score is None or sign * float(score) < sign * self.best_score):
            self.best_score, self.best_step, self.improved = float(score), trainer.global_step, True
        self.owed = self.owed or self.improved
        loop = trainer.fit_loop.epoch_loop
        if self.owed and not loop._should_accumulate() and not loop.batch_progress.is_last_batch:
            self.save(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches: with another number of ranks or accumulation, its counters are rewritten."""
        state = checkpoint.get("SFTDataModule")
        if trainer.state.fn != "fit" or not state:
            return
        _recount(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], state, trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Saves the state of this step and drops what is no longer kept. All ranks call it."""
        folder = Path(trainer.strategy.broadcast(str(trainer.log_dir))) / FOLDER
        name = f"step={trainer.global_step:06d}.ckpt"
        if self.saved_step != trainer.global_step:
            trainer.save_checkpoint(folder / name)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            _link(folder / LAST, name)
            if self.improved:
                _link(folder / BEST, name)
            self._prune(folder)
        self.improved = self.owed = False

    def _prune(self, folder: Path) -> None:
        kept = {os.readlink(link) for link in (folder / LAST, folder / BEST) if link.is_symlink()}
        files = sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in files[self.options.keep_last :]:
            if path.name not in kept:
                path.unlink()


def _link(link: Path, target: str) -> None:
    """Points a link to a file of the same folder, in one step."""
    aside = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)


def _recount(progress: dict[str, Any], state: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Rewrites the micro-batch counters of the epoch from (optimizer steps done in it); what is a batch apart stays
    so.
    """
    order = trainer.datamodule.orders["train"]  # type: ignore[attr-defined]
    steps = state["position"][1]
    batches = order.batches_in_steps(steps) if steps else order.batches_per_epoch
    batches = min(batches, order.limited_batches(trainer.limit_train_batches))
    current = progress["current"]
    shift = batches - current["ready"]
    for part in (progress["current"], progress["total"]):
        for key in ("ready", "started", "processed", "completed"):
            part[key] += shift


def plain(value: Any) -> Any:
    """Tensors and plain values only, as `weights_only=True` reads them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    assert value is None or isinstance(value, (Tensor, bool, int, float, str)), type(value)
    return value
