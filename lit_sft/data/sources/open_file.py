"""Opens a data file by the suffix of its name."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from textwrap import shorten

from lit_sft.data.sources.blocks import content_hash
from lit_sft.data.sources.cached_copies import unpacked
from lit_sft.data.sources.find_files import DATA_FILE
from lit_sft.data.sources.jsonl import index_lines, read_array
from lit_sft.data.sources.rows import FilePart
from lit_sft.data.sources.tables import SUFFIXES, open_table
from lit_sft.errors import UserError


def open_file(path: str, key: str, cache_dir: str | Path | None) -> FilePart:
    """Opens a json, jsonl, ndjson, csv, tsv, parquet or arrow file, also with .gz or .zst.

    Args:
        path: The file.
        key: The setting that names it, such as `data.train`, for messages.
        cache_dir: Directory of unpacked and converted copies; see `cached_copy`.

    Raises:
        UserError: The file has another suffix, or cannot be read.
    """
    import pyarrow as pa

    try:
        return _open_by_suffix(path, cache_dir)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"cannot read `{path}` (`{key}`): {_reason(error)}") from error


def _open_by_suffix(path: str, cache_dir: str | Path | None) -> FilePart:
    found = DATA_FILE.search(path)
    if found is None:
        raise UserError(
            "its name ends in none of .json .jsonl .ndjson .csv .tsv .parquet .arrow (+ .gz or"
            " .zst)"
        )
    suffix = found[1].lower()
    fingerprint = content_hash(path)
    plain = path
    if found[2] is not None:
        plain = unpacked(cache_dir, path, found[2].lower(), fingerprint + suffix)
    if os.path.getsize(plain) == 0:
        raise UserError("it is empty; fill or remove it")
    if suffix in SUFFIXES:
        return FilePart(path, fingerprint, open_table(plain, suffix, fingerprint, cache_dir))
    if suffix == ".json":
        array = read_array(plain)
        if array is not None:
            return FilePart(path, fingerprint, array)
    rows = index_lines(plain, fingerprint if plain == path else content_hash(plain))
    return FilePart(path, fingerprint, rows, rows.lines)


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}; save it as UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.strerror} ({error.filename}); see the permissions, and `data.cache_dir` for"
            " copies"
        )
    return f"{shorten(str(error), 200)}; is it complete, and its suffix right?"
