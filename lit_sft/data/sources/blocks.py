"""Reads files block by block in threads, and hashes their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

BLOCK_SIZE = 1 << 22
"""Bytes per block."""


def map_blocks(path: str, work: Callable[[bytes, int], Any]) -> list[Any]:
    """Calls a function on every block of a file, in threads: most such work releases the GIL.

    Args:
        path: The file.
        work: Gets a block with one byte of the next block, and the offset of the block.

    Returns:
        The results, in the order of the blocks.
    """

    def read_and_work(offset: int) -> Any:
        with open(path, "rb", buffering=0) as file:
            return work(os.pread(file.fileno(), BLOCK_SIZE + 1, offset), offset)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(read_and_work, range(0, os.path.getsize(path), BLOCK_SIZE)))


def content_hash(*paths: str) -> str:
    """Hashes the content of files; their names do not count."""

    def digest(block: bytes, _: int) -> bytes:
        return hashlib.sha256(memoryview(block)[:BLOCK_SIZE]).digest()

    whole = hashlib.sha256()
    for path in paths:
        for part in map_blocks(path, digest):
            whole.update(part)
    return whole.hexdigest()
