"""Tables: csv, tsv, parquet and Arrow files, read as memory-mapped Arrow files."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from lit_sft.data.sources.cached_copies import cached_copy
from lit_sft.data.sources.csv_rows import CsvRows, has_escaped_quotes
from lit_sft.errors import UserError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")
_CONVERSION = 2
"""Part of the name of converted copies. Raise it when the same file is converted in another way."""
_ROWS_PER_BATCH = 1024
"""Rows per batch of a conversion."""


@dataclass(frozen=True, eq=False)
class ArrowRows:
    """The rows of a table as objects without nulls.

    Arrow gives every object in a column the fields of all others, filled with null. Pictures, films
    and sound stay as they are stored, because decoding them takes long and needs other packages.
    """

    table: datasets.Dataset
    """Gives tables of Arrow."""
    features: datasets.Features
    """What turns the values of Arrow into those of `datasets`."""

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Reads a row.

        Raises:
            UserError: Its values are damaged.
            OSError: The file cannot be read.
        """
        import pyarrow as pa

        try:
            row = self.features.decode_example(self.table[i].to_pylist()[0])
        except (pa.ArrowInvalid, ValueError, OverflowError) as error:
            raise UserError(
                f"the row cannot be read ({shorten(str(error), 200)}); repair or remove it"
            ) from None
        return {column: _drop_nulls(value) for column, value in row.items()}


def arrow_rows(dataset: datasets.Dataset) -> ArrowRows:
    """Returns the rows of a data set, whatever format it was saved with."""
    from datasets import Features

    features = Features(_undecoded(dict(dataset.features)))
    return ArrowRows(dataset.with_format("arrow"), features)


def _undecoded(feature: Any) -> Any:
    """Returns a feature in which pictures, films and sound are not decoded."""
    import datasets

    if isinstance(feature, dict):
        return {name: _undecoded(item) for name, item in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    # `Json` is text, and no media.
    if isinstance(feature, datasets.Json):
        return feature
    # Each version of `datasets` knows more kinds of media, which have this field in common.
    if any(field.name == "decode" for field in fields(feature)):
        return replace(feature, decode=False)
    return feature


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
        ".csv": partial(_convert_csv, path, ","),
        ".tsv": partial(_convert_csv, path, "\t"),
        ".parquet": partial(_convert_parquet, path),
    }
    if suffix in convert:
        name = f"{fingerprint}{suffix}-{_CONVERSION}.arrow"
        path = cached_copy(cache_dir, name, convert[suffix])
        return arrow_rows(_read_arrow(path))
    dataset = _read_arrow(path)
    # Arrow follows damaged offsets without a look, which ends the process.
    dataset.data.table.validate(full=True)
    return arrow_rows(dataset)


def _convert_csv(path: str, separator: str, target: str) -> None:
    """Converts a csv file. Every field stays text: "007", "NA", and an empty string."""
    csv.field_size_limit(sys.maxsize)
    try:
        _convert_lines(path, separator, target, has_escapes=False)
    except UserError as error:
        # The standard doubles a quote within quotes. Others put a backslash before it, which reads
        # as the end of the field there.
        if not has_escaped_quotes(path):
            raise
        try:
            _convert_lines(path, separator, target, has_escapes=True)
        except UserError:
            raise error from None


def _convert_lines(path: str, separator: str, target: str, *, has_escapes: bool) -> None:
    import pyarrow as pa

    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = CsvRows(file, separator, has_escapes)
        schema = pa.schema([(name, pa.large_string()) for name in rows.header])
        _write_arrow(schema, _record_batches(rows, schema), target)


def _record_batches(rows: Iterable[list[str]], schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    remaining = iter(rows)
    while chunk := list(islice(remaining, _ROWS_PER_BATCH)):
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
