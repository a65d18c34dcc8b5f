"""Checkpoints on disk: their names, how they are written, and which are kept.

A checkpoint is one file, or a directory with one part per rank and a manifest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
"""Name of a later checkpoint when a run resumes from an earlier one. The next save removes it."""


def path_of(run_folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint of an optimizer step."""
    return run_folder / FOLDER / f"step={step:06d}.ckpt"


def step_of(path: Path) -> int | None:
    """Returns the optimizer step in the name of a checkpoint; None for another name."""
    name = path.resolve().stem
    return int(name.removeprefix("step=")) if name.startswith("step=") else None


def aside(path: Path) -> Path:
    """Returns the temporary path that a checkpoint is written to, the same on all ranks."""
    return path.with_name(f".{path.name}.tmp")


# ------------------------------------------------------------------ listing


def runs_below(logs: Path) -> list[Path]:
    """Returns the folders `version_N`; copies and folders with other names are left out."""
    return [path for path in logs.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]


def checkpoints_of(run: Path) -> list[Path]:
    """Returns the checkpoints of a run, and one of the user's if `last.ckpt` points at it."""
    ours = [path for path in own_checkpoints(run / FOLDER) if not path.is_symlink()]
    last = last_of(run)
    if last is None or last in ours or not last.exists():
        return ours
    return [*ours, last]


def last_of(run: Path) -> Path | None:
    """Returns the checkpoint that `last.ckpt` of a run points at, whether it exists or not."""
    name = files.target(run / FOLDER / LAST)
    return None if name is None else Path(os.path.normpath(run / FOLDER / name))


def own_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of `Checkpointer`, without those of a user's `ModelCheckpoint`."""
    named_alike = folder.glob("step=*.ckpt")
    return [path for path in named_alike if re.fullmatch(r"step=\d{6,}\.ckpt", path.name)]


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sorts by time of modification, and by name if times are equal."""
    return sorted(paths, key=lambda path: (modified(path), path.name), reverse=True)


def modified(path: Path) -> int:
    """Returns the time of modification in nanoseconds; 0 if the file is gone.

    Another run may remove its checkpoints at any time.
    """
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------ writing


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns errors while writing a checkpoint into an error of one line.

    Args:
        path: The checkpoint.

    Raises:
        UserError: The disk is full, or cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise _not_written(path, str(error.strerror)) from error
    except RuntimeError as error:
        # This is how torch's writer reports a full disk.
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise _not_written(path, "is the disk full?") from error


def _not_written(path: Path, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {path} could not be written ({reason}); earlier ones are untouched"
    )


def write(value: Any, path: Path) -> None:
    """Writes tensors and plain values to a file, and syncs it to disk."""
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path) -> None:
    """Lists the parts and their sizes. A directory without a manifest is not complete."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    with files.atomic_write(folder / MANIFEST) as file:
        json.dump({"files": sizes}, file, indent=2)
    files.sync_folder(folder)


def clear(path: Path, is_folder: bool) -> None:
    """Makes room for a checkpoint that is written aside.

    Parts that a killed save has left are removed, so that none is taken for a part of this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_folder:
        remove(aside(path))
        aside(path).mkdir()


def put_in_place(path: Path) -> None:
    """Gives a checkpoint that was written aside its name.

    It replaces a checkpoint of the same step, which a run may have left that was resumed from an
    earlier one.
    """
    is_folder = aside(path).is_dir()
    if is_folder:
        write_manifest(aside(path))
    # Only a file can replace a file in one step.
    if path.is_dir() or (path.exists() and is_folder):
        remove(path)
    os.replace(aside(path), path)
    files.sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a file or a directory.

    A directory is renamed first, so that a kill never leaves half of one under its old name.
    """
    if path.is_dir() and not path.is_symlink():
        # `keep` removes what is left under this name.
        doomed = path.with_name(f".{path.name.removeprefix('.')}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        # Another rank may have renamed it already.
        with suppress(FileNotFoundError):
            os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------ keeping


@dataclass(frozen=True)
class KeepPolicy:
    """Which other checkpoints of a run are kept when a new one is complete."""

    is_best: bool
    """Whether the new checkpoint is the best so far."""
    keep_last: int
    """Newest checkpoints that are kept, besides the best."""


def keep(path: Path, policy: KeepPolicy) -> None:
    """Points the links at a complete checkpoint, and then removes those no longer kept.

    Args:
        path: The complete checkpoint.
        policy: Whether it is the best, and how many are kept.
    """
    folder = path.parent
    _make_newest(path)
    files.point(folder / LAST, path.name)
    if policy.is_best:
        files.point(folder / BEST, path.name)
    kept = {files.target(folder / name) for name in (LAST, BEST)}
    for other in newest_first(own_checkpoints(folder))[policy.keep_last :]:
        if other.name not in kept:
            remove(other)
    # Remains of killed saves, and checkpoints that `go_back` has set aside.
    for left in folder.glob(".step=*"):
        remove(left)


def go_back(path: Path, step: int, best_step: int | None) -> bool:
    """Points last.ckpt at the checkpoint that a run resumes from.

    Otherwise a crash before the next save would resume the abandoned branch. Later checkpoints are
    set aside until that save is complete. If this is killed half-way, the next start completes it.

    Args:
        path: The checkpoint to resume from.
        step: Its step.
        best_step: The step of the best checkpoint so far, as `path` knows it.

    Returns:
        Whether `best.ckpt` now points at that best checkpoint; otherwise there is no `best.ckpt`.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = path.parent.parent / FOLDER
    with reported(path):
        if path.name not in (LAST, BEST) and last_of(path.parent.parent) != path:
            files.point(folder / LAST, os.path.relpath(path, folder))
        # A checkpoint of another user keeps its time.
        with suppress(PermissionError):
            _make_newest(path)
        has_best = _restore_best(folder, step, best_step)
        later = [other for other in own_checkpoints(folder) if (step_of(other) or 0) > step]
        for other in later:
            put_by = other.with_name(LATER.format(other.name))
            remove(put_by)
            os.replace(other, put_by)
    if later:
        log.info(
            "%s: what was saved after step %s is set aside as .step=*.later until the next save",
            folder,
            step,
        )
    return has_best


def _restore_best(folder: Path, step: int, best_step: int | None) -> bool:
    """Points `best.ckpt` at the best checkpoint up to a step, or removes the link.

    Args:
        folder: The folder of the checkpoints.
        step: The step to resume from.
        best_step: The step of the best checkpoint so far; None if it is not known.

    Returns:
        Whether `best.ckpt` points at a checkpoint that still exists.
    """
    link = folder / BEST
    named = files.target(link)
    best = None if best_step is None else path_of(folder.parent, best_step)
    if best is not None and best.exists():
        if named != best.name:
            files.point(link, best.name)
        return True
    if named is None:
        return False
    is_later = (step_of(folder / named) or 0) > step
    if is_later or not (folder / named).exists():
        link.unlink()
        return False
    return True


def _make_newest(path: Path) -> None:
    """Makes a checkpoint newer than those of all runs, so that `--ckpt_path last` finds it.

    The clock alone does not ensure that: it may have been turned back, and a run may resume from an
    old checkpoint.
    """
    run = path.parent.parent
    latest = 0
    for folder in {run, *runs_below(run.parent)}:
        for other in checkpoints_of(folder):
            if other != path:
                latest = max(latest, modified(other))
    if latest >= modified(path):
        os.utime(path, ns=(latest + 1, latest + 1))


# ------------------------------------------------------------------ reading


def read(path: Path) -> Any:
    """Reads tensors and plain values, mapped from the file. It never runs code of the file.

    Raises:
        UserError: The file holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--ckpt_path {path} cannot be read as a checkpoint of lit_sft: {reason}"
        ) from error


def check(path: Path) -> None:
    """Checks that a checkpoint exists and is complete.

    Raises:
        UserError: It does not exist, or it is damaged.
    """
    if not path.exists():
        raise UserError(f"--ckpt_path {path}: there is no such checkpoint")
    if not is_intact(path):
        raise UserError(
            f"--ckpt_path {path} is damaged; use an earlier one, or --ckpt_path last to take the"
            " newest that is whole"
        )


def is_intact(path: Path) -> bool:
    """Whether a checkpoint is complete and unchanged.

    torch writes zip files: the directory at their end holds a checksum of every entry. The manifest
    of a sharded checkpoint lists all parts with their sizes.
    """
    try:
        if not path.is_dir():
            return _checksums_hold(path, modified(path), path.stat().st_size)
        sizes = json.loads((path / MANIFEST).read_text())["files"]
        parts = [path / name for name in sizes]
        return STATE in sizes and all(
            part.stat().st_size == sizes[part.name]
            and _checksums_hold(part, modified(part), sizes[part.name])
            for part in parts
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@lru_cache
def _checksums_hold(path: Path, modified: int, size: int) -> bool:
    """Whether the checksums of a zip file hold. The result is cached until the file changes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
