"""Jobs on a real cluster, which this file starts; and what is decided about a job, without one."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from cluster import cluster, why_not
from running import (
    REPOSITORY,
    arguments,
    chat_rows,
    final_weights,
    run,
    scalars,
    version,
    write_rows,
)
from terminal import refused
from tiny import save_tiny

from lit_sft.run import slurm

SCRIPTS = REPOSITORY / "scripts" / "slurm"
HERE = ("--gpus-per-node=0", "--cpus-per-task=1", "--ntasks-per-node=1", "--time=30")
SETTINGS = {
    "data__packing": False,
    "data__global_batch_size": 8,
    "data__val_size": 7,
    "checkpoint__every_n_minutes": None,
    "trainer__max_epochs": 2,
}
STEPS = 8
WHY_NOT = why_not()
on_a_cluster = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no cluster: {WHY_NOT}"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(39))


@pytest.fixture(scope="module")
def slurm_cluster():
    with cluster() as made:
        yield made


class Job:
    """A run of ours as a job.

    Args:
        held_at: Step at which its first start waits for a signal.
    """

    def __init__(self, cluster, place, name, script, *options, held_at=None, **overrides):
        self.cluster, self.root = cluster, place[0] / name
        self.log, self.says = place[0] / f"{name}.log", place[0] / f"{name}.held"
        args = [
            arg
            for arg in arguments(*place[1:], self.root, **{**SETTINGS, **overrides})
            if "devices" not in arg
        ]
        if held_at is not None:
            hold = {
                "class_path": "cluster.Hold",
                "init_args": {"step": held_at, "says": str(self.says)},
            }
            args.append(f"--trainer.callbacks={[hold]}")
        config = place[0] / "empty.yaml"
        config.write_text(yaml.safe_dump({"seed_everything": 1}))
        self.id = cluster.submit(self.log, *HERE, *options, SCRIPTS / script, config, *args)

    def wait(self, **kwargs):
        state = self.cluster.wait(self.id, **kwargs)
        print(self.log.read_text())
        return state

    def held(self, rank):
        """The process of a rank, when it has come to the step where it waits."""
        path = Path(f"{self.says}.{rank}")
        self.cluster.until(lambda: path.exists() and path.read_text(), timeout=120)
        return int(path.read_text())

    def says_in_log(self, text):
        """The log, when it has a text."""
        return self.cluster.until(self.log.read_text, lambda log: text in log, timeout=150)

    @property
    def weights(self):
        return final_weights(self.root)


@pytest.fixture(scope="module")
def whole(slurm_cluster, place):
    """Uninterrupted jobs on 2 nodes with 1 task each."""
    jobs = {
        "ddp": Job(slurm_cluster, place, "ddp", "one_node.sh", "--nodes=2"),
        "fsdp2": Job(slurm_cluster, place, "fsdp2", "several_nodes.sh"),
    }
    assert [job.wait() for job in jobs.values()] == ["COMPLETED", "COMPLETED"]
    return jobs


def assert_equal(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in others)


# ------------------------------------------------------------------ decisions

RUNNING = {
    "JobState": "RUNNING",
    "Reason": "None",
    "PreemptTime": "None",
    "Requeue": "1",
    "BatchFlag": "1",
}
USR1, TERM = signal.SIGUSR1, signal.SIGTERM
DECISIONS = {
    "its time is nearly up": (USR1, {}, True),
    "kill, or scancel --signal": (TERM, {}, False),
    "preemption": (TERM, {"PreemptTime": "2026-11-25T00:00:29"}, True),
    "scancel": (TERM, {"JobState": "COMPLETING"}, False),
    "scancel while it saves": (USR1, {"JobState": "COMPLETING"}, False),
    "time limit": (TERM, {"JobState": "COMPLETING", "Reason": "TimeLimit"}, True),
    "sbatch --no-requeue": (USR1, {"Requeue": "0"}, False),
    "salloc": (USR1, {"BatchFlag": "0"}, False),
    "scontrol says nothing": (USR1, None, True),
    "scontrol says nothing about a kill": (TERM, None, False),
}


@pytest.mark.parametrize(("number", "job", "requeued"), DECISIONS.values(), ids=DECISIONS)
def test_when_a_job_is_requeued(number, job, requeued, monkeypatch):
    job = {} if job is None else {**RUNNING, **job}
    assert (slurm.reason_to_leave(job, number, 3, has_stepped=True) is None) == requeued
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert "resume.max_restarts" in slurm.reason_to_leave(job, number, 3, has_stepped=True)


def test_a_job_whose_time_is_too_short_is_not_requeued_forever(monkeypatch):
    assert (
        slurm.reason_to_leave(RUNNING, USR1, 3, has_stepped=False) is None
    )  # its data is prepared by now
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "--time" in slurm.reason_to_leave(RUNNING, USR1, 3, has_stepped=False)
    assert (
        slurm.reason_to_leave({**RUNNING, "PreemptTime": "now"}, TERM, 3, has_stepped=False) is None
    )


def test_a_job_of_an_array_has_two_ids(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert slurm.job_id() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert slurm.job_id() == "12_1"


def test_a_job_goes_on_with_its_own_run(tmp_path, monkeypatch):
    for number, job in enumerate(["5", "6", "6", "7"]):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        (tmp_path / f"version_{number}").mkdir()
        slurm.remember(tmp_path / f"version_{number}")
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    assert slurm.own_run(tmp_path) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm.own_run(tmp_path) == "version_2"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert slurm.own_run(tmp_path) is None


LAUNCHES = {
    "without srun": ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, "not started by srun"),
    "--ntasks alone": ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "--ntasks-per-node"),
    "devices": (
        {
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_STEP_ID": "0",
            "SLURM_NNODES": "1",
        },
        "1 nodes with 2 tasks each, but trainer.num_nodes is 1 and trainer.devices makes 1",
    ),
}


@pytest.mark.parametrize(("env", "message"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_wrong_launch_is_one_line(env, message, place, tmp_path, monkeypatch, capsys):
    always = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in {**always, **env}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them
        monkeypatch.setenv(name, "0")
    assert message in refused(capsys, "fit", arguments(*place[1:], tmp_path / "runs", **SETTINGS))


# ------------------------------------------------------------------ jobs


class TestJobs:
    pytestmark = on_a_cluster

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_two_nodes_are_one_process(self, strategy, whole, place):
        alone = place[0] / "alone"
        if not alone.exists():
            run("fit", arguments(*place[1:], alone, **SETTINGS))
        assert "tasks" not in whole[strategy].log.read_text()
        losses = torch.tensor(scalars(whole[strategy].root, "train/loss"))
        assert len(losses) == STEPS
        torch.testing.assert_close(
            losses, torch.tensor(scalars(alone, "train/loss")), rtol=1e-5, atol=0
        )

    def test_preempted(self, slurm_cluster, whole, place):
        job = Job(slurm_cluster, place, "preempted", "several_nodes.sh", held_at=3)
        job.held(1)
        slurm_cluster.submit(
            "/dev/null", "-p", "urgent", "-N", "1", "-w", "node2", "-n", "4", "--wrap", "sleep 1"
        )
        assert job.wait() == "COMPLETED"
        log = job.log.read_text()
        assert (
            "stopped by SIGTERM after step 4, which is saved" in log
            and f"job {job.id} is requeued" in log
        )
        assert (
            f"SLURM started job {job.id} again, for time 1" in log
            and "step=000004.ckpt at step 4" in log
        )
        assert not version(job.root, 1).exists()
        assert_equal(job.weights, whole["fsdp2"].weights)

    def test_time_limit(self, slurm_cluster, whole, place):
        """Its time is cut as soon as it has come to the step, and given back when it is
        requeued.
        """
        options = ("--ntasks-per-node=2", "--signal=USR1@60")
        job = Job(slurm_cluster, place, "limited", "one_node.sh", *options, held_at=3)
        job.held(1)
        slurm_cluster.call("scontrol", "update", f"jobid={job.id}", "TimeLimit=2")
        job.says_in_log(f"job {job.id} is requeued")
        slurm_cluster.call("scontrol", "update", f"jobid={job.id}", "TimeLimit=30")
        assert job.wait() == "COMPLETED"
        assert "stopped by SIGUSR1 after step 4, which is saved" in job.says_in_log(
            "step=000004.ckpt at step 4"
        )
        assert_equal(job.weights, whole["ddp"].weights)

    def test_cancelled(self, slurm_cluster, place):
        job = Job(slurm_cluster, place, "cancelled", "array.sh", "--array=7", held_at=3)
        job.held(0)
        slurm_cluster.call("scancel", job.id)
        assert job.wait() == "CANCELLED"
        assert slurm_cluster.job(job.id)["Restarts"] == "0"
        assert f"job {job.id}_7 is not requeued: it was cancelled" in job.log.read_text()
        assert (version(job.root) / "checkpoints" / "step=000004.ckpt").is_file()

    @pytest.mark.parametrize("rank", [0, 1])
    def test_killed_rank(self, rank, slurm_cluster, place):
        job = Job(slurm_cluster, place, f"killed_{rank}", "one_node.sh", "--nodes=2", held_at=2)
        pids = [job.held(0), job.held(1)]
        os.kill(pids[rank], signal.SIGKILL)
        killed = time.monotonic()
        assert job.wait() == "FAILED"
        assert time.monotonic() - killed < 60
        assert slurm_cluster.job(job.id)["ExitCode"] != "0:0"
        assert not Path(f"/proc/{pids[1 - rank]}").exists()
