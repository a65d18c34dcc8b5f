"""`data.train` and its like -> `Rows`: decides what a setting names, and composes the files of this folder.

A setting is `builtin:NAME`, a file, a glob, a directory, a hub id, or a list of such as a weighted mixture.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sft.data.sources.data_files import DATA_FILE, FilePart, _ArrowRows, _content_hash, open_file
from lit_sft.data.sources.find_files import check_links, files_below, files_matching, report_unread
from lit_sft.data.sources.hub_datasets import load_hub, load_saved
from lit_sft.data.sources.rows import Rows, by_source, first_rows, join, limit, mix, split_rows, subset
from lit_sft.data.sources.unpacked_copies import plain_copy
from lit_sft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Rows", "by_source", "first_rows", "limit", "open_rows", "split_rows", "subset"]

ENTRY_KEYS = ("path", "name", "split", "weight")
NO_DATA = ("dataset_info.json", "dataset_infos.json")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def open_rows(
    spec: str | Sequence[str | Mapping[str, Any]],
    *,
    split: str = "train",
    builtin: Callable[[str, str], list[dict[str, Any]]] | None = None,
    key: str = "data.train",
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Rows:
    """Open what a setting names. An existing path wins over a hub id of the same name.

    Args:
        spec: One source, or a list of {path, name, split, weight}: `name` is the configuration of a hub data set; the
            weight multiplies the rows of its source (1.0 by default; 2.0: each twice; 0.5: half of them, by seed).
        split: Which split, where a source has splits and its entry names none.
        builtin: (name, split) -> rows of a built-in task.
        key: The setting, for messages.
        seed: For weights that are no whole numbers.
        cache_dir: Where unpacked and converted files go; by default beside the cache of `datasets`.

    Raises:
        UserError: Something is not there, cannot be read, is empty, or is no such setting.
    """
    opener = _Opener(key, split, builtin, cache_dir)
    if isinstance(spec, str):
        return join(spec, opener.parts(spec))
    if not spec:
        raise UserError(f"`{key}` is an empty list; name at least one source")
    members = [_open_entry(entry, replace(opener, key=f"{key}[{i}]")) for i, entry in enumerate(spec)]
    return mix(" + ".join(rows.name for rows, _ in members), members, seed)


def _open_entry(entry: str | Mapping[str, Any], opener: _Opener) -> tuple[Rows, float]:
    """A member of a mixture and its weight."""
    given = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(given, Mapping):
        raise UserError(f"`{opener.key}` is {given!r:.60}, expected a path or {{path, name, split, weight}}")
    for name in given:
        if name not in ENTRY_KEYS:
            near = difflib.get_close_matches(str(name), ENTRY_KEYS, 1)
            raise UserError(
                f"`{opener.key}` has no key `{name}`; {f'did you mean `{near[0]}`?' if near else 'remove it'}"
            )
    path, config, split, weight = (given.get(name) for name in ENTRY_KEYS)
    if not isinstance(path, str):
        raise UserError(f"`{opener.key}.path` is {path!r:.60}, expected a path, glob, hub id or builtin:NAME")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(
            f"`{opener.key}.weight` is {weight!r:.60}, expected a number above 0; to leave a source out, remove it"
        )
    place = os.path.expanduser(path)
    for name, value, idle in (("split", split, os.path.isfile(place)), ("name", config, os.path.exists(place))):
        if value is not None and idle:
            raise UserError(f"`{opener.key}.{name}` is `{value}`, but the local `{path}` has none; remove the key")
    rows = join(path, replace(opener, split=split or opener.split).parts(path, config))
    if round(weight * len(rows)) < 1:
        raise UserError(
            f"`{opener.key}.weight: {weight}` leaves none of {len(rows)} rows; raise it or remove the source"
        )
    return rows, float(weight)


@dataclass(frozen=True)
class _Opener:
    key: str
    split: str
    builtin: Callable[[str, str], list[dict[str, Any]]] | None
    cache_dir: str | Path | None

    def parts(self, path: str, config: str | None = None) -> list[FilePart]:
        """Open one source, which may be many files."""
        parts = self._open(path, config)
        for part in parts:
            if len(part) == 0:
                raise UserError(f"`{part.name}` (`{self.key}`) is empty; fill it or remove it")
        columns = [{column for row in join(part.name, [part]).head(3) for column in row} for part in parts]
        for part, names in zip(parts, columns, strict=True):
            if names and columns[0] and not names & columns[0]:
                raise UserError(
                    f"`{part.name}` has the columns {', '.join(sorted(names))}, but `{parts[0].name}` has other ones; "
                    f"files of different formats must be sources of their own in `{self.key}`"
                )
        return parts

    def _open(self, path: str, config: str | None) -> list[FilePart]:
        place = os.path.expanduser(path)
        if path.startswith("builtin:"):
            assert self.builtin is not None, "only the built-in tasks' owner can open them"
            rows = self.builtin(path.removeprefix("builtin:"), self.split)
            return [FilePart(path, hashlib.sha256(json.dumps(rows).encode()).hexdigest(), rows)]
        if any(os.path.isfile(os.path.join(place, name)) for name in ("state.json", "dataset_dict.json")):
            return [_dataset_part(path, load_saved(place, self.split, self.key), self.split)]
        if os.path.isdir(place):
            return self._open_files(self._files_of_split(place))
        check_links([place], self.key)
        if os.path.exists(place):
            return self._open_files([place])
        if has_magic(place):
            if not (files := files_matching(place, self.key)):
                raise UserError(f"no file matches `{path}`; correct `{self.key}`")
            return self._open_files(files)
        if DATA_FILE.search(path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
            raise UserError(f"file not found: `{path}`; correct `{self.key}` (relative paths start at {os.getcwd()})")
        return [_dataset_part(path, load_hub(path, config, self.split, self.key), self.split)]

    def _open_files(self, paths: list[str]) -> list[FilePart]:
        return [open_file(path, self.key, partial(plain_copy, self.cache_dir)) for path in paths]

    def _files_of_split(self, folder: str) -> list[str]:
        """The data files in a folder by name; where names tell splits (train.jsonl, test/0.parquet), those of ours."""
        files = files_below(folder, self.key)
        found = [file for file in files if DATA_FILE.search(file) and (os.path.isfile(file) or os.path.islink(file))]
        report_unread(folder, [os.path.relpath(file, folder) for file in sorted(set(files).difference(found))])
        splits: dict[str, list[str]] = {}
        for file in found:
            words = re.split(r"[\W\d_]+", os.path.relpath(file, folder).lower())
            told = [split for split, marks in SPLIT_WORDS.items() if any(word in marks for word in words)]
            if os.path.basename(file).lower() not in NO_DATA:
                splits.setdefault(told[0] if told else "", []).append(file)
        if not splits:
            raise UserError(f"`{folder}` has no data file (json, jsonl, csv, parquet, arrow); correct `{self.key}`")
        if set(splits) == {""}:
            check_links(splits[""], self.key)
            return splits[""]
        if self.split not in splits or "" in splits:
            names = ", ".join(f"{split or 'no split'}: {len(files)}" for split, files in splits.items())
            raise UserError(
                f"`{folder}` has files of ({names}), {self.split} is asked for; name files or a glob in `{self.key}`"
            )
        check_links(splits[self.split], self.key)
        return splits[self.split]


def _dataset_part(name: str, dataset: Dataset, split: str) -> FilePart:
    """A data set that lies in Arrow files already; `split` tells apart slices of the same files."""
    files = _content_hash(*(file["filename"] for file in dataset.cache_files))
    told = repr((files, split, len(dataset), dataset.column_names))
    return FilePart(name, hashlib.sha256(told.encode()).hexdigest(), _ArrowRows(dataset))
