"""Entries of the cache directory: their size, their last use, and the removal of the oldest ones.

Only the standard library is imported, because the command `cache` is to answer at once.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

log = logging.getLogger(__name__)

NAME = "name.txt"
"""File in a cache of examples with the name of its data set."""
COPIES = Path("sources", "lit_sft_sources")
"""Directory of unpacked and converted copies."""
GRACE_SECONDS = 24 * 60 * 60
"""An entry that was used in this time stays: a run may have it open, or be about to open it."""

_EXAMPLES = re.compile(r"[0-9a-f]{24}(\.[0-9a-f]{32}\.(building|removed)|\.damaged\.\d+)?")
"""Caches of examples, and what a run that was killed or a damaged cache leaves."""
_COPY = re.compile(r"\d+-[0-9a-f]{16,}\.[\w.-]+|tmp\w{8}")
"""Copies `SIZE-HASH.SUFFIX`, and directories of copies that were not finished."""


@dataclass(frozen=True)
class Entry:
    """A cache of examples, or a copy of a file."""

    path: Path
    name: str
    """Name of the data set."""
    size: int
    """In bytes."""
    used: float
    """Time of the last use, in seconds since 1970."""

    @property
    def is_in_use(self) -> bool:
        """Whether a run may have it open."""
        return time.time() - self.used < GRACE_SECONDS


def default_folder() -> Path:
    """Returns the cache directory of those who set none."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lit_sft"


def list_entries(folder: Path) -> list[Entry]:
    """Lists the entries of a cache directory, those that were not used for the longest time first.

    Other files in the directory are no entries.
    """
    found = [*_matching(folder, _EXAMPLES), *_matching(folder / COPIES, _COPY)]
    entries = []
    for path in found:
        # Another process may remove it meanwhile.
        with suppress(FileNotFoundError):
            entries.append(_entry(path))
    return sorted(entries, key=lambda entry: entry.used)


def _matching(folder: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if pattern.fullmatch(path.name):
            yield path


def _entry(path: Path) -> Entry:
    states = [path.stat(), *(file.stat() for file in path.rglob("*") if file.is_file())]
    # The files tell when a cache grew that is being written, its directory tells when it was used.
    used = max(state.st_mtime for state in states)
    files = states if path.is_file() else states[1:]
    return Entry(path, _name_of(path), sum(state.st_size for state in files), used)


def _name_of(path: Path) -> str:
    if path.is_file() or path.parent.name == COPIES.name:
        return "copy of a file, unpacked or converted"
    with suppress(OSError, UnicodeDecodeError):
        return (path / NAME).read_text(encoding="utf-8").strip()
    return "no name"


def mark_used(path: Path) -> None:
    """Notes that an entry is used now, in its time of modification."""
    # The cache may belong to somebody else, or lie on a disk that is read-only.
    with suppress(OSError):
        os.utime(path)


def trim(folder: Path, max_bytes: float) -> list[Entry]:
    """Removes entries until the others have at most this size together, the oldest first.

    Entries that a run may have open stay, so the rest may be larger.

    Args:
        folder: The cache directory.
        max_bytes: The size.

    Returns:
        The removed entries.
    """
    entries = list_entries(folder)
    size = sum(entry.size for entry in entries)
    removed = []
    for entry in entries:
        if size <= max_bytes or entry.is_in_use:
            break
        if _remove(entry.path):
            removed.append(entry)
            size -= entry.size
    return removed


def _remove(path: Path) -> bool:
    """Removes an entry, and returns whether that was possible."""
    try:
        if path.is_file():
            path.unlink()
        else:
            # Another process finds a renamed directory whole or not at all.
            aside = path.with_name(f"{path.name[:24]}.{uuid4().hex}.removed")
            path.rename(aside)
            shutil.rmtree(aside)
    except OSError as error:
        log.warning("the cache entry %s could not be removed: %s", path, error)
        return False
    return True


def total(entries: Iterable[Entry]) -> str:
    """Returns the size of entries in GB or MB."""
    return in_words(sum(entry.size for entry in entries))


def in_words(size: float) -> str:
    """Returns a size in GB or MB."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB"
