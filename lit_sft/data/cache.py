"""Tokenized examples in memory-mapped files: memory does not grow with the number of rows.

A cache is a directory named by a hash of everything that decides its content. It is written under
another name and renamed when it is complete, so an existing cache is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from lit_sft.data.cache_entries import NAME, mark_used
from lit_sft.errors import UserError
from lit_sft.files import atomic_write
from lit_sft.types import Example

log = logging.getLogger(__name__)

META = "meta.json"
COLUMNS = {"ends.i64": 8, "rows.i64": 8, "parts.i32": 4, "hashes.u64": 8, "sums.u32": 4}
"""File with one number per example -> bytes per number.

`ends` are the ends of the examples in the files of `TOKENS`. `sums` are checksums. They are
compared whenever an example is read, not at the start. This takes 10 microseconds for 2,048 tokens.
"""
TOKENS = {"input_ids.i32": 4, "loss_mask.u8": 1}
"""File with one number per token -> bytes per number."""
FAILURE_SECONDS = 60
"""How long before the start of another rank rank 0 may have failed: imports take time."""
PATIENCE_SECONDS = 600
"""Time between two messages of a rank that waits."""


def cache_key(parts: dict[str, Any]) -> str:
    """Hashes everything that decides the content of a cache; `parts` must be plain JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class ExampleCache:
    """N tokenized examples, read by index.

    Attributes:
        lengths: [N] tokens of each example.
        rows: [N] number of the row of each example.
        parts: [N] number of each example within its row.
        hashes: [N] hashes of the token ids, to find duplicates.
        meta: Metadata of the writer: counts for the log, stop tokens.

    Raises:
        OSError: A file is missing or has the wrong size.
        ValueError: `meta.json` is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = _read_meta(path / META)
        self._ends: npt.NDArray[np.int64] = _map(path / "ends.i64", np.int64)
        self.lengths: npt.NDArray[np.int64] = np.diff(self._ends, prepend=0)
        self.rows: npt.NDArray[np.int64] = _map(path / "rows.i64", np.int64)
        self.parts: npt.NDArray[np.int32] = _map(path / "parts.i32", np.int32)
        self.hashes: npt.NDArray[np.uint64] = _map(path / "hashes.u64", np.uint64)
        self._sums: npt.NDArray[np.uint32] = _map(path / "sums.u32", np.uint32)
        self._input_ids: npt.NDArray[np.int32] = _map(path / "input_ids.i32", np.int32)
        self._loss_mask: npt.NDArray[np.uint8] = _map(path / "loss_mask.u8", np.uint8)
        num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        sizes = {name: len(self._ends) * width for name, width in COLUMNS.items()}
        sizes |= {name: num_tokens * width for name, width in TOKENS.items()}
        for name, size in sizes.items():
            if (path / name).stat().st_size != size:
                raise OSError(f"{path / name} is not {size} bytes long")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all examples: token ids, loss masks and order."""
        digest = hashlib.blake2b(digest_size=12)
        for column in (self.lengths, self.hashes, self._loss_mask):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type[ExampleCache], tuple[Path]]:
        # Workers map the files themselves instead of getting a copy.
        return ExampleCache, (self.path,)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples. -1 without examples."""
        return int(self._input_ids.max(initial=-1))

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], int]:
        """Returns input_ids [T], loss_mask [T] and row of an example, as views of the files.

        Raises:
            UserError: The example has another checksum than when it was written.
        """
        end = int(self._ends[index])
        span = slice(end - int(self.lengths[index]), end)
        ids = self._input_ids[span]
        mask = self._loss_mask[span]
        row = int(self.rows[index])
        if _checksum(ids, mask, row) != self._sums[index]:
            raise UserError(
                f"the cache {self.path} is damaged at example {index}: remove it, and it is made"
                " anew"
            )
        return ids, mask, row


def _checksum(ids: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8], row: int) -> int:
    return zlib.crc32(mask.data, zlib.crc32(ids.data, row & 0xFFFFFFFF))


def _read_meta(path: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(path.read_text())
    is_whole = isinstance(meta, dict) and meta.pop("checksum", None) == _meta_checksum(meta)
    if not is_whole:
        raise ValueError("meta.json is not as it was written")
    return meta


def _write_meta(path: Path, meta: dict[str, Any]) -> None:
    path.write_text(json.dumps({**meta, "checksum": _meta_checksum(meta)}, indent=1))


def _meta_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta).encode())


def _map(path: Path, dtype: type[np.generic]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")


class Block(NamedTuple):
    """N examples as arrays, which are cheap to send between processes."""

    lengths: npt.NDArray[np.int64]
    """[N] tokens."""
    rows: npt.NDArray[np.int64]
    """[N]."""
    parts: npt.NDArray[np.int32]
    """[N]."""
    hashes: npt.NDArray[np.uint64]
    """[N] hashes of the token ids."""
    sums: npt.NDArray[np.uint32]
    """[N] checksums of token ids, mask and row."""
    input_ids: npt.NDArray[np.int32]
    """[sum of lengths]."""
    loss_mask: npt.NDArray[np.uint8]
    """[sum of lengths]."""


def to_block(examples: Sequence[Example]) -> Block:
    """Concatenates examples."""
    ids = []
    masks = []
    sums = []
    hashes = []
    for example in examples:
        input_ids = np.array(example.input_ids, dtype=np.int32)
        loss_mask = np.array(example.loss_mask, dtype=np.uint8)
        ids.append(input_ids)
        masks.append(loss_mask)
        sums.append(_checksum(input_ids, loss_mask, example.row))
        hashes.append(hashlib.blake2b(input_ids.data, digest_size=8).digest())
    return Block(
        lengths=np.array([len(input_ids) for input_ids in ids], dtype=np.int64),
        rows=np.array([example.row for example in examples], dtype=np.int64),
        parts=np.array([example.part for example in examples], dtype=np.int32),
        hashes=np.frombuffer(b"".join(hashes), dtype=np.uint64),
        sums=np.array(sums, dtype=np.uint32),
        input_ids=np.concatenate([np.empty(0, np.int32), *ids]),
        loss_mask=np.concatenate([np.empty(0, np.uint8), *masks]),
    )


def write_cache(
    path: Path, blocks: Iterable[Block], meta: dict[str, Any], name: str = ""
) -> ExampleCache:
    """Writes a cache.

    Args:
        path: Directory of the cache.
        blocks: The examples.
        meta: Metadata. It is written after the last block, so the caller may fill it until then.
        name: Name of the data set, for the command `cache list`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f"{path.name}.{uuid4().hex}.building")
    # Other users who share the cache could not read a directory of `mkdtemp`.
    building.mkdir()
    try:
        with ExitStack() as stack:
            files = {
                name: stack.enter_context((building / name).open("wb"))
                for name in (*COLUMNS, *TOKENS)
            }
            end = 0
            for block in blocks:
                ends = end + np.cumsum(block.lengths)
                end += len(block.input_ids)
                arrays: tuple[npt.NDArray[Any], ...] = (ends, *block[1:])
                for file, array in zip(files.values(), arrays, strict=True):
                    file.write(array.data)
        (building / NAME).write_text(name, encoding="utf-8", errors="replace")
        _write_meta(building / META, meta)
        publish(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return ExampleCache(path)


def publish(building: Path, path: Path) -> None:
    """Renames a complete directory. If another process was first, its equal result stays."""
    try:
        os.rename(building, path)
    except OSError:
        if not (path / META).exists():
            raise


def open_cache(path: Path) -> ExampleCache | None:
    """Opens a cache; None if there is none. A damaged cache is renamed, with a warning."""
    if not path.exists():
        return None
    try:
        cache = ExampleCache(path)
        mark_used(path)
        return cache
    except (OSError, ValueError) as error:
        if not path.exists():
            # Another process has just removed it.
            return None
        damaged = path.with_name(f"{path.name}.damaged.{os.getpid()}")
        path.rename(damaged)
        log.warning(
            "the cache %s is damaged (%s): moved to %s and made anew", path, error, damaged.name
        )
        return None


def write_failure(path: Path, error: Exception) -> None:
    """Writes the reason why a cache cannot be made, for the ranks that wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(str(error) or type(error).__name__)


def wait_for_cache(path: Path, failure: Path) -> ExampleCache:
    """Waits for a cache that rank 0 writes.

    Args:
        path: Directory of the cache.
        failure: File with the error of rank 0. A file from long before the start does not count.

    Raises:
        UserError: The other process failed.
    """
    earliest = time.time() - FAILURE_SECONDS
    told = time.monotonic()
    while True:
        # The cache may not exist yet, or rank 0 may be about to replace a damaged one.
        with suppress(OSError, ValueError):
            cache = ExampleCache(path)
            if len(cache):
                return cache
        try:
            if failure.stat().st_mtime > earliest:
                raise UserError(f"rank 0 could not prepare the data: {failure.read_text()}")
        except FileNotFoundError:
            pass
        if time.monotonic() > told + PATIENCE_SECONDS:
            told = time.monotonic()
            log.error(
                "still waiting for rank 0 to write %s; is data.cache_dir on a disk that all nodes"
                " share?",
                path,
            )
        time.sleep(0.2)
