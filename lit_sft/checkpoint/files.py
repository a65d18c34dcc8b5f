"""Checkpoints on disk: a file, or a directory of parts and a manifest. Their names, how they are
written, and which are kept.
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


# ------------------------------------------------------------------ listing


def runs_below(logs: Path) -> list[Path]:
    """Folders with the names that runs get, and not what somebody has copied or renamed."""
    return [path for path in logs.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, and one of the user's if the run went back to that."""
    ours = [path for path in own_checkpoints(run / FOLDER) if not path.is_symlink()]
    last = last_of(run)
    if last is None or last in ours or not last.exists():
        return ours
    return [*ours, last]


def last_of(run: Path) -> Path | None:
    """The checkpoint that the link `last.ckpt` of a run names, whether it exists or not."""
    name = files.target(run / FOLDER / LAST)
    return None if name is None else Path(os.path.normpath(run / FOLDER / name))


def own_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that we have written into a folder, and not those of a `ModelCheckpoint` of the
    user's.
    """
    return [
        path for path in folder.glob("step=*.ckpt") if re.fullmatch(r"step=\d{6,}\.ckpt", path.name)
    ]


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sorts by time; of equal times by name."""
    return sorted(paths, key=lambda path: (modified(path), path.name), reverse=True)


def modified(path: Path) -> int:
    """Time of the last change in nanoseconds; 0 if the file is gone, as another run may remove one
    at any time.
    """
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------ writing


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
    except RuntimeError as error:
        # Torch's writer reports a full disk this way.
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise _not_written(path, "is the disk full?") from error


def _not_written(path: Path, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {path} could not be written ({reason}); earlier ones are untouched"
    )


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
    """Makes room for a checkpoint that is written aside.

    Parts that a killed save has left are removed, so that none is taken for a part of this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_folder:
        remove(aside(path))
        aside(path).mkdir()


def put_in_place(path: Path) -> None:
    """Gives what was written aside its name. What bears that name already, from a run that went
    another way, goes.
    """
    if aside(path).is_dir():
        write_manifest(aside(path))
    if path.is_dir() or path.exists() and aside(path).is_dir():
        # Only a file can be replaced in one step.
        remove(path)
    os.replace(aside(path), path)
    files.sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a file or a directory; of a directory that is killed half-way no part bears the old
    name.
    """
    if path.is_dir() and not path.is_symlink():
        # A name that `keep` clears away.
        doomed = path.with_name(f".{path.name.removeprefix('.')}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(FileNotFoundError):
            # Another rank was faster.
            os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------ keeping


@dataclass(frozen=True)
class KeepPolicy:
    """What becomes of the other checkpoints of a run when one is complete."""

    is_best: bool
    """Whether the new checkpoint is the best so far."""
    keep_last: int
    """Newest checkpoints that are kept, besides the best."""


def keep(path: Path, policy: KeepPolicy) -> None:
    """Points the links to a checkpoint that is complete, then removes those that are no longer
    kept.
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
    # What is left of saves that were killed, and checkpoints that were set aside when the run went
    # back.
    for left in folder.glob(".step=*"):
        remove(left)


def go_back(path: Path, step: int, best_step: int | None) -> bool:
    """Points last.ckpt at the checkpoint that a run resumes from.

    Otherwise a crash before the next save would resume the abandoned branch. Later checkpoints are
    set aside until that save is complete. If this is killed half-way, the next start does the rest.

    Args:
        path: The checkpoint.
        step: Its step.
        best_step: Step of the best by then. Whether `best.ckpt` names that now is returned; else
            there is none.
    """
    folder = path.parent.parent / FOLDER
    with reported(path):
        if path.name not in (LAST, BEST) and last_of(path.parent.parent) != path:
            files.point(folder / LAST, os.path.relpath(path, folder))
        with suppress(PermissionError):
            # Another user's.
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
    """Points `best.ckpt` to the best checkpoint by then, or removes it. Whether it names that is
    returned.
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
    """Makes a checkpoint newer than all others of all runs, also where the clock was turned back
    meanwhile.
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
    """Tensors and plain values, mapped from the file; never runs code.

    Raises:
        UserError: It holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--ckpt_path {path} cannot be read as a checkpoint of lit_sft: {reason}"
        ) from error


def check(path: Path) -> None:
    """Refuses a checkpoint that is not there or not complete.

    Raises:
        UserError: See above.
    """
    if not path.exists():
        raise UserError(f"--ckpt_path {path}: there is no such checkpoint")
    if not is_intact(path):
        raise UserError(
            f"--ckpt_path {path} is damaged; use an earlier one, or --ckpt_path last to take the"
            " newest that is whole"
        )


def is_intact(path: Path) -> bool:
    """Whether a checkpoint is complete and unchanged: torch writes zip files, whose directory is at
    the end and names all checksums; the manifest of a sharded one names all parts and their sizes.
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
    """Of one zip file, read once in a process as long as it does not change."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
