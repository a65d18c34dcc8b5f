"""Finds the data files of a directory, a split or a glob, and logs the files that are left out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from glob import escape, glob
from pathlib import Path

from lit_sft.errors import UserError

log = logging.getLogger(__name__)

DATA_FILE = re.compile(
    r"(\.jsonl|\.ndjson|\.json|\.csv|\.tsv|\.parquet|\.arrow)(\.gz|\.zst)?$", re.IGNORECASE
)
"""Name of a data file: the suffix of its format, and of its compression."""
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words that mark it in paths."""
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
"""JSON files that describe a data set and hold no rows."""
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|requirements|makefile)\b.*"
    r"|.*\.(md|rst|py|ipynb|sh|ya?ml|toml|cfg|ini|html|pdf|png|jpe?g|gif|svg|lock)",
    re.IGNORECASE,
)
"""Names of documents, code and pictures that lie beside data."""
_DEEP = re.compile(r"(^|/)\*\*(/|$)")
_SHOWN = 5
"""Number of names in a log line."""


def files_below(folder: str, key: str) -> list[str]:
    """Lists all files below a directory, sorted, without hidden ones.

    Links to files count as files. Links to directories are followed. No directory is read twice.

    Args:
        folder: The directory. It may be inside a hidden one.
        key: The setting, for messages.

    Raises:
        UserError: A directory cannot be read.
    """
    paths = []
    for root, names in _walk(folder, key):
        for name in names:
            paths.append(Path(root, name))
    return [str(path) for path in sorted(paths)]


def files_of_split(folder: str, split: str, key: str) -> list[str]:
    """Lists the data files of one split below a directory, sorted.

    If no path marks a split (such as train.jsonl or test/0.parquet), all data files belong to it.

    Args:
        folder: The directory.
        split: `train`, `validation` or `test`.
        key: The setting, for messages.

    Raises:
        UserError: There is no data file, some paths mark other splits but not this one, or a link
            is broken.
    """
    splits: dict[str, list[str]] = {}
    unread = []
    for file in files_below(folder, key):
        relative = os.path.relpath(file, folder)
        if not _is_data_file(file):
            unread.append(relative)
        elif os.path.basename(file).lower() not in _DESCRIPTIONS:
            splits.setdefault(_split_of(relative), []).append(file)
    report_unread(folder, sorted(unread))
    if not splits:
        raise UserError(
            f"`{folder}` has no data file (json, jsonl, csv, parquet, arrow); correct `{key}`"
        )
    chosen = _choose(splits, folder, split, key)
    check_links(chosen, key)
    return chosen


def _is_data_file(path: str) -> bool:
    """Whether a path has the name of a data file, and is a file or a link, even a broken one."""
    if DATA_FILE.search(path) is None:
        return False
    return os.path.isfile(path) or os.path.islink(path)


def _choose(splits: dict[str, list[str]], folder: str, split: str, key: str) -> list[str]:
    """Returns the files of a split; all files if no path marks a split."""
    if set(splits) == {""}:
        return splits[""]
    if split in splits and "" not in splits:
        return splits[split]
    counts = [f"{name or 'no split'}: {len(files)}" for name, files in splits.items()]
    raise UserError(
        f"`{folder}` has files of ({', '.join(counts)}), {split} is asked for; name files or a glob"
        f" in `{key}`"
    )


def _split_of(path: str) -> str:
    """Returns the split that a path marks, or an empty string."""
    words = set(re.split(r"[\W\d_]+", path.lower()))
    for split, marks in _SPLIT_WORDS.items():
        if not words.isdisjoint(marks):
            return split
    return ""


def files_matching(pattern: str, key: str) -> list[str]:
    """Lists all files that match a glob, sorted, each of them once.

    Args:
        pattern: `**` matches a directory and all directories below it. Links are followed.
        key: The setting, for messages.

    Raises:
        UserError: A matching link is broken, or a directory cannot be read.
    """
    matches = sorted(_expand(pattern, key), key=lambda path: path.count(os.sep))
    check_links(matches, key)
    found: dict[tuple[str, str], str] = {}
    folders_of_found: set[Path] = set()
    for path in matches:
        if os.path.isfile(path):
            own_name = (os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if own_name not in found:
                found[own_name] = path
                folders_of_found.update(Path(path).parents)
    unread = []
    for path in matches:
        if os.path.isdir(path) and Path(path) not in folders_of_found:
            unread.append(path)
    report_unread(pattern, unread)
    return sorted(found.values())


def check_links(paths: Iterable[str], key: str) -> None:
    """Refuses broken links.

    Raises:
        UserError: Names the first broken link.
    """
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(
                f"`{path}` (`{key}`) is a link to `{os.readlink(path)}`, which is not there; fetch"
                " the file (such as with git annex get or dvc pull), or remove the link"
            )


def report_unread(place: str, paths: Iterable[str]) -> None:
    """Logs one line about files that are not read, except documents, code and pictures.

    Args:
        place: The directory or the glob.
        paths: Files and directories in it.
    """
    names = [path for path in paths if not _NO_DATA.fullmatch(os.path.basename(path))]
    if not names:
        return
    more = ""
    if len(names) > _SHOWN:
        more = f" and {len(names) - _SHOWN:,} more"
    log.warning("%s: not read: %s%s", place, ", ".join(names[:_SHOWN]), more)


def _walk(folder: str, key: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each directory from `folder` down, once, with the names of its files.

    A subdirectory that cannot be read is only logged: some directories belong to the system.
    """

    def refuse(error: OSError) -> None:
        what = f"cannot read `{error.filename}` (`{key}`): {error.strerror}; see the permissions"
        if error.filename == folder:
            raise UserError(what) from error
        log.warning(what)

    seen = set()
    # Links are walked last: a directory that is also reached without a link keeps its own path.
    places = [folder]
    for place in places:
        for root, folders, names in os.walk(place, onerror=refuse):
            real = os.path.realpath(root)
            if real in seen:
                # os.walk descends into the folders that remain in this list.
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(_without_hidden(folders))
            for name in folders:
                path = os.path.join(root, name)
                if _leads_on(path, real):
                    places.append(path)
            yield root, _without_hidden(names)


def _expand(pattern: str, key: str) -> Iterator[str]:
    """Yields all paths that match.

    `**` is expanded here, because `glob` would follow circular links and take forever with two.
    """
    deep = _DEEP.search(pattern)
    if deep is None:
        yield from glob(pattern)
        return
    bases = glob(pattern[: deep.end(1)])
    if not bases and deep.start() == 0:
        bases = [os.curdir]
    rest = pattern[deep.end() :] or "*"
    for base in bases:
        for root, _ in _walk(base, key):
            yield from _expand(os.path.join(escape(root), rest), key)


def _without_hidden(names: Iterable[str]) -> list[str]:
    """Drops hidden names, such as copies by notebooks and systems (.ipynb_checkpoints/)."""
    return [name for name in names if not name.startswith(".")]


def _leads_on(path: str, folder: str) -> bool:
    """Whether a path is a link that does not lead back to this directory or above."""
    target = os.path.realpath(path)
    return os.path.islink(path) and os.path.commonpath([target, folder]) != target
