"""A run that goes on from another checkpoint than its newest; and which checkpoint, run and job
belong together.
"""

import csv
import functools
import multiprocessing
import os
import shutil
import signal
import sys

import pytest
import torch
from running import (
    arguments,
    call_at,
    chat_rows,
    free_ports,
    run,
    scalars,
    version,
    write_rows,
)
from terminal import log_lines
from tiny import save_tiny

from lit_sft import files
from lit_sft.checkpoint.files import latest_first, step_of
from lit_sft.checkpoint.io import read_checkpoint

FORK = multiprocessing.get_context("fork")
TEN_STEPS = {
    "data__packing": False,
    "data__global_batch_size": 4,
    "data__val_size": 4,
    "trainer__max_epochs": 2,
    "trainer__val_check_interval": 8,  # after steps 2 and 4 of each epoch
    "model__optimizer__lr": 1e-2,
    "checkpoint__every_n_train_steps": 1,
    "checkpoint__keep_last": 20,
}
SELDOM = {"checkpoint__every_n_train_steps": None}
JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "x",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_NODELIST": "localhost",
    "MASTER_ADDR": "127.0.0.1",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, rows, and a run that has ended."""
    folder = tmp_path_factory.mktemp("back")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", chat_rows(24))
    run("fit", settings(folder, folder / "runs"))
    return folder


@pytest.fixture
def root(place, tmp_path):
    shutil.copytree(place / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def settings(place, root, **options):
    return arguments(
        str(place / "model"), str(place / "train.jsonl"), root, **{**TEN_STEPS, **options}
    )


def back(root, name):
    return f"--ckpt_path={version(root) / 'checkpoints' / name}"


def links(root):
    folder = version(root) / "checkpoints"
    return {
        name: os.readlink(folder / f"{name}.ckpt")
        for name in ("last", "best")
        if (folder / f"{name}.ckpt").exists()
    }


def folder_of(root, number=0):
    return version(root, number) / "checkpoints"


def steps(root, number=0):
    return sorted(step_of(path) for path in latest_first(version(root, number)))


def contents(root):
    texts = [(version(root) / name).read_text() for name in ("config.yaml", "metrics.csv")]
    return texts, links(root), steps(root)


def in_a_job(args, output, **more):
    """Runs `fit` in a child that is a SLURM job; its exit code and what it said."""
    process = FORK.Process(target=_fit_in_a_job, args=(args, output, {**JOB, **more}))
    process.start()
    process.join(120)
    return process.exitcode, output.read_text()


def _fit_in_a_job(args, output, variables):
    sys.stderr = output.open("w", buffering=1)
    kill_at = variables.pop("KILL_AT", None)
    os.environ.update(variables)
    if kill_at:
        kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        call_at("on_train_batch_start", int(kill_at), 1, kill)
    run("fit", args)


# ------------------------------------------------------------------ going back


def files_of(folder):
    """Path -> time and content of each file; the lock is opened, but stays as it is."""
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_earlier_checkpoint_begins_a_new_folder(place, root):
    """With the same steps, for nothing else has changed; the folder of its run stays as it is."""
    before = files_of(version(root))
    with log_lines() as lines:
        run("fit", [*settings(place, root), back(root, "step=000003.ckpt")])
    said = f"{version(root)}: it has a checkpoint after step 3; this run writes into"
    assert lines.count(f"{said} {version(root, 1)}") == 1
    assert any(line.endswith("step=000003.ckpt at step 3") for line in lines)
    assert files_of(version(root)) == before
    # The row of the checkpoint's step comes first.
    assert scalars(root, "train/loss", 1) == scalars(root, "train/loss")[2:]
    assert steps(root, 1) == list(range(4, 11))
    ours = read_checkpoint(folder_of(root, 1) / "last.ckpt")["state_dict"]
    theirs = read_checkpoint(folder_of(root) / "last.ckpt")["state_dict"]
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_job_that_went_back_does_not_jump_to_its_old_end(place, root, tmp_path):
    """Killed before its first save, and after it: a restart by SLURM goes on from where it was."""
    args = [
        *settings(place, root, **SELDOM, trainer__val_check_interval=None),
        back(root, "step=000003.ckpt"),
    ]
    code, said = in_a_job(args, tmp_path / "out", KILL_AT="4")
    assert code == -signal.SIGKILL and steps(root, 1) == []
    code, said = in_a_job(args, tmp_path / "out", SLURM_RESTART_COUNT="1", KILL_AT="6")
    assert code == -signal.SIGKILL and "step=000003.ckpt at step 3\n" in said
    assert steps(root, 2) == [5]
    code, said = in_a_job(args, tmp_path / "out", SLURM_RESTART_COUNT="2")
    assert code == 0 and f"{version(root, 2)}/checkpoints/step=000005.ckpt at step 5\n" in said
    assert steps(root, 2) == [5, 10] and steps(root) == list(range(1, 11))
    assert not version(root, 3).exists()


def test_the_best_checkpoint_lies_in_the_folder_of_its_run(place, root):
    """Also where all that follows is worse than before: its score is of a checkpoint in it."""
    assert links(root)["best"] == "step=000010.ckpt" or links(root)["best"] == "step=000009.ckpt"
    with log_lines() as lines:
        run(
            "fit",
            [
                *settings(place, root, **SELDOM, model__optimizer__lr=1e-9),
                back(root, "step=000003.ckpt"),
            ],
        )
    said = (
        "the best checkpoint so far, of step 2, is not in the folder of this run: the next"
        " validation is the best"
    )
    assert lines.count(said) == 1
    folder = folder_of(root, 1)
    state = read_checkpoint(folder / "last.ckpt")["callbacks"]["Checkpointer"]
    best = read_checkpoint(folder / "best.ckpt")
    assert best["global_step"] == state["best_step"] > 3
    assert best["callbacks"]["Checkpointer"]["best_score"] == state["best_score"]


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt", "renamed.ckpt"])
def test_the_last_checkpoint_by_another_name(name, place, root):
    """The step is read from the checkpoint. A copy without links has a file in their place."""
    folder = folder_of(root)
    (folder / name).unlink(missing_ok=True)
    shutil.copy(folder / "step=000010.ckpt", folder / name)
    with log_lines() as lines:
        run("fit", [*settings(place, root, trainer__max_epochs=3), back(root, name)])
    assert f"resumed {folder / name} at step 10" in lines and not version(root, 1).exists()
    assert len(scalars(root, "train/loss")) == 15 and links(root)["last"] == "step=000015.ckpt"


def test_a_link_takes_the_place_of_a_copied_directory(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "part-0.pt").touch()
    files.point(tmp_path / "last.ckpt", "step=000003.ckpt")
    assert files.target(tmp_path / "last.ckpt") == "step=000003.ckpt"


def test_another_score_to_choose_by(place, root):
    more = {
        "checkpoint__monitor": "val/token_accuracy",
        "checkpoint__mode": "max",
        "trainer__max_epochs": 3,
    }
    with log_lines() as lines:
        run("fit", [*settings(place, root, **SELDOM, **more), "--ckpt_path=last"])
    said = (
        "checkpoint.monitor was val/loss (min) and is val/token_accuracy (max): the next validation"
        " is the best so far"
    )
    assert lines.count(said) == 1
    state = read_checkpoint(version(root) / "checkpoints" / "last.ckpt")["callbacks"][
        "Checkpointer"
    ]
    accuracies = scalars(root, "val/token_accuracy")
    assert state["best_score"] == pytest.approx(max(accuracies[-2:])) and state["best_step"] > 10


# ------------------------------------------------------------------ which run


def test_a_newer_run_without_a_checkpoint_is_said(place, root):
    """And the finished one that `last` takes in its place keeps its settings."""
    config = (version(root) / "config.yaml").read_text()
    newer = version(root, 1)
    newer.mkdir()
    (newer / "config.yaml").touch()
    with log_lines() as lines:
        run("fit", [*settings(place, root, trainer__gradient_clip_val=0.3), "--ckpt_path=last"])
    assert f"version_1: no checkpoint yet, passed over for the older {version(root)}" in lines
    assert any(
        line.startswith("resumed ") and line.endswith(" at step 10; no step is left")
        for line in lines
    )
    assert (version(root) / "config.yaml").read_text() == config


def test_a_try_leaves_a_finished_run_alone(place, root):
    before = {path: path.stat().st_mtime_ns for path in version(root).rglob("*")}
    run("fit", [*settings(place, root, trainer__fast_dev_run=True), "--ckpt_path=last"])
    assert {path: path.stat().st_mtime_ns for path in version(root).rglob("*")} == before


def test_copied_and_renamed_runs(place, root):
    """A copy beside a run is not the newest; a renamed run goes on where its path is given."""
    logs = version(root).parent
    shutil.copytree(
        version(root), logs / "version_0_backup", symlinks=True, copy_function=shutil.copy
    )
    run("fit", [*settings(place, root, trainer__max_epochs=3), "--ckpt_path=last"])
    assert links(root)["last"] == "step=000015.ckpt" and len(list(logs.iterdir())) == 2
    (logs / "version_0_backup").rename(logs / "arithmetic")
    run(
        "fit", [*settings(place, root, trainer__max_epochs=3), f"--ckpt_path={logs / 'arithmetic'}"]
    )
    with (logs / "arithmetic" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == list(
            range(15)
        )
    assert len(list(logs.iterdir())) == 2


# ------------------------------------------------------------------ jobs and ranks


def test_a_refused_resume_does_not_take_a_waiting_jobs_run(place, root, tmp_path):
    mark = version(root) / "slurm_job"
    mark.write_text("77 0 version_0\n")
    other = settings(place, root, trainer__max_epochs=3, data__system_prompt="Be brief.")
    code, said = in_a_job([*other, "--ckpt_path=last"], tmp_path / "out", SLURM_JOB_ID="88")
    assert code == 1 and "system_prompt" in said and "resumed " not in said
    assert mark.read_text() == "77 0 version_0\n"
    code, said = in_a_job(
        settings(place, root, trainer__max_epochs=3), tmp_path / "out", SLURM_RESTART_COUNT="1"
    )
    assert code == 0 and " at step 10\n" in said and not version(root, 1).exists()
    code, said = in_a_job(
        [*settings(place, root, trainer__max_epochs=3), "--ckpt_path=last"],
        tmp_path / "out",
        SLURM_JOB_ID="88",
    )
    assert code == 0 and "no step is left" in said and mark.read_text() == "77 0 version_0\n"


def test_leftovers_of_lightnings_requeueing_are_left_alone(place, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    shutil.copy(
        version(place / "runs") / "checkpoints" / "step=000010.ckpt", root / "hpc_ckpt_1.ckpt"
    )
    code, said = in_a_job(settings(place, root, trainer__max_steps=2), tmp_path / "out")
    assert code == 0 and len(scalars(root, "train/loss")) == 2, said


@pytest.mark.parametrize("rank_1_at", ["step 9", "nothing"])
def test_ranks_that_would_go_on_from_different_checkpoints(rank_1_at, place, root, tmp_path):
    """Output on disks of the nodes' own, for instance. All end in one line, and nothing is
    saved.
    """
    other = tmp_path / "other"
    if rank_1_at == "step 9":
        shutil.copytree(root, other, symlinks=True)
        (version(other) / "checkpoints" / "step=000010.ckpt").unlink()
    before = contents(root)
    (port,) = free_ports(1)
    processes = []
    for rank, own in enumerate((root, other)):
        args = [
            *settings(
                place, own, trainer__devices=2, trainer__strategy="ddp", trainer__max_epochs=3
            )
        ]
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x",
            "TORCHELASTIC_USE_AGENT_STORE": "False",
        }  # fmt: skip
        out = tmp_path / f"out{rank}"
        processes.append(
            FORK.Process(target=_fit_in_a_job, args=([*args, "--ckpt_path=last"], out, variables))
        )
        processes[-1].start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [1, 1]
    said = [line for rank in (0, 1) for line in (tmp_path / f"out{rank}").read_text().splitlines()]
    errors = [line for line in said if line.startswith("error: ")]
    found = (
        "version_0/checkpoints/step=000009.ckpt (step 9)"
        if rank_1_at == "step 9"
        else "no checkpoint"
    )
    assert len(errors) == 1 and errors[0].startswith(
        "error: rank 0 would go on from version_0/checkpoints/step=000010.ckpt (step 10), rank 1"
        f" from {found}: let "
    )
    assert contents(root) == before
