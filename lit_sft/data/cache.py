"""Tokenized examples on disk, memory-mapped: resident memory does not grow with the number of rows.

A cache is a directory named by a hash of everything that decides its content. It is written beside
its final place and renamed when it is complete, so a directory that exists is whole.
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

from lit_sft.errors import UserError
from lit_sft.files import atomic_write
from lit_sft.types import Example

log = logging.getLogger(__name__)

META = "meta.json"
COLUMNS = {"ends.i64": 8, "rows.i64": 8, "parts.i32": 4, "hashes.u64": 8, "sums.u32": 4}
"""Files with one number per example -> its bytes. `ends` are the ends of the examples in the files
of `TOKENS`; `sums` are checksums, compared whenever an example is read (10 microseconds for 2,048
tokens), so that no start waits for it.
"""
TOKENS = {"input_ids.i32": 4, "loss_mask.u8": 1}
"""Files with one number per token, likewise."""
FAILURE_SECONDS = 60
"""How much earlier than another rank, which was still importing, rank 0 may have failed."""
PATIENCE_SECONDS = 600
"""Between two signs of life of a rank that waits."""


def cache_key(parts: dict[str, Any]) -> str:
    """A hash of all options that decide what the cache holds; `parts` must be plain JSON values."""
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()
    ).hexdigest()[:24]


class ExampleCache:
    """N tokenized examples, read by index.

    Attributes:
        lengths: [N] tokens of each example.
        rows: [N] number of the row it came from.
        parts: [N] which of the row's examples it is.
        hashes: [N] of the token ids, to find duplicates.
        meta: What the writer wanted to remember (counts for the log, stop tokens).

    Raises:
        OSError: A file is missing, or not as long as the others say.
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
        """A hash of all examples: their token ids, which of them are trained, and the order."""
        digest = hashlib.blake2b(digest_size=12)
        for column in (self.lengths, self.hashes, self._loss_mask):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type[ExampleCache], tuple[Path]]:
        # Workers map the files themselves instead of getting a copy.
        return ExampleCache, (self.path,)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], int]:
        """(input_ids [T], loss_mask [T], row) of an example; the arrays are views of the file.

        Raises:
            UserError: They are not what was written.
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
    if not isinstance(meta, dict) or meta.pop("checksum", None) != zlib.crc32(
        json.dumps(meta).encode()
    ):
        raise ValueError("meta.json is not as it was written")
    return meta


def _write_meta(path: Path, meta: dict[str, Any]) -> None:
    path.write_text(
        json.dumps({**meta, "checksum": zlib.crc32(json.dumps(meta).encode())}, indent=1)
    )


def _map(path: Path, dtype: type[np.generic]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")


class Block(NamedTuple):
    """Some examples as they are written: arrays, which go from one process to another at no
    cost.
    """

    lengths: npt.NDArray[np.int64]
    """[N] tokens."""
    rows: npt.NDArray[np.int64]
    """[N]."""
    parts: npt.NDArray[np.int32]
    """[N]."""
    hashes: npt.NDArray[np.uint64]
    """[N] of the token ids."""
    sums: npt.NDArray[np.uint32]
    """[N] of token ids, mask and row."""
    input_ids: npt.NDArray[np.int32]
    """[sum of lengths]."""
    loss_mask: npt.NDArray[np.uint8]
    """[sum of lengths]."""


def to_block(examples: Sequence[Example]) -> Block:
    """Puts examples one behind the other."""
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


def write_cache(path: Path, blocks: Iterable[Block], meta: dict[str, Any]) -> ExampleCache:
    """Writes examples as they come; `meta` is read after the last ones, so the caller may fill it
    meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f"{path.name}.{uuid4().hex}.building")
    # A directory of `mkdtemp` could not be read by others who share the cache.
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
        _write_meta(building / META, meta)
        publish(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return ExampleCache(path)


def publish(building: Path, path: Path) -> None:
    """Moves a complete directory to its name; where another process was first, its result stays (it
    has the same content).
    """
    try:
        os.rename(building, path)
    except OSError:
        if not (path / META).exists():
            raise


def open_cache(path: Path) -> ExampleCache | None:
    """The cache if it is there and whole; a damaged one is set aside with a message."""
    if not path.exists():
        return None
    try:
        return ExampleCache(path)
    except (OSError, ValueError) as error:
        damaged = path.with_name(f"{path.name}.damaged.{os.getpid()}")
        path.rename(damaged)
        log.warning(
            "the cache %s is damaged (%s): moved to %s and made anew", path, error, damaged.name
        )
        return None


def write_failure(path: Path, error: Exception) -> None:
    """Tells those who wait for a cache why it will not come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(str(error) or type(error).__name__)


def wait_for_cache(path: Path, failure: Path) -> ExampleCache:
    """What another process writes.

    Args:
        path: Where it will appear.
        failure: The file that the other process writes its error to; one that was there long before
            does not count.

    Raises:
        UserError: The other process failed.
    """
    earliest = time.time() - FAILURE_SECONDS
    told = time.monotonic()
    while True:
        # The cache may not be there yet, or may be damaged and about to be made anew.
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
