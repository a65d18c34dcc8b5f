"""Writes checkpoints atomically (aside, synced, renamed), and reads them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from torch import distributed
from typing_extensions import override

from lit_sft.checkpoint import files, sharded
from lit_sft.checkpoint.files import KeepPolicy
from lit_sft.errors import UserError
from lit_sft.files import check_not_removed


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's plugin that writes and reads checkpoints.

    A state that is sharded over ranks becomes a directory with one part per rank. Any other state
    becomes one file.

    Args:
        async_save: Write in a thread, from a copy in host memory, while training continues.
    """

    def __init__(self, async_save: bool = False) -> None:
        self.async_save = async_save
        self._copy = sharded.HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group: Any = None

    @override
    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike,
        storage_options: KeepPolicy | None = None,
    ) -> None:
        """Saves a checkpoint. Rank 0 calls it, or all ranks if the state is sharded.

        Args:
            checkpoint: Tensors and plain values; DTensors are sharded.
            path: The file or directory to write.
            storage_options: Which other checkpoints of the run are kept. Lightning passes it on
                from the call that saves. It is None for a user's `ModelCheckpoint`, whose saves
                remove none of our checkpoints; an attribute of this object would apply to its
                saves, too.

        Raises:
            UserError: This checkpoint could not be written, or (with `async_save`) the one before.
        """
        self.wait()
        path = Path(path)
        policy = storage_options
        pieces = None
        if sharded.is_sharded(checkpoint):
            checkpoint, pieces = sharded.split(checkpoint)
            # The thread needs its own group (on the CPU), because training uses the default one.
            if self._group is None:
                self._group = distributed.new_group(backend="gloo")

        def make_room() -> None:
            # Only our own checkpoints have a policy. They lie in the folder of the run.
            if policy is not None:
                check_not_removed(path.parent.parent)
            files.clear(path, is_folder=pieces is not None)

        self._agree(path, pieces, make_room, only_first=True)
        if not self.async_save:
            self._write(checkpoint, pieces, path, policy)
            return
        checkpoint, pieces = self._copy([checkpoint, pieces])
        self._thread = threading.Thread(
            target=self._write_or_fail, args=(checkpoint, pieces, path, policy)
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until the thread has written its checkpoint.

        Raises:
            UserError: The checkpoint could not be written.
        """
        self.teardown()
        self.check()

    def check(self) -> None:
        """Raises the error of the thread, if it has failed; does not wait for it.

        Raises:
            UserError: The checkpoint could not be written.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    @override
    def teardown(self) -> None:
        """Waits for the thread, and ignores its errors."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_or_fail(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:
            self._error = error

    def _write(
        self,
        checkpoint: Any,
        pieces: dict[str, sharded.Piece] | None,
        path: Path,
        policy: KeepPolicy | None,
    ) -> None:
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
            if policy is not None:
                files.keep(path, policy)

        try:
            self._agree(path, pieces, write_own)
            self._agree(path, pieces, finish, only_first=True)
        except BaseException:
            files.remove(aside)
            raise

    def _agree(
        self, path: Path, pieces: Any, act: Callable[[], None], only_first: bool = False
    ) -> None:
        """Runs an action, and raises on all ranks if it fails on one of them.

        Args:
            path: The checkpoint, for messages.
            pieces: This rank's part of a sharded state; None if the state is not sharded. Then
                nothing is communicated.
            act: The action.
            only_first: Run it on rank 0 only.

        Raises:
            UserError: The action failed.
        """
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
    """Opens a checkpoint; its tensors stay in their files until they are used.

    `tensor[slices]` reads a part of a sharded tensor.

    Raises:
        UserError: It does not exist, is torn, or holds more than tensors and plain values.
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
    """Reads a whole checkpoint to the CPU, whatever number of ranks has written it.

    Args:
        path: A file or a directory.
        without: Top-level entries to leave out.

    Raises:
        UserError: It does not exist, is torn, or holds more than tensors and plain values.
    """
    checkpoint = open_checkpoint(path)
    return sharded.whole({key: value for key, value in checkpoint.items() if key not in without})


def saved_step(path: str | os.PathLike) -> int:
    """Returns the optimizer step of a checkpoint, read from its content and not from its name.

    Raises:
        UserError: It does not exist, is torn, or is another kind of file.
    """
    step = open_checkpoint(path).get("global_step")
    if step is None:
        raise UserError(f"--ckpt_path {path} holds no global_step: it is not a checkpoint of a run")
    return int(step)
