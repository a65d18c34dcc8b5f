"""Tokenized examples on disk, memory-mapped: resident memory does not grow with the number of rows.

A cache is a directory named by a hash of everything that decides its content. It is written beside its final place and
renamed
when it is complete, so a directory that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_sft.types import Example

META = "meta.json"


def cache_key(parts: dict[str, Any]) -> str:
    """A hash of all options that decide what the cache holds; `parts` must be plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:24]


class ExampleCache:
    """N tokenized examples, read by index.

    Attributes:
        lengths: [N] tokens of each example.
        rows: [N] number of the row it came from.
        parts: [N] which of the row's examples it is.
        hashes: [N] of the token ids, to find duplicates.
        meta: What the writer wanted to remember (counts for the log, stop tokens).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = json.loads((path / META).read_text())
        self._ends: npt.NDArray[np.int64] = np.fromfile(path / "ends.i64", dtype=np.int64)
        self.lengths: npt.NDArray[np.int64] = np.diff(self._ends, prepend=0)
        self.rows: npt.NDArray[np.int64] = np.fromfile(path / "rows.i64", dtype=np.int64)
        self.parts: npt.NDArray[np.int32] = np.fromfile(path / "parts.i32", dtype=np.int32)
        self.hashes: npt.NDArray[np.uint64] = np.fromfile(path / "hashes.u64", dtype=np.uint64)
        num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        for name, width in (("input_ids.i32", 4), ("loss_mask.u8", 1)):
            if (path / name).stat().st_size != num_tokens * width:
                raise OSError(f"{path / name} is not {num_tokens * width} bytes long")
        # an empty file cannot be mapped
        self._input_ids = np.memmap(path / "input_ids.i32", np.int32, "r") if num_tokens else np.empty(0, np.int32)
        self._loss_mask = np.memmap(path / "loss_mask.u8", np.uint8, "r") if num_tokens else np.empty(0, np.uint8)

    def __reduce__(self) -> tuple[type[ExampleCache], tuple[Path]]:
        return ExampleCache, (self.path,)  # workers map the file themselves instead of getting a copy

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], int]:
        """(input_ids [T], loss_mask [T], row) of an example; the arrays are views of the file."""
        end = int(self._ends[index])
        span = slice(end - int(self.lengths[index]), end)
        return self._input_ids[span], self._loss_mask[span], int(self.rows[index])


def write_cache(path: Path, examples: Iterable[Example], meta: dict[str, Any]) -> ExampleCache:
    """Writes examples as they come; `meta` is read after the last one, so the caller may fill it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".building", dir=path.parent))
    try:
        ends: list[int] = []
        rows: list[int] = []
        parts: list[int] = []
        hashes: list[int] = []
        end = 0
        with (building / "input_ids.i32").open("wb") as ids_file, (building / "loss_mask.u8").open("wb") as mask_file:
            for example in examples:
                end += len(example.input_ids)
                ends.append(end)
                rows.append(example.row)
                parts.append(example.part)
                ids = np.asarray(example.input_ids, dtype=np.int32).tobytes()
                hashes.append(int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little"))
                ids_file.write(ids)
                mask_file.write(bytes(example.loss_mask))
        np.asarray(ends, dtype=np.int64).tofile(building / "ends.i64")
        np.asarray(rows, dtype=np.int64).tofile(building / "rows.i64")
        np.asarray(parts, dtype=np.int32).tofile(building / "parts.i32")
        np.asarray(hashes, dtype=np.uint64).tofile(building / "hashes.u64")
        (building / META).write_text(json.dumps(meta, indent=1))
        publish(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return ExampleCache(path)


def publish(building: Path, path: Path) -> None:
    """Moves a complete directory to its name; where another process was first, its result stays (it has the same
    content).
    """
    try:
        os.rename(building, path)
    except OSError:
        if not (path / META).exists():
            raise
