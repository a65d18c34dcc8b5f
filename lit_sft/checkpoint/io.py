"""Checkpoints: written aside, synced and renamed; found again, and recognized when they are torn."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from torch import distributed
from typing_extensions import override

from lit_sft.checkpoint import files, sharded
from lit_sft.checkpoint.files import is_intact
from lit_sft.errors import UserError
from lit_sft.files import target

log = logging.getLogger(__name__)


class CheckpointFiles(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints. A state that is spread over ranks becomes a directory with a part of
    each, everything else one file.

    Args:
        async_save: Write in a thread, from a copy in host memory, while training goes on.
    """

    def __init__(self, async_save: bool = False) -> None:
        self.async_save = async_save
        self._copy = sharded.HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group: Any = None

    @staticmethod
    def path(run_folder: Path, step: int) -> Path:
        """Where the checkpoint of an optimizer step lies."""
        return files.path_of(run_folder, step)

    @staticmethod
    def go_back(path: Path, step: int, best_step: int | None) -> bool:
        """Makes it the last of its folder; whether the best one up to there is there, too."""
        return files.go_back(path, step, best_step)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Saves; on rank 0 only, or on all ranks where the state is sharded.

        Args:
            checkpoint: Tensors and plain values; DTensors are what is sharded.
            path: File or directory to write.
            storage_options: Arguments of `files.keep`, called once it is complete.

        Raises:
            UserError: It could not be written, or (in a thread) the one before it.
        """
        self.wait()
        path, pieces, keep = Path(path), None, storage_options
        if sharded.is_sharded(checkpoint):
            checkpoint, pieces = sharded.cut(checkpoint)
            if self._group is None:  # of its own, on the CPU: a thread uses it while the ranks train with another
                self._group = distributed.new_group(backend="gloo")
        self._agree(path, pieces, lambda: files.clear(path, is_folder=pieces is not None), only_first=True)
        if not self.async_save:
            self._write(checkpoint, pieces, path, keep)
            return
        checkpoint, pieces = self._copy([checkpoint, pieces])
        self._thread = threading.Thread(target=self._write_or_fail, args=(checkpoint, pieces, path, keep))
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written any more.

        Raises:
            UserError: It could not be written.
        """
        self.teardown()
        self.check()

    def check(self) -> None:
        """Notices, without waiting, that what was written in the thread has failed.

        Raises:
            UserError: It has.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    @override
    def teardown(self) -> None:
        """Ends with the run, whatever became of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_or_fail(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:
            self._error = error

    def _write(self, checkpoint: Any, pieces: dict[str, sharded.Piece] | None, path: Path, keep: Any) -> None:
        aside = files.aside(path)

        def write_own() -> None:
            if pieces is None:
                files.write(checkpoint, aside)
                return
            files.write(pieces, aside / files.PART.format(distributed.get_rank()))
            if distributed.get_rank() == 0:
                files.write(checkpoint, aside / files.STATE)

        def finish() -> None:
            files.put_in_place(path)
            if keep is not None:
                files.keep(path, **keep)

        try:
            self._agree(path, pieces, write_own)
            self._agree(path, pieces, finish, only_first=True)
        except BaseException:
            files.remove(aside)
            raise

    def _agree(self, path: Path, pieces: Any, act: Callable[[], None], only_first: bool = False) -> None:
        """Acts; where the state is sharded, on each rank (or the first), and raises on all of them if one failed."""
        error = None
        try:
            with files.reported(path):
                if pieces is None or not only_first or distributed.get_rank() == 0:
                    act()
        except UserError as failed:
            error = failed
        if pieces is not None:
            errors: list[UserError | None] = [None] * distributed.get_world_size()
            distributed.all_gather_object(errors, error, group=self._group)
            error = next((failed for failed in errors if failed is not None), None)
        if error is not None:
            raise error

    # ------------------------------------------------------------------ reading

    @override
    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(path)


def open_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint whose tensors stay in their files until they are used: `tensor[slices]` reads a part of one.

    Raises:
        UserError: It is not there, torn, or holds something else than tensors and plain values.
    """
    path = Path(path)
    files.check(path)
    if not path.is_dir():
        return files.read(path)
    parts = [files.read(part) for part in sorted(path.glob(files.PART.format("*")))]
    try:
        return sharded.join(files.read(path / files.STATE), parts)
    except ValueError as error:
        raise UserError(f"--ckpt_path {path} is not complete: {error}") from error


def read_checkpoint(path: str | os.PathLike, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A whole checkpoint on the CPU, whatever number of ranks wrote it.

    Args:
        path: A file or a directory.
        without: Entries that are not read.

    Raises:
        UserError: It is not there, torn, or holds something else than tensors and plain values.
    """
    checkpoint = open_checkpoint(path)
    return sharded.whole({key: value for key, value in checkpoint.items() if key not in without})


def saved_step(path: str | os.PathLike) -> int:
    """The optimizer steps in a checkpoint, whatever its name.

    Raises:
        UserError: It is not there, torn, or another kind of file.
    """
    step = open_checkpoint(path).get("global_step")
    if step is None:
        raise UserError(f"--ckpt_path {path} holds no global_step: it is not a checkpoint of a run")
    return int(step)


def find_checkpoint(ckpt_path: str | None, logs: Path, subcommand: str) -> str | None:
    """The checkpoint that is meant: a path; with `last` the newest intact one (None where `fit` starts anew); with
    `best`, but for `fit`, the best of the run that holds it.

    Raises:
        UserError: There is none.
    """
    if ckpt_path == "last" or ckpt_path == "best" and subcommand != "fit":
        found = files.find_last(logs)
        if found is not None:
            _tell_of_newer(logs, found)
        elif subcommand != "fit":
            raise UserError(
                f"--ckpt_path {ckpt_path}: there is no intact checkpoint below {logs}; run `fit` first, or give a path"
            )
        return None if found is None else str(_best_beside(found) if ckpt_path == "best" else found)
    found = None if ckpt_path is None else Path(ckpt_path)
    if found is not None and (found / files.FOLDER).is_dir():  # a run
        found = files.find_last(found.absolute().parent, found.absolute().name)
    if ckpt_path is not None and (found is None or not found.exists()):
        raise UserError(f"--ckpt_path {ckpt_path}: there is no such checkpoint")
    if found is not None and found.name in (files.LAST, files.BEST):
        found = Path(os.path.normpath(found.parent / (target(found) or found.name)))
    return None if found is None else str(found)


def _best_beside(last: Path) -> Path:
    """The best checkpoint of a run, whose last one may be a file of the user's beside its own."""
    folder = last.parent.parent / files.FOLDER
    name = target(folder / files.BEST)
    if name is None or not is_intact(best := folder / name):
        raise UserError(
            f"--ckpt_path best: {folder} holds no intact {files.BEST}, which a run makes with data.validation or "
            "data.val_size; take last, or give a path"
        )
    return best


def _tell_of_newer(logs: Path, found: Path) -> None:
    """Says which newer runs are passed over, because they were stopped before they saved anything."""
    run, saved = found.parent.parent, found.stat().st_mtime
    newer = [
        folder.name
        for folder in files.runs_below(logs)
        if int(folder.name.removeprefix("version_")) > int(run.name.removeprefix("version_"))
        and (settings := folder / "config.yaml").is_file()
        and settings.stat().st_mtime > saved
        and not any((folder / files.FOLDER).glob("step=*.ckpt"))
    ]
    if newer:
        log.warning("%s: no checkpoint yet, passed over for the older %s", ", ".join(sorted(newer)), run)
