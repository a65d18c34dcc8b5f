"""Unpacked and converted copies of files, in the cache, named by their size and by what they were made from."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lit_sft.errors import UserError

log = logging.getLogger(__name__)

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 1 << 22


def plain_copy(cache_dir: str | Path | None, path: str, suffix: str, ending: str, fingerprint: str) -> str:
    """The file itself if its rows can be reached one by one, or else its unpacked or converted copy in the cache.

    Args:
        cache_dir: Where copies go; by default beside the cache of `datasets`.
        path: Of the file.
        suffix: What it holds, such as `.csv`.
        ending: `.gz`, `.zst` or nothing.
        fingerprint: Hash of its content.
    """
    if ending:
        path = _cached(cache_dir, fingerprint + suffix, partial(_unpack, path, _CODECS[ending]))
    if os.path.getsize(path) == 0:
        raise UserError("it is empty; fill or remove it")
    convert = {".csv": _convert_csv, ".tsv": _convert_csv, ".parquet": _convert_parquet}.get(suffix)
    return path if convert is None else _cached(cache_dir, f"{fingerprint}{suffix}.arrow", partial(convert, path))


def _cached(cache_dir: str | Path | None, name: str, write: Callable[[str], None]) -> str:
    """The copy of that name, made now where there is none of the size that its name says."""
    from datasets import config

    folder = Path(cache_dir or config.HF_DATASETS_CACHE) / "lit_sft_sources"
    for copy in folder.glob(f"*-{name}"):
        if copy.name == f"{copy.stat().st_size}-{name}":
            return str(copy)
        log.warning("the copy %s is damaged and made anew: it has another size than its name says", copy)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # so that nobody sees it half-written
        write(target := os.path.join(scratch, name))
        with open(target, "rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine could leave a name without its content
        copy = folder / f"{os.path.getsize(target)}-{name}"
        os.replace(target, copy)
    return str(copy)


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
