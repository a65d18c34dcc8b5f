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

DATA_FILE = re.compile(
    r"(\.jsonl|\.ndjson|\.json|\.csv|\.tsv|\.parquet|\.arrow)(\.gz|\.zst)?$", re.IGNORECASE
)
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
_DEEP = re.compile(r"(^|/)\*\*(/|$)")
_SHOWN = 5
"""Names that a log line shows."""


def files_below(folder: str, key: str) -> list[str]:
    """All files in a directory and its subdirectories, by name. Hidden files are left out.

    Links are files, too. Links to directories are followed, and no directory is read twice.

    Args:
        folder: The directory. It may itself lie in a hidden one.
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
    """The data files in a directory and its subdirectories, by name.

    Where the paths tell splits (train.jsonl, test/0.parquet), only those of one split.

    Args:
        folder: The directory.
        split: `train`, `validation` or `test`.
        key: The setting, for messages.

    Raises:
        UserError: There is none, the paths do not tell which are of this split, or a link leads
            nowhere.
    """
    splits: dict[str, list[str]] = {}
    unread = []
    for file in files_below(folder, key):
        relative = os.path.relpath(file, folder)
        if not DATA_FILE.search(file) or not (os.path.isfile(file) or os.path.islink(file)):
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


def _choose(splits: dict[str, list[str]], folder: str, split: str, key: str) -> list[str]:
    """The files of a split; all files if no path tells a split."""
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
    """The split that a path tells, or an empty string."""
    words = set(re.split(r"[\W\d_]+", path.lower()))
    for split, marks in _SPLIT_WORDS.items():
        if not words.isdisjoint(marks):
            return split
    return ""


def files_matching(pattern: str, key: str) -> list[str]:
    """All files that match a glob, by name, each of them once.

    Args:
        pattern: `**` stands for a directory and all directories below it. Links are followed.
        key: The setting, for messages.

    Raises:
        UserError: A link that matches leads nowhere, or a directory cannot be read.
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
    report_unread(
        pattern,
        [path for path in matches if os.path.isdir(path) and Path(path) not in folders_of_found],
    )
    return sorted(found.values())


def check_links(paths: Iterable[str], key: str) -> None:
    """Refuses links that lead nowhere.

    Raises:
        UserError: Names the first.
    """
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(
                f"`{path}` (`{key}`) is a link to `{os.readlink(path)}`, which is not there; fetch"
                " the file (such as with git annex get or dvc pull), or remove the link"
            )


def report_unread(place: str, paths: Iterable[str]) -> None:
    """Logs one line about files that are not read, unless their names say that they are no data.

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
    """Each directory from `folder` down, once, and the names of its files.

    A subdirectory that cannot be read is logged: some directories of a disk belong to the system.
    """

    def refuse(error: OSError) -> None:
        what = f"cannot read `{error.filename}` (`{key}`): {error.strerror}; see the permissions"
        if error.filename == folder:
            raise UserError(what) from error
        log.warning(what)

    seen = set()
    # Links are walked last, so that a directory which is also reached without one keeps its own
    # name.
    places = [folder]
    for place in places:
        for root, folders, names in os.walk(place, onerror=refuse):
            real = os.path.realpath(root)
            if real in seen:
                # os.walk goes down into the folders that are left in this list.
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
    """All paths that match.

    `**` is expanded here: `glob` would follow links in circles, and take forever if there are two
    of them.
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
    """Copies that editors, notebooks and systems keep (.ipynb_checkpoints/, ._train.jsonl) are no
    data.
    """
    return [name for name in names if not name.startswith(".")]


def _leads_on(path: str, folder: str) -> bool:
    """Whether a path in a directory is a link that does not lead back up."""
    target = os.path.realpath(path)
    return os.path.islink(path) and os.path.commonpath([target, folder]) != target
