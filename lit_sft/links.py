"""Names that stand for another file beside them: symbolic links, and small text files where there can be none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

LONGEST = 255
"""Bytes of a file name; a text file that is longer holds something else."""


def point(link: Path, name: str) -> None:
    """Lets a name stand for another file in its folder, in one step; what bore that name before goes.

    Args:
        link: The name.
        name: Of the other file.
    """
    aside = link.with_name(f".{link.name}.tmp")
    aside.unlink(missing_ok=True)
    if link.is_dir() and not link.is_symlink():  # in a copy that was made of what links name
        shutil.rmtree(link)
    try:
        aside.symlink_to(name)
    except OSError:  # some network and FUSE mounts, exFAT
        aside.write_text(name)
    os.replace(aside, link)


def target(link: Path) -> str | None:
    """What a name stands for, whether that is there or not; None where it is a file of its own, or not there."""
    if link.is_symlink():
        return os.readlink(link)
    if not link.is_file() or link.stat().st_size > LONGEST:
        return None
    try:
        return link.read_text().strip()
    except UnicodeDecodeError:
        return None
