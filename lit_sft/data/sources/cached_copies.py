"""Cached copies of files: unpacked, or converted to another format.

`datasets` can do both, but names its copies by path and time of the source. Rows of an earlier
content would be read where a file is replaced, and a compressed file that is cut off would be read
as whole at the second try.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lit_sft.data.cache_entries import COPIES, mark_used

log = logging.getLogger(__name__)

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK_SIZE = 1 << 22


def cached_copy(cache_dir: str | Path | None, name: str, write: Callable[[str], None]) -> str:
    """Returns the path of a copy, after writing it if it is not in the cache.

    A copy is stored as `SIZE-NAME`, so a truncated one is recognized.

    Args:
        cache_dir: Directory of the copies; None: beside the cache of `datasets`.
        name: Identifies the content, such as a hash with a suffix.
        write: Writes the copy to a path.
    """
    from datasets import config

    folder = Path(cache_dir or config.HF_DATASETS_CACHE) / COPIES.name
    for copy in folder.glob(f"*-{name}"):
        if copy.name == f"{copy.stat().st_size}-{name}":
            mark_used(copy)
            return str(copy)
        log.warning(
            "the copy %s is damaged and made anew: it has another size than its name says", copy
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Another process must not see the copy before it is complete.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = os.path.join(scratch, name)
        write(target)
        # Without the sync, a crash of the machine could leave the name without its content.
        with open(target, "rb") as file:
            os.fsync(file.fileno())
        copy = folder / f"{os.path.getsize(target)}-{name}"
        os.replace(target, copy)
    return str(copy)


def unpacked(cache_dir: str | Path | None, path: str, ending: str, name: str) -> str:
    """Returns the path of the unpacked copy of a compressed file.

    Args:
        cache_dir: See `cached_copy`.
        path: The compressed file.
        ending: `.gz` or `.zst`.
        name: See `cached_copy`.
    """
    return cached_copy(cache_dir, name, partial(_unpack, path, _CODECS[ending]))


def _unpack(path: str, codec: str, target: str) -> None:
    import pyarrow as pa

    with pa.input_stream(path, compression=codec) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, _BLOCK_SIZE)
