"""The one way a file is written (aside, synced, renamed), and links to a file beside them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lit_sft.errors import UserError

LONGEST = 255
"""Longest file name, in bytes. A longer text file is no link."""


@contextmanager
def atomic_write(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Opens a file that replaces `path` in one step when the block ends.

    The content is written beside `path`, synced to disk and renamed, so no reader and no crash ever
    sees a part of it. If the block raises, `path` stays as it was.

    Args:
        path: The file to write.
        mode: `w` (UTF-8 unless `options` name another encoding) or `wb`.
        options: Further arguments of `open`.
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
    """Checks that the folder of a run still exists before the run writes into it.

    A folder made again would hold a run without its config and its earlier checkpoints.

    Raises:
        UserError: The folder was removed.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} was removed during the run, and its checkpoints with it: start a new run"
            " (without --ckpt_path)"
        )


def sync_folder(folder: Path) -> None:
    """Syncs a folder to disk: the names of its files survive a crash of the machine.

    Windows cannot open a folder, and syncs no file that is open for reading. There this does
    nothing.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs everything below a folder to disk: files and their names survive a crash."""
    for path in (*folder.rglob("*"), folder):
        # `fsync` treats a file like a folder.
        sync_folder(path)


def point(link: Path, name: str) -> None:
    """Points a link at another file in its folder, in one step.

    Without symbolic links (Google Drive in Colab, some network mounts, exFAT) the link is a text
    file that holds the name: frameworks that insist on a symbolic link fail there at the first save
    (mosaicml/composer #2942, Lightning #18900).

    Args:
        link: The path of the link. A file or directory of that name is replaced.
        name: The name that it points at, relative to its folder.
    """
    aside = link.with_name(f".{link.name}.tmp")
    aside.unlink(missing_ok=True)
    if link.is_dir() and not link.is_symlink():
        # A copy that followed links (`scp -r`, `rsync -L`) has a directory here.
        shutil.rmtree(link)
    try:
        aside.symlink_to(name)
    except OSError:
        aside.write_text(name)
    os.replace(aside, link)


def target(link: Path) -> str | None:
    """Returns the name that a link points at, whether that exists or not.

    None means that `link` does not exist, or is a file or directory of its own: a copy that
    followed links (`scp -r`, `rsync -L`) has the checkpoint itself here.
    """
    if link.is_symlink():
        return os.readlink(link)
    if not link.is_file() or link.stat().st_size > LONGEST:
        return None
    try:
        return link.read_text().strip()
    except UnicodeDecodeError:
        return None
