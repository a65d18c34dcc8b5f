"""What a command has made in the folder of a run, removed if it ends before its first step.

The state belongs to the process, as that of the lock does. Only rank 0 makes folders.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lit_sft.run import lock
from lit_sft.run.slurm import JOB_FILE

CONFIG = "config.yaml"
OF_A_START = (CONFIG, JOB_FILE, lock.LOCK)
"""Files that say how a run was started. They are worth nothing without a step."""

_made: list[Path] = []
"""Folders that this process has made, outer ones first."""
_before: dict[Path, frozenset[str]] = {}
"""Folder of a run -> names in it when this process began to use it."""


def make_folder(folder: Path) -> None:
    """Makes the folder of a run; its parents must exist.

    Raises:
        FileExistsError: There is one.
    """
    folder.mkdir()
    _made.append(folder)
    _before[folder] = frozenset()


def make_parents(folder: Path) -> None:
    """Makes a folder for runs, and those above it, if they do not exist."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _made.extend(reversed(missing))


def use_folder(folder: Path) -> None:
    """Notes what is in the folder of a run that is continued or evaluated."""
    _before[folder] = frozenset(path.name for path in folder.iterdir())


def keep() -> None:
    """Keeps everything: a step was made, or the command has succeeded."""
    _made.clear()
    _before.clear()


def remove() -> None:
    """Removes what this process has made, unless it holds something worth keeping.

    Answers, metrics and checkpoints are. A folder that existed before only loses events files
    without events that this process has opened in it.
    """
    for folder, before in _before.items():
        _clear(folder, before)
    for folder in reversed(_made):
        # A folder that another command uses by now is not empty.
        with suppress(OSError):
            folder.rmdir()
    keep()


def _clear(folder: Path, before: frozenset[str]) -> None:
    """Removes the files of a start from the folder of a run.

    Args:
        folder: The folder.
        before: Names in it when this process began to use it.
    """
    if not folder.is_dir():
        return
    new = [path for path in folder.iterdir() if path.name not in before]
    empty = [path for path in new if _is_empty_events_file(path)]
    of_a_start: list[Path] = []
    if folder in _made:
        of_a_start = [path for path in new if path.name in OF_A_START]
        if len(empty) + len(of_a_start) < len(new):
            return
    for path in (*empty, *of_a_start):
        # Without permission to remove a file, it stays.
        with suppress(OSError):
            path.unlink()
    if folder in _made:
        lock.release(folder)


def _is_empty_events_file(path: Path) -> bool:
    """Whether TensorBoard has written nothing but the version of its format into this file."""
    if not path.name.startswith("events.out.tfevents."):
        return False
    # Imported here, because only a start that has failed needs it.
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return all(event.HasField("file_version") for event in EventFileLoader(str(path)).Load())
