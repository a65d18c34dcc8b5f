"""Signals become a flag, from the first line of the program on; the training loop acts on it
between two steps.

Only the standard library is imported here: a signal that comes while torch is being imported finds
the handler. Ctrl-C, SIGTERM (`kill`, Kubernetes, SLURM's preemption and time limit) and SIGUSR1
(SLURM's `--signal`) are taken.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from threading import Thread
from types import FrameType
from typing import NoReturn

from lit_sft.ranks import global_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""By urgency: where ranks got different ones, the last of them counts."""
ONE_PRESS = 0.5
"""Seconds within which a second Ctrl-C is the first one again, passed on by a program in
between.
"""
LAUNCHER = "LIT_SFT_LAUNCHER"
"""Holds the process id of the rank that started this one, if Lightning's launcher did."""

_pid = 0
_received = 0
_training = False


def install() -> None:
    """Takes the signals, for this process but not for those it forks; calling it again takes them
    back.
    """
    global _pid
    if not _pid:
        _pid = os.getpid()
        inbox, outbox = os.pipe()
        os.set_blocking(outbox, False)
        signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_leave_to_parent)
        Thread(target=_watch, args=(inbox, _launcher()), daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, _note)


def installed() -> bool:
    """Whether this process was started by our command line, and not by a notebook or a test."""
    return _pid == os.getpid()


def received() -> int:
    """0, or 1 + the place in `SIGNALS` of the most urgent signal so far."""
    return _received


def wait(for_training: bool) -> None:
    """Whether signals wait for the training loop, which looks at the flag; else they end the
    program.
    """
    global _training
    _training = for_training


def say(text: str) -> None:
    """One line on stderr; unlike `print` it may interrupt another one. Only global rank 0
    speaks.
    """
    if global_rank() == 0:
        os.write(2, f"{text}\n".encode())


def shield_worker(worker_id: int = 0) -> None:
    """Makes a data worker deaf to signals, except to its parent's: SLURM and Ctrl-C reach all
    processes at once, and a run whose workers died first cannot be saved.
    """
    _leave_to_parent()
    Thread(target=_end_with_parents_word, daemon=True).start()


# ------------------------------------------------------------------ the inside


def _note(number: int, frame: FrameType | None) -> None:
    """The handler. Nothing is saved here, in the middle of anything."""
    global _received
    if os.getpid() != _pid:
        # A process that has just been forked.
        return
    _received = max(_received, 1 + SIGNALS.index(signal.Signals(number)))
    if _waits(number):
        return
    say(f"stopped by {signal.Signals(number).name} while not training: there is nothing to save")
    sys.exit(128 + number)


def _waits(number: int) -> bool:
    """Whether a signal waits for the training loop. In a SLURM job it does so before training, too:
    a job that ended now would count as failed, and not be requeued.
    """
    in_job = "SLURM_JOB_ID" in os.environ and number != signal.SIGINT
    return _training or (in_job and (sys.argv[1:2] == ["fit"] or number == signal.SIGUSR1))


def _launcher() -> int | None:
    """The parent without which a rank has no business: Lightning's first rank, or torchrun."""
    parent = os.getppid()
    started_us = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(LAUNCHER) == str(parent)
    os.environ[LAUNCHER] = str(os.getpid())
    return parent if started_us else None


def _watch(inbox: int, launcher: int | None) -> NoReturn:
    """A thread: it runs also while the main one waits in a collective for a rank that is gone,
    where Python calls no handler. Ends the process on the second Ctrl-C, or when its launcher was
    killed.
    """
    first = float("inf")
    while True:
        readable, _, _ = select.select([inbox], [], [], None if launcher is None else 1.0)
        if launcher is not None and os.getppid() != launcher:
            os._exit(1)
        now = time.monotonic()
        for number in os.read(inbox, 64) if readable else b"":
            if number == signal.SIGINT and now - first > ONE_PRESS:
                say("stopped at once")
                os._exit(128 + number)
            if number == signal.SIGINT:
                first = min(first, now)


def _leave_to_parent() -> None:
    # Inherited: the parent would count a child's signals as its own.
    signal.set_wakeup_fd(-1)
    # A mask, as torch sets its own handlers in data workers.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _end_with_parents_word() -> None:
    parent = os.getppid()
    while True:
        info = signal.sigwaitinfo(SIGNALS)
        if info.si_signo == signal.SIGTERM and info.si_pid == parent:
            os._exit(0)
