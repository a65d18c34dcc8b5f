"""JSON files: lines of a `.jsonl` file, read by number, and the array in a `.json` file.

For JSON lines only the offsets of the lines are in memory. An array is loaded as a whole.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, TextIO

import numpy as np

from lit_sft.data.formats.columns import FIRST_COLUMNS
from lit_sft.data.formats.json_text import DoubleKeyError, parse_json
from lit_sft.data.sources import blocks
from lit_sft.data.sources.rows import Indexed
from lit_sft.errors import UserError

_LIST_COLUMNS = ("completion", "tools", "history")
"""Columns of a row whose values are lists of objects. Such a list does not hold the rows."""
_STARTED = time.time()
"""Start of this process. An older file was not changed during the run."""


@dataclass(frozen=True, eq=False)
class JsonLines:
    """The lines of a file without blank ones, read and parsed one at a time."""

    path: str
    fingerprint: str
    """`content_hash` of the file."""
    starts: np.ndarray
    """[L + 1] int64: offsets of the L lines in bytes, then the size of the file."""
    lines: Indexed
    """[N]: the number of each line that is not blank, from 0."""

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Any:
        """Parses line `lines[i]`.

        Raises:
            UserError: The line is not JSON, or the file was changed.
        """
        line = self.lines[i]
        start = self.starts[line]
        file = _open_once(self.path, self.fingerprint).fileno()
        self._check_unchanged(os.fstat(file))
        # Forked processes share the position of the file, so `pread` is used instead of `read`.
        return _parse(os.pread(file, self.starts[line + 1] - start, start))

    def _check_unchanged(self, status: os.stat_result) -> None:
        if status.st_mtime < _STARTED and status.st_size == self.starts[-1]:
            return
        if not _has_content(self.path, self.fingerprint, status.st_size, status.st_mtime_ns):
            raise UserError("the file was changed during the run; restore it, or run anew")


@lru_cache(maxsize=64)
def _open_once(path: str, fingerprint: str) -> BinaryIO:
    """Opens a file once per process and content."""
    return open(path, "rb", buffering=0)


@lru_cache(maxsize=64)
def _has_content(path: str, fingerprint: str, size: int, time_ns: int) -> bool:
    """Whether a file has this content. Size and modification time are part of the cache key."""
    return blocks.content_hash(path) == fingerprint


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"the line is not UTF-8 at byte {error.start}; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"the line is not JSON: {error.msg} at column {error.colno}; repair or remove it"
        ) from None
    except DoubleKeyError as error:
        raise UserError(str(error)) from None
    except ValueError:
        # The only other reason that `json` has: Python's limit against endless conversions.
        raise UserError(
            "the line has a whole number of more than 4,300 digits; repair or remove it"
        ) from None
    except RecursionError:
        raise UserError("the line is nested too deep to be read; remove it") from None


def index_lines(path: str, fingerprint: str) -> JsonLines:
    """Finds the offsets of the lines of a file.

    Args:
        path: The file.
        fingerprint: Its `content_hash`.

    Raises:
        OSError: The file cannot be read.
    """
    starts_by_block = [np.zeros(1, np.int64)]
    suspects_by_block = [np.ones(1, np.bool_)]
    for starts_in_block, suspects_in_block in blocks.map_blocks(path, _line_starts):
        starts_by_block.append(starts_in_block)
        suspects_by_block.append(suspects_in_block)
    starts = np.append(np.concatenate(starts_by_block), os.path.getsize(path)).astype(np.int64)
    suspects = np.flatnonzero(np.concatenate(suspects_by_block))
    blank = _blank_lines(path, starts, suspects)
    num_lines = len(starts) - 1
    lines: Indexed = range(num_lines)
    if blank:
        lines = np.delete(np.arange(num_lines), blank)
    return JsonLines(path, fingerprint, starts, lines)


def _line_starts(data: bytes, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the lines that begin behind the line ends of a block.

    Returns:
        Offsets in the file, and whether the first byte of each line is white space.
    """
    block = np.frombuffer(data, np.uint8)
    starts = np.flatnonzero(block[: blocks.BLOCK_SIZE] == ord("\n")) + 1
    starts = starts[starts < len(block)]
    return starts + offset, block[starts] <= ord(" ")


def _blank_lines(path: str, starts: np.ndarray, suspects: np.ndarray) -> list[int]:
    """Returns the blank lines among those that begin with white space."""
    blank = []
    with open(path, "rb", buffering=0) as file:
        for i in suspects:
            if not os.pread(file.fileno(), starts[i + 1] - starts[i], starts[i]).strip():
                blank.append(i)
    return blank


def read_array(path: str) -> list[Any] | None:
    """Reads the rows of a `.json` file: an array, an object around an array, or one row.

    Returns:
        The rows, or None if the file holds JSON lines.

    Raises:
        UserError: The file holds another value.
        OSError: The file cannot be read.
        ValueError: The file is not JSON.
    """
    with open(path, encoding="utf-8-sig") as file:
        if _has_json_lines(file):
            return None
        file.seek(0)
        text = file.read()
    try:
        value = parse_json(text)
    except DoubleKeyError as error:
        raise UserError(f"{_row_with_double_key(text)}{error}") from None
    if isinstance(value, dict):
        return _rows_in(value)
    if not isinstance(value, list):
        raise UserError(f"it holds one {type(value).__name__}, expected an array of objects")
    return value


def _row_with_double_key(text: str) -> str:
    """Returns the number of the first row of an array with a key twice; empty if it is unknown."""
    value = json.loads(text, object_pairs_hook=_Pairs)
    for number, row in enumerate(value if isinstance(value, list) else []):
        if _has_double_key(row):
            return f"row {number}: "
    return ""


class _Pairs(list[tuple[str, Any]]):
    """Keys and values of an object, in order."""


def _has_double_key(value: Any) -> bool:
    if isinstance(value, _Pairs):
        names = [name for name, _ in value]
        if len(set(names)) < len(names):
            return True
        value = [item for _, item in value]
    return isinstance(value, list) and any(map(_has_double_key, value))


def _has_json_lines(file: TextIO) -> bool:
    """Whether the first line is a whole object, and another line follows."""
    first = file.readline()
    if not first.lstrip().startswith("{") or not file.readline().strip():
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _rows_in(value: dict[str, Any]) -> list[Any]:
    """Returns the only list of objects in an object, or the object itself as one row."""
    if any(value.get(column) is not None for column in FIRST_COLUMNS):
        return [value]
    lists = []
    for key, item in value.items():
        if key not in _LIST_COLUMNS and _has_only_objects(item):
            lists.append(item)
    if len(lists) == 1:
        return list(lists[0])
    return [value]


def _has_only_objects(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) for item in value)
