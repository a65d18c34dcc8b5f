"""The one way a file is written (aside, synced, renamed), and names that point to another file
beside them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lit_sft.errors import UserError

LONGEST = 255
"""Bytes of a file name; a text file that is longer holds something else."""


@contextmanager
def atomic_write(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Opens a file that replaces `path` in one step when the block ends.

    The content is written beside `path`, synced to the disk and renamed, so a reader or a crash
    never meets a part of it. If the block raises, `path` stays as it was.

    Args:
        path: File to write.
        mode: `w` (UTF-8 unless `options` say otherwise) or `wb`.
        options: Passed to `open`.
    """
    if "b" not in mode:
        options = {"encoding": "utf-8", **options}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_not_removed(folder: Path) -> None:
    """Refuses to write into the folder of a run that was removed while the run goes on.

    Making it again would leave a run without its settings and its earlier checkpoints.

    Raises:
        UserError: The folder is not there.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} was removed during the run, and its checkpoints with it: start a new run"
            " (without --ckpt_path)"
        )


def sync_folder(folder: Path) -> None:
    """Makes the names of files in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Makes everything in a folder survive a crash of the machine: the content of its files, and
    their names.
    """
    for path in (*folder.rglob("*"), folder):
        # The system syncs a file in the same way as a folder.
        sync_folder(path)


def point(link: Path, name: str) -> None:
    """Lets a name stand for another file in its folder, in one step; what bore that name before
    goes.

    Args:
        link: The name.
        name: Of the other file.
    """
    aside = link.with_name(f".{link.name}.tmp")
    aside.unlink(missing_ok=True)
    if link.is_dir() and not link.is_symlink():
        # In a copy that was made of what links name.
        shutil.rmtree(link)
    try:
        aside.symlink_to(name)
    except OSError:
        # Some network and FUSE mounts, exFAT.
        aside.write_text(name)
    os.replace(aside, link)


def target(link: Path) -> str | None:
    """What a name stands for, whether that is there or not; None where it is a file of its own, or
    not there.
    """
    if link.is_symlink():
        return os.readlink(link)
    if not link.is_file() or link.stat().st_size > LONGEST:
        return None
    try:
        return link.read_text().strip()
    except UnicodeDecodeError:
        return None
