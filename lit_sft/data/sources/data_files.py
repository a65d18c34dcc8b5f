"""One file -> `FilePart`, whose rows are read one at a time.

Held in memory: where each JSON line begins; all of a `.json` array; of csv, parquet and Arrow nothing (they are mapped,
csv and parquet from an Arrow copy).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from textwrap import shorten
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from lit_sft.errors import UserError

if TYPE_CHECKING:
    import datasets

DATA_FILE = re.compile(r"(\.jsonl|\.ndjson|\.json|\.csv|\.tsv|\.parquet|\.arrow)(\.gz|\.zst)?$", re.IGNORECASE)
_ROW_COLUMNS = ("messages", "conversations", "instruction", "prompt", "text")
"""An object that has one of them is a row: formats start from these."""
_LIST_COLUMNS = ("completion", "tools", "history")
"""Lists of objects in a row, under whatever names its other columns have."""
_BLOCK = 1 << 22
_STARTED = time.time()  # what is older was not changed during the run


@dataclass(frozen=True)
class FilePart:
    """The rows of one file, of one split of a saved or hub data set, or of a built-in task."""

    name: str
    """As the user knows it, for messages."""
    fingerprint: str
    """Hash of the content, not of path or date: data that changed never meets what was cached of the old."""
    rows: _Indexed
    """N rows by index."""
    lines: _Indexed | None = None
    """N numbers: the line of each row, counted from 0, where the file has lines."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row `i`; a `UserError` where it cannot be read does not say where that is, see `where`."""
        if not isinstance(row := self.rows[i], dict):
            raise UserError(f"the row is a {type(row).__name__}, expected an object; repair or remove it")
        return row

    def where(self, i: int) -> str:
        """The place of row `i`: `train.jsonl line 12` (from 1) or `alpaca.json row 3` (from 0)."""
        return f"{self.name} row {i}" if self.lines is None else f"{self.name} line {self.lines[i] + 1}"


def open_file(path: str, key: str, plain_copy: Callable[[str, str, str, str], str]) -> FilePart:
    """Open a json, jsonl, ndjson, csv, tsv, parquet or arrow file, also with .gz or .zst.

    Args:
        path: Of the file.
        key: The setting it comes from, such as `data.train`, for messages.
        plain_copy: (path, suffix, ending of a packed file or "", content hash) -> a file whose rows can be reached one
            by one.

    Raises:
        UserError: It is no such file, or cannot be read.
    """
    import pyarrow as pa

    try:
        if not (found := DATA_FILE.search(path)):
            raise UserError("its name ends in none of .json .jsonl .ndjson .csv .tsv .parquet .arrow (+ .gz or .zst)")
        fingerprint = _content_hash(path)
        suffix, ending = found[1].lower(), (found[2] or "").lower()
        plain = plain_copy(path, suffix, ending, fingerprint)
        if plain.lower().endswith(".arrow"):
            return FilePart(path, fingerprint, _ArrowRows(_read_arrow(plain)))
        if suffix == ".json" and (array := _read_json(plain)) is not None:
            return FilePart(path, fingerprint, array)
        starts, lines = _index_lines(plain)
        own = fingerprint if plain == path else _content_hash(plain)
        return FilePart(path, fingerprint, _JsonLines(plain, own, starts, lines), lines)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"cannot read `{path}` (`{key}`): {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}; save it as UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename}); see the permissions, and `data.cache_dir` for copies"
    return f"{shorten(str(error), 200)}; is it complete, and its suffix right?"


class _Indexed(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class _JsonLines:
    """Lines of a file, read where they stand; the file is opened once per process and its position is never used."""

    path: str
    fingerprint: str
    starts: np.ndarray
    lines: _Indexed

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Any:
        start, end = self.starts[self.lines[i]], self.starts[self.lines[i] + 1]
        file = _handle(self.path, self.fingerprint).fileno()
        is_old = (status := os.fstat(file)).st_mtime < _STARTED and status.st_size == self.starts[-1]
        if not is_old and not _is_same(self.path, self.fingerprint, status.st_size, status.st_mtime_ns):
            raise UserError("the file was changed during the run; restore it, or run anew")
        line = os.pread(file, end - start, start)
        try:
            return json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"the line is not UTF-8 at byte {error.start}; save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(f"the line is not JSON: {error.msg} at column {error.colno}; repair or remove it") from None
        except RecursionError:
            raise UserError("the line is nested too deep to be read; remove it") from None


@lru_cache(maxsize=64)
def _handle(path: str, fingerprint: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


@lru_cache(maxsize=64)
def _is_same(path: str, fingerprint: str, size: int, time_ns: int) -> bool:
    return _content_hash(path) == fingerprint


@dataclass(frozen=True, eq=False)
class _ArrowRows:
    """Rows of a table, without the nulls that Arrow puts inside a column for the fields that only other rows have."""

    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {column: _drop_nulls(value) for column, value in self.dataset[i].items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _map_blocks(path: str, work: Callable[[bytes, int], Any]) -> list[Any]:
    """`work(block and one byte more, offset)` for each block of a file, in threads (most work releases the GIL)."""

    def read_and_work(offset: int) -> Any:
        with open(path, "rb", buffering=0) as file:
            return work(os.pread(file.fileno(), _BLOCK + 1, offset), offset)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(read_and_work, range(0, os.path.getsize(path), _BLOCK)))


def _content_hash(*paths: str) -> str:
    def digest(block: bytes, _: int) -> bytes:
        return hashlib.sha256(memoryview(block)[:_BLOCK]).digest()

    return hashlib.sha256(b"".join(part for path in paths for part in _map_blocks(path, digest))).hexdigest()


def _index_lines(path: str) -> tuple[np.ndarray, _Indexed]:
    """[L + 1] int64: the bytes where lines begin, then the size; N numbers: which of the L lines are not blank."""

    def scan(data: bytes, offset: int) -> tuple[np.ndarray, np.ndarray]:
        block = np.frombuffer(data, np.uint8)
        starts = np.flatnonzero(block[:_BLOCK] == ord("\n")) + 1
        starts = starts[starts < len(block)]
        return starts + offset, block[starts] <= ord(" ")

    scans = _map_blocks(path, scan)
    starts = np.concatenate([[0], *(starts for starts, _ in scans), [os.path.getsize(path)]]).astype(np.int64)
    suspects = np.flatnonzero(np.concatenate([[True], *(spaces for _, spaces in scans)]))
    with open(path, "rb", buffering=0) as file:
        blank = [i for i in suspects if not os.pread(file.fileno(), starts[i + 1] - starts[i], starts[i]).strip()]
    return starts, np.delete(np.arange(len(starts) - 1), blank) if blank else range(len(starts) - 1)


def _read_json(path: str) -> list[Any] | None:
    """The rows of an array or of an object around one; None where the file is JSON lines by another name."""
    with open(path, encoding="utf-8-sig") as file:
        first = file.readline()
        if first.lstrip().startswith("{") and file.readline().strip():
            try:
                json.loads(first)
                return None
            except ValueError:
                pass
        file.seek(0)
        value = json.load(file)
    if isinstance(value, dict):
        lists = [item for key, item in value.items() if isinstance(item, list) and item and key not in _LIST_COLUMNS]
        lists = [item for item in lists if all(isinstance(row, dict) for row in item)]
        is_row = len(lists) != 1 or any(value.get(column) is not None for column in _ROW_COLUMNS)
        return [value] if is_row else lists[0]
    if not isinstance(value, list):
        raise UserError(f"it holds one {type(value).__name__}, expected an array of objects")
    return value


def _read_arrow(path: str) -> datasets.Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        return Dataset.from_file(path)
    except pa.ArrowInvalid:  # not the streaming kind of Arrow file that `datasets` writes
        return Dataset(InMemoryTable(pa.ipc.open_file(pa.memory_map(path)).read_all()))
