"""Checkpoints on disk: a file, or a directory of parts and a manifest. Whole or not there; found; kept or removed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lit_sft import files
from lit_sft.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
LAST = "last.ckpt"
BEST = "best.ckpt"
STATE = "state.pt"
PART = "part-{}.pt"
MANIFEST = "manifest.json"
LATER = ".{}.later"
"""A checkpoint of what a run did after the one that it went back to; the next save removes it."""


def path_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return run_folder / FOLDER / f"step={step:06d}.ckpt"


def step_of(path: Path) -> int | None:
    """The number of optimizer steps in a checkpoint's name."""
    name = path.resolve().stem
    return int(name.removeprefix("step=")) if name.startswith("step=") else None


def aside(path: Path) -> Path:
    """The name under which a checkpoint is written before it is complete; the same on all ranks."""
    return path.with_name(f".{path.name}.tmp")


# ---------------------------------------------------------------------------------------------------- writing


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Tells in one line that a checkpoint could not be written.

    Raises:
        UserError: The disk is full, or cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise _not_written(path, str(error.strerror)) from error
    except RuntimeError as error:  # torch's writer reports a full disk this way
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise _not_written(path, "is the disk full?") from error


def write(value: Any, path: Path) -> None:
    """Writes tensors and plain values, and waits until the disk has them."""
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path) -> None:
    """Lists the parts and their sizes; a directory without it is not complete."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    with files.atomic_write(folder / MANIFEST) as file:
        json.dump({"files": sizes}, file, indent=2)
    files.sync_folder(folder)


def clear(path: Path, is_folder: bool) -> None:
    """Makes place for what is written aside; of a save that was killed nothing may be taken for a part of this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_folder:
        remove(aside(path))
        aside(path).mkdir()


def put_in_place(path: Path) -> None:
    """Gives what was written aside its name. What bears that name already, from a run that went another way, goes."""
    if aside(path).is_dir():
        write_manifest(aside(path))
    if path.is_dir() or path.exists() and aside(path).is_dir():  # only a file can be replaced in one step
        remove(path)
    os.replace(aside(path), path)
    files.sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a file or a directory; of a directory that is killed half-way no part bears the old name."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f".{path.name.removeprefix('.')}.old")  # a name that `keep` clears away
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(FileNotFoundError):  # another rank was faster
            os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def keep(path: Path, best: bool, keep_last: int) -> None:
    """Points the links to a checkpoint that is complete, then drops those that are no longer kept.

    Args:
        path: The checkpoint.
        best: Whether it is the best so far.
        keep_last: Newest checkpoints that are kept, besides the best.
    """
    folder = path.parent
    _make_newest(path)
    for name in [LAST, *([BEST] if best else [])]:
        files.point(folder / name, path.name)
    kept = {files.target(folder / name) for name in (LAST, BEST)}
    for other in _newest_first(filter(_is_ours, folder.glob("step=*.ckpt")))[keep_last:]:
        if other.name not in kept:
            remove(other)
    for left in folder.glob(".step=*"):  # of saves that were killed, and of a way that was given up
        remove(left)


def go_back(path: Path, step: int, best_step: int | None) -> bool:
    """Makes a checkpoint that a run goes on from the last of its folder: else a restart before the next save would take
    the end of a way that was given up. The later ones are set aside until that save is complete. What is killed
    half-way is done by the next start.

    Args:
        path: The checkpoint.
        step: Its step.
        best_step: Step of the best by then. Whether `best.ckpt` names that now is returned; else there is none.
    """
    folder = path.parent.parent / FOLDER
    with reported(path):
        if path.name not in (LAST, BEST) and _last(path.parent.parent) != path:
            files.point(folder / LAST, os.path.relpath(path, folder))
        with suppress(PermissionError):  # another user's
            _make_newest(path)
        has_best = _restore_best(folder, step, best_step)
        later = [other for other in filter(_is_ours, folder.glob("step=*.ckpt")) if (step_of(other) or 0) > step]
        for other in later:
            remove(put_by := other.with_name(LATER.format(other.name)))
            os.replace(other, put_by)
    if later:
        log.info("%s: what was saved after step %s is set aside as .step=*.later until the next save", folder, step)
    return has_best


def _restore_best(folder: Path, step: int, best_step: int | None) -> bool:
    link, named = folder / BEST, files.target(folder / BEST)
    if best_step is not None and (best := path_of(folder.parent, best_step)).exists():
        if named != best.name:
            files.point(link, best.name)
        return True
    if named is not None and ((step_of(folder / named) or 0) > step or not (folder / named).exists()):
        link.unlink()
        return False
    return named is not None


def _make_newest(path: Path) -> None:
    """Newer than all others of all runs, also where the clock was turned back meanwhile."""
    run = path.parent.parent
    others = [_time(other) for folder in {run, *runs_below(run.parent)} for other in _all(folder) if other != path]
    if (latest := max(others, default=0)) >= _time(path):
        os.utime(path, ns=(latest + 1, latest + 1))


def _not_written(path: Path, reason: str) -> UserError:
    return UserError(f"the checkpoint {path} could not be written ({reason}); earlier ones are untouched")


# ---------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Any:
    """Tensors and plain values, mapped from the file; never runs code.

    Raises:
        UserError: It holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--ckpt_path {path} cannot be read as a checkpoint of lit_sft: {reason}") from error


def check(path: Path) -> None:
    """Refuses a checkpoint that is not there or not complete.

    Raises:
        UserError: See above.
    """
    if not path.exists():
        raise UserError(f"--ckpt_path {path}: there is no such checkpoint")
    if not is_intact(path):
        raise UserError(
            f"--ckpt_path {path} is damaged; use an earlier one, or --ckpt_path last to take the newest that is whole"
        )


def is_intact(path: Path) -> bool:
    """Whether a checkpoint is complete and unchanged: torch writes zip files, whose directory is at the end and names
    all checksums; the manifest of a sharded one names all parts and their sizes.
    """
    try:
        if not path.is_dir():
            return _checksums_hold(path, _time(path), path.stat().st_size)
        sizes = json.loads((path / MANIFEST).read_text())["files"]
        parts = [path / name for name in sizes]
        return STATE in sizes and all(
            part.stat().st_size == sizes[part.name] and _checksums_hold(part, _time(part), sizes[part.name])
            for part in parts
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@lru_cache
def _checksums_hold(path: Path, modified: int, size: int) -> bool:
    """Of one zip file, read once in a process as long as it does not change."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def find_last(logs: Path, run: str | None = None) -> Path | None:
    """The last intact checkpoint of the newest run below `lightning_logs`, or of one; torn ones are passed over with a
    message. In a run the link says which was the last: a copied folder may have other times.
    """
    found = {path: folder for folder in ([logs / run] if run else runs_below(logs)) for path in _all(folder)}
    newest = _newest_first(found)
    folders = list(dict.fromkeys(found[path] for path in newest))
    named = {_last(folder) for folder in folders}
    for path in sorted(newest, key=lambda path: (folders.index(found[path]), path not in named)):
        if is_intact(path):
            return path
        log.warning("%s is torn: passed over", path)
    return None


def runs_below(logs: Path) -> list[Path]:
    """Folders with the names that runs get, and not what somebody has copied or renamed."""
    return [path for path in logs.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]


def _all(run: Path) -> list[Path]:
    """Also one of the user's that the run went back to."""
    ours = [path for path in (run / FOLDER).glob("step=*.ckpt") if _is_ours(path) and not path.is_symlink()]
    last = _last(run)
    return ours if last is None or last in ours or not last.exists() else [*ours, last]


def _last(run: Path) -> Path | None:
    """What its link names."""
    name = files.target(run / FOLDER / LAST)
    return None if name is None else Path(os.path.normpath(run / FOLDER / name))


def _is_ours(path: Path) -> bool:
    """Not one of a `ModelCheckpoint` that the user has added."""
    return re.fullmatch(r"step=\d{6,}\.ckpt", path.name) is not None


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (_time(path), path.name), reverse=True)


def _time(path: Path) -> int:
    """0 where it is gone: another run in the same folder may drop one at any time."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
