"""Which files a directory, a split in it or a glob stands for. What is left out is logged."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from glob import escape, glob
from pathlib import Path

from lit_sft.errors import UserError

log = logging.getLogger(__name__)

DATA_FILE = re.compile(r"(\.jsonl|\.ndjson|\.json|\.csv|\.tsv|\.parquet|\.arrow)(\.gz|\.zst)?$", re.IGNORECASE)
"""The end of the name of a file that can be opened: what it holds, and how it is compressed."""
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in paths that tell a split."""
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
"""Files that describe a data set, and look like data."""
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|requirements|makefile)\b.*"
    r"|.*\.(md|rst|py|ipynb|sh|ya?ml|toml|cfg|ini|html|pdf|png|jpe?g|gif|svg|lock)",
    re.IGNORECASE,
)
"""Names of what stands beside data: text about it, code, pictures."""
_SHOWN = 5


def files_below(folder: str, key: str) -> list[str]:
    """All files in a directory and its subdirectories, by name, links among them; hidden ones are no data.

    Links to directories are followed, and no directory is read twice.

    Args:
        folder: The directory. It may itself lie in one that is hidden.
        key: The setting, for messages.

    Raises:
        UserError: A directory cannot be read.
    """
    return [str(path) for path in sorted(Path(root, name) for root, names in _walk(folder, key) for name in names)]


def files_of_split(folder: str, split: str, key: str) -> list[str]:
    """The data files in a directory and its subdirectories, by name.

    Where the paths tell splits (train.jsonl, test/0.parquet), only those of one split.

    Args:
        folder: The directory.
        split: `train`, `validation` or `test`.
        key: The setting, for messages.

    Raises:
        UserError: There is none, the paths do not tell which are of this split, or a link leads nowhere.
    """
    files = files_below(folder, key)
    found = [file for file in files if DATA_FILE.search(file) and (os.path.isfile(file) or os.path.islink(file))]
    report_unread(folder, [os.path.relpath(file, folder) for file in sorted(set(files).difference(found))])
    splits: dict[str, list[str]] = {}
    for file in found:
        if os.path.basename(file).lower() not in _DESCRIPTIONS:
            splits.setdefault(_split_of(os.path.relpath(file, folder)), []).append(file)
    if not splits:
        raise UserError(f"`{folder}` has no data file (json, jsonl, csv, parquet, arrow); correct `{key}`")
    chosen = "" if set(splits) == {""} else split
    if chosen not in splits or (chosen and "" in splits):
        names = ", ".join(f"{name or 'no split'}: {len(files)}" for name, files in splits.items())
        raise UserError(f"`{folder}` has files of ({names}), {split} is asked for; name files or a glob in `{key}`")
    check_links(splits[chosen], key)
    return splits[chosen]


def _split_of(path: str) -> str:
    """The split that a path tells, or an empty string."""
    words = set(re.split(r"[\W\d_]+", path.lower()))
    for split, marks in _SPLIT_WORDS.items():
        if not words.isdisjoint(marks):
            return split
    return ""


def files_matching(pattern: str, key: str) -> list[str]:
    """All files that match a glob, by name, each once.

    Args:
        pattern: With `**` for a directory and all below it, those that links lead to included.
        key: The setting, for messages.

    Raises:
        UserError: A link that matches leads nowhere, or a directory cannot be read.
    """
    matches = sorted(_expand(pattern, key), key=lambda path: path.count(os.sep))
    check_links(matches, key)
    found: dict[tuple[str, str], str] = {}
    for path in filter(os.path.isfile, matches):
        found.setdefault((os.path.realpath(os.path.dirname(path)), os.path.basename(path)), path)
    inside = {str(parent) for path in found.values() for parent in Path(path).parents}
    report_unread(pattern, [path for path in matches if os.path.isdir(path) and str(Path(path)) not in inside])
    return sorted(found.values())


def check_links(paths: Iterable[str], key: str) -> None:
    """Refuses links that lead nowhere.

    Raises:
        UserError: Names the first.
    """
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(
                f"`{path}` (`{key}`) is a link to `{os.readlink(path)}`, which is not there; fetch the file (such as "
                "with git annex get or dvc pull), or remove the link"
            )


def report_unread(place: str, paths: Iterable[str]) -> None:
    """One line about what else lies in a place, but for what is never data.

    Args:
        place: A directory or a glob.
        paths: What is not read of it.
    """
    names = [path for path in paths if not _NO_DATA.fullmatch(os.path.basename(path))]
    if names:
        more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        log.warning("%s: not read: %s%s", place, ", ".join(names[:_SHOWN]), more)


def _walk(folder: str, key: str) -> Iterator[tuple[str, list[str]]]:
    """Each directory from `folder` down, once, and the names of its files. Of a disk some belong to the system."""

    def refuse(error: OSError) -> None:
        what = f"cannot read `{error.filename}` (`{key}`): {error.strerror}; see the permissions"
        if error.filename == folder:
            raise UserError(what) from error
        log.warning(what)

    places, seen = [folder], set()
    for place in places:  # links come last, so that a directory is known by its own name
        for root, folders, names in os.walk(place, onerror=refuse):
            if (real := os.path.realpath(root)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(_shown(folders))
            places += [link for link in (os.path.join(root, name) for name in folders) if _leads_on(link, real)]
            yield root, _shown(names)


def _expand(pattern: str, key: str) -> Iterator[str]:
    """What matches. `glob` itself would follow links in circles, and take forever where there are two."""
    if not (deep := re.search(r"(^|/)\*\*(/|$)", pattern)):
        yield from glob(pattern)
        return
    for base in glob(pattern[: deep.end(1)]) or [os.curdir] * (deep.start() == 0):
        for root, _ in _walk(base, key):
            yield from _expand(os.path.join(escape(root), pattern[deep.end() :] or "*"), key)


def _shown(names: Iterable[str]) -> list[str]:
    """Copies that editors, notebooks and systems keep (.ipynb_checkpoints/, ._train.jsonl) are no data."""
    return [name for name in names if not name.startswith(".")]


def _leads_on(path: str, folder: str) -> bool:
    """Whether a path in a directory is a link, and not one that leads back up."""
    target = os.path.realpath(path)
    return os.path.islink(path) and os.path.commonpath([target, folder]) != target
