"""One file -> `FilePart`, whose rows are read one at a time.

Held in memory: where each JSON line begins; all of a `.json` array; of csv, parquet and Arrow nothing (they are mapped,
csv and parquet from an Arrow copy). Unpacked and converted copies lie in the cache, named by what they were made from.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from lit_sft.types import UserError

if TYPE_CHECKING:
    import datasets

DATA_FILE = re.compile(r"(\.jsonl|\.ndjson|\.json|\.csv|\.tsv|\.parquet|\.arrow)(\.gz|\.zst)?$")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_ROW_KEYS = ("messages", "conversations", "prompt", "completion", "tools")
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


def open_file(path: str, key: str, cache_dir: str | Path | None) -> FilePart:
    """Open a json, jsonl, ndjson, csv, tsv, parquet or arrow file, also with .gz or .zst; `UserError` if it is none.

    `key` is the setting it comes from, such as `data.train`, for messages. An unpacked or converted copy goes to
    `cache_dir`, by default beside the cache of `datasets`.
    """
    import pyarrow as pa

    try:
        if not (found := DATA_FILE.search(path)):
            raise UserError("its name ends in none of .json .jsonl .ndjson .csv .tsv .parquet .arrow (+ .gz or .zst)")
        fingerprint = _content_hash(path)
        plain = _plain_copy(path, found[1], _CODECS.get(found[2]), fingerprint, cache_dir)
        if plain.endswith(".arrow"):
            return FilePart(path, fingerprint, _ArrowRows(_read_arrow(plain)))
        if found[1] == ".json" and (array := _read_json(plain)) is not None:
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
        lists = [item for key, item in value.items() if isinstance(item, list) and item and key not in _ROW_KEYS]
        lists = [item for item in lists if all(isinstance(row, dict) for row in item)]
        return lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise UserError(f"it holds one {type(value).__name__}, expected an array of objects")
    return value


def _plain_copy(path: str, suffix: str, codec: str | None, fingerprint: str, cache_dir: str | Path | None) -> str:
    """The file itself if its rows can be reached one by one, or else its unpacked or converted copy in the cache."""

    def cached(name: str, write: Callable[[str], None]) -> str:
        from datasets import config

        folder = Path(cache_dir or config.HF_DATASETS_CACHE) / "lit_sft_sources"
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # so that nobody sees it half-written
                write(os.path.join(scratch, name))
                os.replace(os.path.join(scratch, name), folder / name)
        return str(folder / name)

    if codec:
        path = cached(fingerprint + suffix, partial(_unpack, path, codec))
    if os.path.getsize(path) == 0:
        raise UserError("it is empty; fill or remove it")
    convert = {".csv": _convert_csv, ".tsv": _convert_csv, ".parquet": _convert_parquet}.get(suffix)
    return path if convert is None else cached(f"{fingerprint}{suffix}.arrow", partial(convert, path))


def _unpack(path: str, codec: str, target: str) -> None:
    import pyarrow as pa

    with pa.input_stream(path, compression=codec) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, _BLOCK)


def _convert_csv(path: str, target: str) -> None:
    """Every field is text: "007" stays "007", "NA" is no null, and an empty field is an empty string."""
    import pyarrow as pa

    csv.field_size_limit(sys.maxsize)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, "excel-tab" if target.endswith(".tsv.arrow") else "excel", strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header) or any(not name.strip() or len(name) > 64 for name in header):
            raise UserError("the first line is no header (its names must be short, different and not empty); add one")
        schema = pa.schema([(name, pa.large_string()) for name in header])

        def batches() -> Iterator[pa.RecordBatch]:
            while chunk := list(islice(filter(None, reader), 1024)):
                if odd := [row for row in chunk if len(row) != len(header)]:
                    raise UserError(f"{odd[0]!s:.80} has {len(odd[0])} fields, the header {len(header)}; use quotes")
                yield pa.record_batch(list(zip(*chunk, strict=True)), schema=schema)

        _write_arrow(schema, batches(), target)


def _convert_parquet(path: str, target: str) -> None:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _write_arrow(file.schema_arrow, file.iter_batches(1024), target)


def _write_arrow(schema: Any, batches: Iterable[Any], target: str) -> None:
    import pyarrow as pa

    with pa.OSFile(target, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _read_arrow(path: str) -> datasets.Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        return Dataset.from_file(path)
    except pa.ArrowInvalid:  # not the streaming kind of Arrow file that `datasets` writes
        return Dataset(InMemoryTable(pa.ipc.open_file(pa.memory_map(path)).read_all()))
