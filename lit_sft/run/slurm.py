"""The SLURM job of a run: its launch, the run that it owns, and requeueing."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from lit_sft.errors import UserError

log = logging.getLogger(__name__)

JOB_FILE = "slurm_job"
"""File in the folder of a run that names the job it belongs to."""


# ------------------------------------------------------------------ the job


def job_id() -> str | None:
    """Returns the id of this job as `scontrol` takes it; None outside of SLURM.

    In a job array `SLURM_JOB_ID` is no use: that of one task is the id of the whole array.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def num_restarts() -> int:
    """Returns how often SLURM restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def check_launch() -> None:
    """Checks that `srun` starts all tasks of the job, and that their number per node is known.

    Raises:
        UserError: It does not, and ranks would wait for each other forever.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if not SLURMEnvironment.detect() or TorchElasticEnvironment.detect() or tasks == 1:
        return
    if "SLURM_STEP_ID" not in os.environ:
        raise UserError(
            f"this SLURM job has {tasks} tasks, but was not started by srun: put `srun` before the"
            " command"
        )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"--ntasks={tasks} does not say how many tasks a node has: give --ntasks-per-node to"
            " sbatch"
        )


def check_devices(trainer: L.Trainer, plugins: Iterable[Any]) -> None:
    """Checks that the job has one task per device.

    Args:
        trainer: The trainer, with `num_devices` and `num_nodes`.
        plugins: The plugins of the trainer. Without a `SLURMEnvironment` nothing is checked.

    Raises:
        UserError: There are more or fewer tasks than devices.
    """
    if not any(isinstance(plugin, SLURMEnvironment) for plugin in plugins):
        return
    tasks = int(os.environ["SLURM_NTASKS"])
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    if (tasks, nodes) != (trainer.num_devices * trainer.num_nodes, trainer.num_nodes):
        raise UserError(
            f"this SLURM job has {nodes} nodes with {tasks // nodes} tasks each, but"
            f" trainer.num_nodes is {trainer.num_nodes} and trainer.devices makes"
            f" {trainer.num_devices}: set them to --nodes and --ntasks-per-node (and let every task"
            " see all GPUs of its node)"
        )


def plugins(given: list[Any]) -> list[Any]:
    """Returns the plugins of the trainer, with Lightning's own requeueing turned off.

    Lightning saves inside of its signal handler, which may interrupt an optimizer step.

    Args:
        given: The plugins that the user asked for.
    """
    for plugin in given:
        if isinstance(plugin, SLURMEnvironment):
            plugin.auto_requeue = False
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return given
    if any(isinstance(plugin, ClusterEnvironment) for plugin in given):
        return given
    return [*given, SLURMEnvironment(auto_requeue=False)]


def _own_mark(folder: str) -> str:
    """Returns the line that marks a folder as the run of this command in this job.

    A job may start several runs. They differ by the step of `srun`, or else by the command line
    without `--ckpt_path`. The folder's name is part of the line, so a renamed copy is not the run.

    Args:
        folder: Name of the run's folder.
    """
    command = os.environ.get("SLURM_STEP_ID") or _command_hash()
    return f"{job_id()} {command} {folder}"


def _command_hash() -> str:
    args = []
    for before, arg in zip(sys.argv, sys.argv[1:], strict=False):
        if "--ckpt_path" not in (before, arg):
            args.append(arg)
    return f"{zlib.crc32(repr(args).encode()):08x}"


def remember(folder: Path) -> None:
    """Marks a folder as the run of this job."""
    if job_id() is not None:
        (folder / JOB_FILE).write_text(f"{_own_mark(folder.name)}\n")


def own_run(logs: Path) -> str | None:
    """Returns the name of the run that this job started before SLURM restarted it.

    The job resumes this run, and not a newer one of another job. None for a job that was not
    restarted, or that was stopped before it made a run.

    Args:
        logs: The folder `lightning_logs`.
    """
    if not num_restarts():
        return None
    marks = {path.parent.name: path.read_text().strip() for path in logs.glob(f"*/{JOB_FILE}")}
    own = [name for name, mark in marks.items() if mark == _own_mark(name)]
    log.info("SLURM started job %s again, for time %s", job_id(), num_restarts())
    return max(own, key=_version, default=None)


def _version(name: str) -> int:
    """Returns N of `version_N`; -1 for another name."""
    match = re.fullmatch(r"version_(\d+)", name)
    return int(match[1]) if match else -1


# ------------------------------------------------------------------ requeueing


def query(job: str) -> dict[str, str]:
    """Returns the fields of `scontrol show job`; empty if `scontrol` fails."""
    words = _scontrol("-o", "show", "job", job).stdout.split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def reason_to_leave(
    job: Mapping[str, str], number: signal.Signals, max_restarts: int, has_stepped: bool
) -> str | None:
    """Returns why a job must not be requeued; None if it should be.

    The time limit and preemption are reasons to requeue. SIGTERM alone is none, or `scancel` would
    never end a job.

    Args:
        job: The result of `query`.
        number: The signal that was received.
        max_restarts: Most restarts of one job.
        has_stepped: Whether the job made an optimizer step since its last start.
    """
    if num_restarts() >= max_restarts:
        return f"it was started again {num_restarts()} times (resume.max_restarts)"
    if number == signal.SIGUSR1 and num_restarts() and not has_stepped:
        return "its time was over before the first step: give it more --time, or --signal less"
    if job.get("Requeue") == "0" or job.get("BatchFlag") == "0":
        return "SLURM does not allow it: submit it by sbatch --requeue"
    return _reason_of_end(job, number)


def _reason_of_end(job: Mapping[str, str], number: signal.Signals) -> str | None:
    """Returns None if its time limit or preemption ends a job, else the reason not to requeue."""
    # `sbatch --signal` sends SIGUSR1 before the time limit.
    near_time_limit = number == signal.SIGUSR1
    if not job and not near_time_limit:
        return "scontrol does not say why it ends"
    if job.get("JobState") in ("COMPLETING", "CANCELLED"):
        return None if job.get("Reason") == "TimeLimit" else "it was cancelled"
    is_preempted = job.get("PreemptTime", "None") != "None"
    if near_time_limit or is_preempted:
        return None
    return "neither preemption nor its time limit ends it"


def requeue(number: signal.Signals, max_restarts: int, has_stepped: bool) -> bool:
    """Requeues this job unless `reason_to_leave` objects, and logs the outcome. One rank calls it.

    Args:
        number: The signal that was received.
        max_restarts: Most restarts of one job.
        has_stepped: Whether the job made an optimizer step since its last start.

    Returns:
        Whether the job is requeued, by us or by SLURM.
    """
    job = job_id()
    assert job is not None
    state = query(os.environ["SLURM_JOB_ID"])
    if int(state.get("Restarts", 0)) > num_restarts():
        log.info("SLURM has requeued job %s already", job)
        return True
    reason = reason_to_leave(state, number, max_restarts, has_stepped)
    if reason is None:
        done = _scontrol("requeue", job)
        if done.returncode:
            reason = " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}"
    if reason is not None:
        log.info("job %s is not requeued: %s", job, reason)
        return False
    log.info("job %s is requeued", job)
    return True


def _scontrol(*args: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *args], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(args, 1, "", str(error))
