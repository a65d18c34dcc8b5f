"""A signal ends a run between two steps, whenever it comes; the next run ends with the same numbers
and weights.

Most runs are children of this process, forked after the imports, which take longer than the run;
the signals are real.
"""

import ctypes
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import (
    REPOSITORY,
    arguments,
    assert_same_run,
    call_at,
    chat_rows,
    environment,
    free_ports,
    run,
    version,
    write_rows,
)
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from lit_sft import ranks as ranks_module
from lit_sft import signals as run_signals

SETTINGS = {
    "data__packing": False,
    "data__global_batch_size": (
        8
    ),  # accumulation 8; 33 rows: 4 full steps and one of a single row, twice
    "data__val_size": 6,
    "data__num_workers": 1,
    "checkpoint__every_n_minutes": None,
    "trainer__max_epochs": 2,
    "model__evaluation": {"metrics": ["exact_match"]},
}
WITHIN = {"trainer__val_check_interval": 16}  # a validation after steps 2 and 4 of each epoch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(39))


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The folder of a run that nobody stopped; one for each set of options."""
    done = {}

    def get(**overrides):
        key = str(sorted(overrides.items()))
        if key not in done:
            done[key] = place[0] / f"whole_{len(done)}"
            run("fit", args(place, done[key], **overrides))
        return done[key]

    return get


def args(place, root, **overrides):
    return arguments(*place[1:], root, **{**SETTINGS, **overrides})


def start(place, root, *more, hook=None, step=None, nth=1, then=None, env=(), **overrides):
    """A run as `python -m lit_sft fit` would be.

    Args:
        place: Model and rows.
        root: Folder of the run.
        more: Arguments.
        hook: When callbacks get it for the nth time at a step (None: any), `then` is called; by
            default the run sends itself SIGTERM.
        env: Added to the environment.
    """

    def child():
        os.environ.update(env)
        sys.argv = ["lit_sft", "fit"]
        run_signals.install()
        if hook is not None:
            call_at(hook, step, nth, then or (lambda: os.kill(os.getpid(), signal.SIGTERM)))
        run("fit", [*args(place, root, **overrides), *more])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def code(process, timeout=300):
    process.join(timeout)
    return process.exitcode


def assert_same_export(root, expected):
    assert_same_run(root, expected)
    assert (version(root) / "hf" / "model.safetensors").is_file()


# ------------------------------------------------------------------ bit for bit

PLACES = {
    "within a window": ("on_train_batch_start", 3, 5, {}),
    "at the end of a step": ("on_train_batch_end", 4, 1, {}),
    "in the last step of an epoch": ("on_train_batch_start", 4, 1, {}),
    "in the validation": ("on_validation_batch_end", 5, 3, {}),
    "before the answers": ("on_validation_batch_end", 5, 6, {}),
    "between two epochs": ("on_train_epoch_start", 5, 1, {}),
    "before a validation within the epoch": ("on_train_batch_end", 2, 1, WITHIN),
    "in a validation within the epoch": ("on_validation_batch_end", 2, 2, WITHIN),
    "after a validation within the epoch": ("on_validation_end", 2, 1, WITHIN),
    "in an epoch that ends within a window": (
        "on_validation_batch_end",
        2,
        2,
        {"trainer__limit_train_batches": 12},
    ),
    "without a validation": ("on_train_batch_start", 4, 1, {"data__val_size": None}),
}


@pytest.mark.parametrize(("hook", "step", "nth", "options"), PLACES.values(), ids=PLACES)
def test_stopped(hook, step, nth, options, place, uninterrupted, tmp_path):
    root = tmp_path / "runs"
    assert (
        code(start(place, root, hook=hook, step=step, nth=nth, **options)) == 128 + signal.SIGTERM
    )
    assert code(start(place, root, "--ckpt_path=last", **options)) == 0
    assert_same_export(root, uninterrupted(**options))


def test_stopped_in_the_last_of_epochs_that_got_shorter(place, tmp_path):
    """What is left is counted from the position: steps that are still to come are not taken for an
    end.
    """
    root, options = tmp_path / "runs", {"trainer__max_epochs": 4}
    assert (
        code(start(place, root, hook="on_train_epoch_start", step=5, **options))
        == 128 + signal.SIGTERM
    )
    options |= {"trainer__limit_train_batches": 16}
    assert (
        code(start(place, root, "--ckpt_path=last", hook="on_train_batch_start", step=9, **options))
        == 143
    )
    assert os.readlink(version(root) / "checkpoints" / "last.ckpt") == "step=000010.ckpt"


def test_the_test_can_fail(place, uninterrupted, tmp_path, monkeypatch):
    """A save that is a step old is not the same run."""
    from lit_sft.callbacks.checkpointer import Checkpointer

    monkeypatch.setattr(Checkpointer, "save", lambda self, trainer: None)
    root = tmp_path / "runs"
    assert code(start(place, root, hook="on_train_batch_start", step=3)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    code(start(place, root, "--ckpt_path=last"))
    with pytest.raises(AssertionError):
        assert_same_export(root, uninterrupted())


# ------------------------------------------------------------------ any moment

SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && echo "$2" >> "$0.requeued"
exit 0
"""
BUSY = {
    "trainer__max_epochs": 4,
    "trainer__strategy": "ddp",
    "trainer__devices": 2,
    "trainer__val_check_interval": 4,  # after steps 2 and 4 of each epoch
    "data__micro_batch_size": 2,
}
INTERRUPTIONS = 6


@pytest.mark.slow
def test_two_ranks_under_fire(tmp_path):
    """Two ranks whose steps are all computation, with accumulation, workers and validations, get
    signals at random times, two of them close together and never at the same moment on both;
    requeued each time, and started again.
    """
    model = save_tiny(
        tmp_path / "model", tiny_llama(len(tiny_tokenizer()), hidden_size=128, num_hidden_layers=2)
    )
    place = tmp_path, model, write_rows(tmp_path / "train.jsonl", chat_rows(39))
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    random.seed(0)
    assert _life(place, tmp_path / "whole", 0, signals=False) == [0, 0]
    root, lives = tmp_path / "runs", 0
    while not (version(root) / "hf" / "model.safetensors").exists():
        assert _life(place, root, lives, signals=lives < INTERRUPTIONS) == [0, 0]
        lives += 1
        assert lives <= INTERRUPTIONS + 1
    requeued = (tmp_path / "scontrol.requeued").read_text().split()
    assert len(requeued) >= 2 and set(requeued) == {
        "4242"
    }  # a fast machine may finish before the last signal
    assert_same_export(root, tmp_path / "whole")


def _life(place, root, restarts, signals):
    """One start of a job with two tasks; the exit codes of both."""
    ready = [multiprocessing.get_context("fork").Event() for _ in range(2)]
    job = {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_RESTART_COUNT": str(restarts),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "PATH": f"{place[0]}:{os.environ['PATH']}",
    }
    ranks = [
        start(
            place, root, hook="on_train_batch_start", then=ready[rank].set,
            env={**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}, **BUSY,
        )
        for rank in range(2)
    ]  # fmt: skip
    if signals:
        while not all(event.is_set() for event in ready) and all(
            rank.exitcode is None for rank in ranks
        ):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        for _ in range(2):
            for rank in random.sample(ranks, 2):
                if rank.exitcode is None:
                    os.kill(rank.pid, signal.SIGUSR1)
                time.sleep(random.uniform(0, 0.03))
    return [code(rank) for rank in ranks]


# ------------------------------------------------------------------ what it says


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_exit_code_and_advice(number, place, tmp_path, capfd):
    process = start(
        place,
        tmp_path / "runs",
        hook="on_train_batch_start",
        step=3,
        then=lambda: os.kill(os.getpid(), number),
    )
    assert code(process) == 128 + number
    err = capfd.readouterr().err
    assert f"stopped by {number.name} after step 4, which is saved" in err
    assert "--ckpt_path last" in err and "Traceback" not in err
    assert (version(tmp_path / "runs") / "checkpoints" / "step=000004.ckpt").is_file()


def test_the_second_ctrl_c_ends_it_at_once(place, tmp_path, capfd):
    """Also where the program waits in a library forever, and Python calls no handler. A Ctrl-C that
    a program in between passes on once more is not a second one.
    """

    def hang():
        libc, lock = ctypes.CDLL(None), (ctypes.c_char * 64)()
        (tmp_path / "hangs").touch()
        for _ in range(2):  # locked by itself
            libc.pthread_mutex_lock(lock)

    process = start(place, tmp_path / "runs", hook="on_train_batch_start", step=2, then=hang)
    while not (tmp_path / "hangs").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    for wait in (0.1, 1):
        os.kill(process.pid, signal.SIGINT)
        process.join(wait)
        assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    assert code(process, timeout=5) == 128 + signal.SIGINT
    assert "stopped at once" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_there_is_nothing_to_save(number, place, tmp_path, capfd):
    process = start(
        place, tmp_path / "runs", hook="setup", then=lambda: os.kill(os.getpid(), number)
    )
    assert code(process) == 128 + number
    err = capfd.readouterr().err
    assert (
        f"stopped by {number.name}" in err and "nothing to save" in err and "Traceback" not in err
    )


# ------------------------------------------------------------------ a rank is gone

LAUNCHERS = {
    "lightning": [sys.executable, "-m"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port={port}",
        "-m",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank"), [("lightning", 0), ("lightning", 1), ("torchrun", 1)]
)
def test_a_killed_rank_ends_the_run(launcher, rank, place, tmp_path):
    """The others are not waiting in a collective, which would fail, but computing."""
    says = tmp_path / "held"
    hold = {"class_path": "cluster.Hold", "init_args": {"step": 2, "says": str(says)}}
    command = [part.format(port=free_ports(1)[0]) for part in LAUNCHERS[launcher]]
    options = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [
            *command,
            "lit_sft",
            "fit",
            *args(place, tmp_path / "runs", **options),
            f"--trainer.callbacks={[hold]}",
        ],
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}"),
        stdout=log,
        stderr=log,
    )
    files = [Path(f"{says}.{number}") for number in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in files]
    os.kill(pids[rank], signal.SIGKILL)
    assert process.wait(55) != 0
    killed = time.monotonic()
    while (
        Path(f"/proc/{pids[1 - rank]}/cmdline").exists()
        and Path(f"/proc/{pids[1 - rank]}/cmdline").read_bytes()
    ):
        assert time.monotonic() - killed < 10
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"SLURM_PROCID": "5", "LOCAL_RANK": "1"}, 5),
        (
            {"SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0", "LOCAL_RANK": "1"},
            1,
        ),  # Lightning's second rank, in a shell
        ({"SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "0"}, 0),
        ({"NODE_RANK": "1"}, 1),
    ],
    ids=str,
)
def test_a_rank_before_there_are_processes(variables, rank, monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "SLURM_JOB_NAME", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks_module.global_rank() == rank
