"""Signal handlers that set a flag, which the training loop reads between two optimizer steps.

Handled are Ctrl-C (SIGINT), SIGTERM (`kill`, Kubernetes, SLURM's preemption and time limit) and
SIGUSR1 (SLURM's `--signal`). Only the standard library is imported here, so that the handlers are
installed before the slow import of torch.

Windows has neither SIGUSR1 nor forks, and cannot wait for a pipe: there Ctrl-C and SIGTERM are
handled, and nothing watches for a second Ctrl-C or a launcher that was killed.
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

IS_WINDOWS = sys.platform == "win32"
SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
"""In order of urgency: if ranks receive different signals, the last one in this list counts."""
if sys.platform != "win32":
    SIGNALS = (*SIGNALS, signal.SIGUSR1)
ONE_PRESS = 0.5
"""Seconds within which a second SIGINT counts as the same Ctrl-C. A launcher between the terminal
and this process passes on the one that the process has received already.
"""
LAUNCHER = "LIT_SFT_LAUNCHER"
"""Environment variable in which each process passes its process id to the ranks that it starts. A
rank that Lightning has launched finds its parent's id there.
"""

_pid = 0
_received = 0
_training = False


def install() -> None:
    """Installs the signal handlers in this process, but not in processes that it forks.

    A further call installs them again, after a library has replaced them.
    """
    global _pid
    if not _pid:
        _pid = os.getpid()
        if not IS_WINDOWS:
            _start_watching()
    for number in SIGNALS:
        signal.signal(number, _note)


def _start_watching() -> None:
    """Starts the thread that watches for a second Ctrl-C and for the end of the launcher."""
    inbox, outbox = os.pipe()
    os.set_blocking(outbox, False)
    signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_leave_to_parent)
    Thread(target=_watch, args=(inbox, _launcher()), daemon=True).start()


def installed() -> bool:
    """Whether our command line started this process, and not a notebook or a test."""
    return _pid == os.getpid()


def received() -> int:
    """Returns 1 + the index in `SIGNALS` of the most urgent signal so far; 0 if there is none."""
    return _received


def wait(for_training: bool) -> None:
    """Sets whether signals wait for the training loop, or end the program at once.

    Args:
        for_training: Whether the training loop runs and reads the flag.
    """
    global _training
    _training = for_training


def say(text: str) -> None:
    """Writes one line to stderr, on global rank 0 only.

    Unlike `print`, it is safe in a signal handler that interrupts another `print`.
    """
    if global_rank() == 0:
        os.write(2, f"{text}\n".encode())


def shield_worker(worker_id: int = 0) -> None:
    """Makes a data worker ignore all signals but its parent's SIGTERM.

    SLURM and Ctrl-C signal all processes at once. If the workers ended first, the run could not
    finish its step and save.
    """
    if IS_WINDOWS:
        # There is no SIGTERM of the parent to wait for: it ends its workers directly.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    _leave_to_parent()
    Thread(target=_end_with_parents_word, daemon=True).start()


# ------------------------------------------------------------------ handlers


def _note(number: int, frame: FrameType | None) -> None:
    """Handles a signal: sets the flag, and ends the program unless it is training.

    Nothing is saved here, because a signal may interrupt an optimizer step.
    """
    global _received
    if os.getpid() != _pid:
        # A forked child has the handler until it blocks the signals.
        return
    _received = max(_received, 1 + SIGNALS.index(signal.Signals(number)))
    if _waits(number):
        return
    say(f"stopped by {signal.Signals(number).name} while not training: there is nothing to save")
    sys.exit(128 + number)


def _waits(number: int) -> bool:
    """Whether a signal waits for the training loop.

    In a SLURM job it also waits before training starts: a job that ended now would count as failed
    and would not be requeued.
    """
    in_job = "SLURM_JOB_ID" in os.environ and number != signal.SIGINT
    is_from_sbatch = signal.Signals(number).name == "SIGUSR1"
    return _training or (in_job and (sys.argv[1:2] == ["fit"] or is_from_sbatch))


def _launcher() -> int | None:
    """Returns the process id of the launcher (Lightning's rank 0 or torchrun), or None.

    A rank ends when its launcher is gone.
    """
    parent = os.getppid()
    started_us = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(LAUNCHER) == str(parent)
    os.environ[LAUNCHER] = str(os.getpid())
    return parent if started_us else None


def _watch(inbox: int, launcher: int | None) -> NoReturn:
    """Ends the process on the second Ctrl-C, or when its launcher was killed.

    This is a thread, because Python calls no signal handler while the main thread waits in a
    collective.
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
    """Blocks the signals in a forked child."""
    # The inherited pipe would report the child's signals to the parent.
    signal.set_wakeup_fd(-1)
    # Blocked instead of handled, because torch installs its own handlers in data workers.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _end_with_parents_word() -> None:
    """Ends this data worker when its parent sends SIGTERM."""
    parent = os.getppid()
    while True:
        info = signal.sigwaitinfo(SIGNALS)
        if info.si_signo == signal.SIGTERM and info.si_pid == parent:
            os._exit(0)
