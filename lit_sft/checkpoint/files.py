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
from collections.abc import Iterator
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
STEP = r"step=\d{6,}\.ckpt"
"""Pattern of the name of a checkpoint."""
ZIP = b"PK"
"""First bytes of a zip file, which `torch.save` writes."""


def path_of(run_folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint of an optimizer step."""
    return run_folder / FOLDER / f"step={step:06d}.ckpt"


def step_of(path: Path) -> int:
    """Returns the optimizer step in the name of a checkpoint."""
    return int(path.stem.removeprefix("step="))


def aside(path: Path) -> Path:
    """Returns the temporary path that a checkpoint is written to, the same on all ranks."""
    return path.with_name(f".{path.name}.tmp")


# ------------------------------------------------------------------ listing


def runs_below(logs: Path) -> list[Path]:
    """Returns the folders `version_N`; copies and folders with other names are left out."""
    return [path for path in logs.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]


def own_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of `Checkpointer`, without those of a user's `ModelCheckpoint`."""
    named_alike = folder.glob("step=*.ckpt")
    return [path for path in named_alike if re.fullmatch(STEP, path.name)]


def latest_first(run: Path) -> list[Path]:
    """Returns the checkpoints of a run, sorted by step; the last one comes first.

    The step decides and not the time, because a copy of a folder may have lost the times of its
    files.
    """
    return sorted(own_checkpoints(run / FOLDER), key=step_of, reverse=True)


def has_later(run: Path, step: int) -> bool:
    """Whether a run has an intact checkpoint of a later step."""
    later = [path for path in own_checkpoints(run / FOLDER) if step_of(path) > step]
    return any(is_intact(path) for path in later)


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
    files.point(folder / LAST, path.name)
    if policy.is_best:
        files.point(folder / BEST, path.name)
    kept = {files.target(folder / name) for name in (LAST, BEST)}
    for other in latest_first(folder.parent)[policy.keep_last :]:
        if other.name not in kept:
            remove(other)
    # Remains of killed saves.
    for left in folder.glob(".step=*"):
        remove(left)


def restore_best(run: Path, best_step: int) -> bool:
    """Points `best.ckpt` of a resumed run at its best checkpoint so far.

    A run that was killed between two links has switched `last.ckpt` only.

    Args:
        run: The folder of the run.
        best_step: The step of the best checkpoint, as the checkpoint to resume from knows it.

    Returns:
        Whether the best checkpoint still exists.
    """
    best = path_of(run, best_step)
    if not best.exists():
        return False
    if files.target(best.with_name(BEST)) != best.name:
        files.point(best.with_name(BEST), best.name)
    return True


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
        UserError: It does not exist, is something else, or is damaged.
    """
    if not path.exists():
        raise UserError(f"--ckpt_path {path}: there is no such checkpoint")
    if not _looks_like_one(path):
        raise UserError(
            f"--ckpt_path {path} is no checkpoint: give a path such as"
            " lightning_logs/version_0/checkpoints/step=000010.ckpt, or the folder of a run"
        )
    if not is_intact(path):
        raise UserError(
            f"--ckpt_path {path} is damaged; use an earlier one, or --ckpt_path last to take the"
            " newest that is whole"
        )


def _looks_like_one(path: Path) -> bool:
    """Whether a path has the name or the beginning of a checkpoint, which may be damaged."""
    if re.fullmatch(STEP, path.name):
        return True
    if path.is_dir():
        return any(path.glob("*.pt"))
    with path.open("rb") as file:
        return file.read(2) == ZIP


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
