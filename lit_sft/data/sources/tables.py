"""Tables: csv, tsv, parquet and Arrow files, read as memory-mapped Arrow files."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sft.data.sources.cached_copies import cached_copy
from lit_sft.errors import UserError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")
_ROWS_PER_BATCH = 1024
"""Rows per batch of a conversion."""


@dataclass(frozen=True, eq=False)
class ArrowRows:
    """The rows of a table as objects without nulls.

    Arrow gives every object in a column the fields of all others, filled with null.
    """

    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {column: _drop_nulls(value) for column, value in self.dataset[i].items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_nulls(item) for item in value]
    return value


def open_table(path: str, suffix: str, fingerprint: str, cache_dir: str | Path | None) -> ArrowRows:
    """Opens a table.

    Args:
        path: The uncompressed file.
        suffix: One of `SUFFIXES`. All but Arrow files are converted to Arrow in the cache.
        fingerprint: `content_hash` of the file, which names the converted copy.
        cache_dir: Directory of converted copies; see `cached_copy`.

    Raises:
        UserError: The file is no table.
        OSError: The file cannot be read.
    """
    convert = {
        ".csv": partial(_convert_csv, path, "excel"),
        ".tsv": partial(_convert_csv, path, "excel-tab"),
        ".parquet": partial(_convert_parquet, path),
    }
    if suffix in convert:
        path = cached_copy(cache_dir, f"{fingerprint}{suffix}.arrow", convert[suffix])
    return ArrowRows(_read_arrow(path))


def _convert_csv(path: str, dialect: str, target: str) -> None:
    """Converts a csv file. Every field stays text: "007", "NA", and an empty string."""
    import pyarrow as pa

    csv.field_size_limit(sys.maxsize)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, dialect, strict=True)
        header = next(reader, [])
        _check_header(header)
        schema = pa.schema([(name, pa.large_string()) for name in header])
        _write_arrow(schema, _record_batches(reader, schema), target)


def _check_header(header: list[str]) -> None:
    if len(set(header)) < len(header) or any(not name.strip() or len(name) > 64 for name in header):
        raise UserError(
            "the first line is no header (its names must be short, different and not empty);"
            " add one"
        )


def _record_batches(lines: Iterable[list[str]], schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    filled = filter(None, lines)
    while chunk := list(islice(filled, _ROWS_PER_BATCH)):
        for fields in chunk:
            if len(fields) != len(schema):
                raise UserError(
                    f"{fields!s:.80} has {len(fields)} fields, the header {len(schema)}; use quotes"
                )
        yield pa.record_batch(list(zip(*chunk, strict=True)), schema=schema)


def _convert_parquet(path: str, target: str) -> None:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _write_arrow(file.schema_arrow, file.iter_batches(_ROWS_PER_BATCH), target)


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
    except pa.ArrowInvalid:
        # Dataset.from_file reads only Arrow's stream format. This file has the file format.
        return Dataset(InMemoryTable(pa.ipc.open_file(pa.memory_map(path)).read_all()))
