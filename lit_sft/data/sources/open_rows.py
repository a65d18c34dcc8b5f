"""Opens the source that a setting such as `data.train` names.

A source is `builtin:NAME`, a file, a glob, a directory or a hub id. A list of them is a weighted
mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sft.data.sources.blocks import content_hash
from lit_sft.data.sources.find_files import DATA_FILE, check_links, files_matching, files_of_split
from lit_sft.data.sources.hub_datasets import load_hub, load_saved
from lit_sft.data.sources.mixture import read_member
from lit_sft.data.sources.open_file import open_file
from lit_sft.data.sources.rows import FilePart, Rows, join, mix
from lit_sft.data.sources.tables import arrow_rows
from lit_sft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED = ("state.json", "dataset_dict.json")
"""Files in a directory that `save_to_disk` wrote."""
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def open_rows(
    spec: str | Sequence[str | Mapping[str, Any]],
    *,
    split: str = "train",
    builtin: Callable[[str, str], list[dict[str, Any]]] | None = None,
    key: str = "data.train",
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Rows:
    """Opens a source or a mixture. An existing path wins over a hub id of the same name.

    Args:
        spec: One source, or a list of {path, name, split, weight}. `name` is the configuration of a
            hub data set. `weight` repeats the rows (2.0: each twice; 0.5: half of them, chosen by
            seed; default 1.0).
        split: Split of sources that have splits, unless their entry names one.
        builtin: (name, split) -> rows of a built-in task.
        key: The setting, for messages.
        seed: Chooses rows for fractional weights.
        cache_dir: Directory of unpacked and converted files; None: beside the cache of `datasets`.

    Raises:
        UserError: A source does not exist, cannot be read or is empty, or an entry is wrong.
    """
    opener = _Opener(key, split, builtin, cache_dir)
    if isinstance(spec, str):
        return join(spec, opener.open_parts(spec))
    if not spec:
        raise UserError(f"`{key}` is an empty list; name at least one source")
    members = []
    for i, entry in enumerate(spec):
        members.append(_open_member(entry, replace(opener, key=f"{key}[{i}]")))
    name = " + ".join(rows.name for rows, _ in members)
    return mix(name, members, seed)


def _open_member(entry: str | Mapping[str, Any], opener: _Opener) -> tuple[Rows, float]:
    """Opens a member of a mixture, and returns its rows and weight."""
    member = read_member(entry, opener.key)
    if member.split:
        opener = replace(opener, split=member.split)
    rows = join(member.path, opener.open_parts(member.path, member.name))
    if round(member.weight * len(rows)) < 1:
        raise UserError(
            f"`{opener.key}.weight: {member.weight}` leaves none of {len(rows)} rows; raise it or"
            " remove the source"
        )
    return rows, float(member.weight)


@dataclass(frozen=True)
class _Opener:
    key: str
    split: str
    builtin: Callable[[str, str], list[dict[str, Any]]] | None
    cache_dir: str | Path | None

    def open_parts(self, path: str, config: str | None = None) -> list[FilePart]:
        """Opens one source, which may have many files."""
        parts = self._open(path, config)
        for part in parts:
            if len(part.rows) == 0:
                raise UserError(f"`{part.name}` (`{self.key}`) is empty; fill it or remove it")
        if len(parts) > 1:
            self._check_columns(parts)
        return parts

    def _check_columns(self, parts: list[FilePart]) -> None:
        """Refuses files without any column of the first file."""
        expected = _first_columns(parts[0])
        for part in parts:
            names = _first_columns(part)
            if names and expected and names.isdisjoint(expected):
                raise UserError(
                    f"`{part.name}` has the columns {', '.join(sorted(names))}, but"
                    f" `{parts[0].name}` has other ones; files of different formats must be sources"
                    f" of their own in `{self.key}`"
                )

    def _open(self, path: str, config: str | None) -> list[FilePart]:
        if path.startswith("builtin:"):
            return [self._open_builtin(path)]
        place = os.path.expanduser(path)
        if any(os.path.isfile(os.path.join(place, name)) for name in _SAVED):
            return [_dataset_part(path, load_saved(place, self.split, self.key), self.split)]
        if os.path.isdir(place):
            return self._open_files(files_of_split(place, self.split, self.key))
        check_links([place], self.key)
        if os.path.exists(place):
            return self._open_files([place])
        if has_magic(place):
            files = files_matching(place, self.key)
            if not files:
                raise UserError(f"no file matches `{path}`; correct `{self.key}`")
            return self._open_files(files)
        if DATA_FILE.search(path) or not _HUB_ID.fullmatch(path):
            raise UserError(
                f"file not found: `{path}`; correct `{self.key}` (relative paths start at"
                f" {os.getcwd()})"
            )
        return [_dataset_part(path, load_hub(path, config, self.split, self.key), self.split)]

    def _open_builtin(self, path: str) -> FilePart:
        assert self.builtin is not None, "only the built-in tasks' owner can open them"
        rows = self.builtin(path.removeprefix("builtin:"), self.split)
        return FilePart(path, hashlib.sha256(json.dumps(rows).encode()).hexdigest(), rows)

    def _open_files(self, paths: list[str]) -> list[FilePart]:
        return [open_file(path, self.key, self.cache_dir) for path in paths]


def _first_columns(part: FilePart) -> set[str]:
    """Returns the columns of the first rows."""
    columns: set[str] = set()
    for row in join(part.name, [part]).head(3):
        columns.update(row)
    return columns


def _dataset_part(name: str, dataset: Dataset, split: str) -> FilePart:
    """Wraps a data set of `datasets`; slices of the same files differ in `split`."""
    files = content_hash(*(file["filename"] for file in dataset.cache_files))
    identity = repr((files, split, len(dataset), dataset.column_names))
    return FilePart(name, hashlib.sha256(identity.encode()).hexdigest(), arrow_rows(dataset))
