"""One folder, one run: a lock on a file in it, which vanishes with the process that holds it,
however that ends.
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
    # Windows.
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK = ".lock"
"""In the folder of a run: locked while it trains; tells who does. Never removed: another job may be
opening it.
"""
WAIT_SECONDS = 180.0
"""How long a SLURM job waits for its own earlier start. That has ended when SLURM starts it again;
but a node that died keeps its locks on NFSv4 until the server's lease is over, a minute and a half
by default.
"""
POLL_SECONDS = 1.0

_held: dict[Path, int] = {}
"""Descriptors of this process's locks."""


def hold(folder: Path, job: str | None = None) -> None:
    """Locks the folder of a run for this process; once more does nothing.

    `flock` is kept by Linux also over NFSv4, and over Lustre where it is mounted with `flock`.
    Where a file system has no locks, the run goes on without one, and says so.

    Args:
        folder: Of the run.
        job: Id of the SLURM job that this process belongs to.

    Raises:
        UserError: Another process holds it.
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
    deadline = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _read(descriptor)
            if (
                job is None
                or holder.get("job") != job
                or time.monotonic() > (deadline or float("inf"))
            ):
                os.close(descriptor)
                raise _in_use(folder, holder) from None
            if deadline is None:
                log.info("%s: waiting for the earlier start of job %s to end", folder, job)
                deadline = time.monotonic() + WAIT_SECONDS
            time.sleep(POLL_SECONDS)
        except OSError as error:
            os.close(descriptor)
            log.warning(
                "%s cannot be locked (%s): do not resume it twice at a time", folder, error.strerror
            )
            return
    _held[path] = descriptor
    _write(descriptor, job)


def is_held(folder: Path) -> bool:
    """Whether another process trains in it."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder.resolve() / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # None was made, or it is not ours to touch.
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
    """Unlocks the folder of a run, if this process holds it."""
    descriptor = _held.pop(folder.resolve() / LOCK, None)
    if descriptor is not None:
        os.close(descriptor)


def _write(descriptor: int, job: str | None) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": now}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{json.dumps(holder)}\n".encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    """Who holds it; empty in the instant before that is written."""
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return {}


def _in_use(folder: Path, holder: dict[str, Any]) -> UserError:
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
    """A forked child, such as a data worker, would keep the lock of a parent that was killed."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_parent)
