"""Two jobs that resume in one folder at the same time: the second ends in one line and changes
nothing. Jobs are processes, which are killed for real.
"""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from running import (
    REPOSITORY,
    arguments,
    call_at,
    chat_rows,
    environment,
    final_weights,
    run,
    version,
    write_rows,
)
from terminal import log_lines, refused
from tiny import save_tiny

from lit_sft.errors import UserError
from lit_sft.run import lock as run_lock

FORK = multiprocessing.get_context("fork")
SETTINGS = {
    "data__packing": False,
    "data__global_batch_size": 4,
    "checkpoint__every_n_train_steps": 1,
}


def until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def children():
    """Starts a function in a child; all are killed at the end."""
    started = []

    def start(function, *args):
        started.append(FORK.Process(target=function, args=args))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


# ------------------------------------------------------------------ the lock


def hold(folder, job, ready):
    run_lock.hold(folder, job)
    ready.touch()
    time.sleep(600)


@pytest.fixture
def held(tmp_path, children):
    """A folder that a child holds, as job 7."""
    folder, ready = tmp_path / "run", tmp_path / "ready"
    folder.mkdir()
    process = children(hold, folder, "7", ready)
    until(ready.exists)
    return folder, process


@pytest.mark.parametrize("job", [None, "8"])
def test_the_holder_is_named_and_its_lock_ends_with_it(held, job):
    folder, process = held
    with pytest.raises(UserError) as refusal:
        run_lock.hold(folder, job)
    said = str(refusal.value)
    assert (
        f"(process {process.pid} on {socket.gethostname()}, SLURM job 7, since 2" in said
        and str(folder) in said
    )
    kill(process)
    run_lock.hold(folder, job)
    run_lock.hold(folder, job)  # it is ours
    assert json.loads((folder / run_lock.LOCK).read_text())["pid"] == os.getpid()
    run_lock.release(folder)
    run_lock.release(folder)


def test_a_released_lock_is_free(tmp_path, children):
    run_lock.hold(tmp_path)
    run_lock.release(tmp_path)
    children(hold, tmp_path, None, tmp_path / "ready")
    until((tmp_path / "ready").exists)


def test_a_requeued_job_waits_for_its_earlier_start(held, caplog):
    caplog.set_level(logging.INFO, logger="lit_sft")
    folder, process = held
    threading.Timer(1.0, os.kill, (process.pid, signal.SIGKILL)).start()
    with log_lines() as lines:
        run_lock.hold(folder, "7")
    assert lines == [f"{folder}: waiting for the earlier start of job 7 to end"]
    run_lock.release(folder)


def test_it_does_not_wait_forever(held, monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.5)
    with log_lines(), pytest.raises(UserError, match="another run trains in"):
        run_lock.hold(held[0], "7")


def test_a_child_of_the_holder_does_not_keep_it(tmp_path, children):
    """A data worker that outlives its parent for some seconds."""

    def parent():
        run_lock.hold(tmp_path)
        pid = os.fork()
        if pid:
            (tmp_path / "ready.tmp").write_text(str(pid))
            os.rename(tmp_path / "ready.tmp", tmp_path / "ready")
        time.sleep(600)

    process = children(parent)
    until((tmp_path / "ready").exists)
    worker = int((tmp_path / "ready").read_text())
    try:
        kill(process)
        os.kill(worker, 0)  # it lives
        run_lock.hold(tmp_path)
        run_lock.release(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(number, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with log_lines() as lines:
        run_lock.hold(tmp_path)
    assert lines == [
        f"{tmp_path} cannot be locked ({os.strerror(number)}): do not resume it twice at a time"
    ]


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locking")
    return save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(24))


def args(place, root, **overrides):
    return arguments(*place, root, **{**SETTINGS, **overrides})


def fit_until_step_3(place, root, ready):
    """A run that hangs in its fourth step."""

    def hang():
        ready.touch()
        time.sleep(600)

    call_at("on_train_batch_start", 3, 1, hang)
    run("fit", args(place, root))


@pytest.fixture
def running(place, tmp_path, children):
    """The root of a run that trains in another process, and that process."""
    process = children(fit_until_step_3, place, tmp_path / "runs", tmp_path / "ready")
    until((tmp_path / "ready").exists)
    return tmp_path / "runs", process


def files(root):
    """All below it, with what would tell a change."""
    found = {path: path.lstat() for path in root.rglob("*")}
    return {
        path: (status.st_mtime_ns, status.st_size, status.st_ino) for path, status in found.items()
    }


def test_the_second_of_two_runs_ends_and_changes_nothing(place, running, tmp_path, capsys):
    root, process = running
    before = files(root)
    last = [*args(place, root, data__global_batch_size=4), "--ckpt_path=last"]
    for _ in range(2):
        line = refused(capsys, "fit", last)
        assert line.startswith(
            f"another run trains in {version(root)} (process {process.pid} on"
            f" {socket.gethostname()}"
        )
    assert files(root) == before
    kill(process)
    run("fit", last)
    run("fit", args(place, tmp_path / "whole"))
    weights, others = final_weights(root), final_weights(tmp_path / "whole")
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_evaluation_beside_a_run_is_free(place, running):
    run("predict", [*args(place, running[0], data__predict=["abc"]), "--ckpt_path=last"])


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2")


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "strategy"), [((), "ddp"), (TORCHRUN, "fsdp2")])
def test_all_ranks_end(launcher, strategy, place, running):
    """In a minute, with one line, whoever started them."""
    root, process = running
    before = files(root)
    settings = args(place, root, trainer__devices=2, trainer__strategy=strategy)
    command = [sys.executable, *launcher, "-m", "lit_sft", "fit", *settings, "--ckpt_path=last"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1, done.stderr[-3000:]
    assert errors[0].startswith(
        f"error: another run trains in {version(root)} (process {process.pid} on "
    )
    assert "resumed " not in done.stderr
    assert files(root) == before
