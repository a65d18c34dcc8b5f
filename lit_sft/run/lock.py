"""The lock on the folder of a run, so that two processes never train in one folder.

The lock is `flock` on a file in the folder. The kernel drops it when the process ends, even after
SIGKILL. Windows has no `flock`: there a run goes on without a lock, with one warning.

The library `filelock` is not used: before version 4 it empties the file when it opens it, and the
file names the holder.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from lit_sft.errors import UserError

try:
    import fcntl
except ImportError:
    # On Windows.
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the locked file in the folder of a run; it holds who trains there. It is never removed,
because another job may just be opening it.
"""
WAIT_SECONDS = 180.0
"""How long a requeued SLURM job waits for the lock of its own earlier start.

The earlier start has ended by then. But on NFSv4 the locks of a node that died last until the
server's lease expires, by default after 90 seconds.
"""
POLL_SECONDS = 1.0

_held: dict[Path, int] = {}
"""File descriptors of the locks that this process holds."""


def hold(folder: Path, job: str | None = None) -> None:
    """Locks the folder of a run for this process, unless it holds the lock already.

    `flock` also works over NFSv4 on Linux, and over Lustre if it is mounted with the option
    `flock`. On a file system without locks the run goes on without one, with a warning.

    Args:
        folder: The folder of the run.
        job: Id of the SLURM job that this process belongs to.

    Raises:
        UserError: Another process holds the lock.
    """
    if fcntl is None:
        log.warning(
            "%s cannot be locked (no file locks on this system): do not resume it twice at a time",
            folder,
        )
        return
    path = folder.resolve() / LOCK
    if path in _held:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(descriptor, folder, job)
    except UserError:
        os.close(descriptor)
        raise
    except OSError as error:
        os.close(descriptor)
        log.warning(
            "%s cannot be locked (%s): do not resume it twice at a time", folder, error.strerror
        )
        return
    _held[path] = descriptor
    _write(descriptor, job)


def _acquire(descriptor: int, folder: Path, job: str | None) -> None:
    """Takes the lock, and waits for it if the holder is an earlier start of the same SLURM job.

    Raises:
        UserError: Another process holds the lock.
        OSError: The file system has no locks.
    """
    deadline = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _read(descriptor)
        if job is None or holder.get("job") != job:
            raise _in_use(folder, holder)
        if deadline is None:
            log.info("%s: waiting for the earlier start of job %s to end", folder, job)
            deadline = time.monotonic() + WAIT_SECONDS
        elif time.monotonic() > deadline:
            raise _in_use(folder, holder)
        time.sleep(POLL_SECONDS)


def is_held(folder: Path) -> bool:
    """Whether another process trains in a folder."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder.resolve() / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # There is no lock file, or it belongs to another user.
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return folder.resolve() / LOCK not in _held
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def release(folder: Path) -> None:
    """Unlocks the folder of a run, if this process holds the lock."""
    descriptor = _held.pop(folder.resolve() / LOCK, None)
    if descriptor is not None:
        os.close(descriptor)


def _write(descriptor: int, job: str | None) -> None:
    """Writes into the lock file which process holds it."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": now}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{json.dumps(holder)}\n".encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    """Returns who holds the lock; empty if the holder has not written it yet."""
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return {}


def _in_use(folder: Path, holder: dict[str, Any]) -> UserError:
    """Returns the error that names the holder of the lock."""
    who = "another process"
    if holder:
        job = f", SLURM job {holder['job']}" if holder.get("job") else ""
        who = (
            f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
        )
    return UserError(
        f"another run trains in {folder} ({who}): wait until it ends or stop it, or leave out"
        " --ckpt_path for a new run"
    )


def _leave_to_parent() -> None:
    """Closes the locks in a forked child, such as a data worker.

    The child would otherwise keep the lock when its parent is killed.
    """
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_parent)
