"""The SLURM job that a run is in: whether it was launched right, whether it is to be requeued,
which run is its own.
"""

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
"""In the folder of a run: the job that it belongs to."""


# ------------------------------------------------------------------ the job


def job_id() -> str | None:
    """The id of this job as `scontrol` takes it, or None. A task of an array has one of its own,
    but the first one's is the whole array's.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return (
        f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")
    )


def num_restarts() -> int:
    """How often this job was started again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def check_launch() -> None:
    """Whether `srun` started what SLURM was asked for.

    Raises:
        UserError: It did not, and ranks would wait for each other forever.
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
    """Refuses a job that has not one task for every device.

    Args:
        trainer: Knows the devices.
        plugins: Its plugins; one of them says whether SLURM starts the ranks.

    Raises:
        UserError: There are more or fewer tasks than devices.
    """
    if not any(isinstance(plugin, SLURMEnvironment) for plugin in plugins):
        return
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", 1))
    if (tasks, nodes) != (trainer.num_devices * trainer.num_nodes, trainer.num_nodes):
        raise UserError(
            f"this SLURM job has {nodes} nodes with {tasks // nodes} tasks each, but"
            f" trainer.num_nodes is {trainer.num_nodes} and trainer.devices makes"
            f" {trainer.num_devices}: set them to --nodes and --ntasks-per-node (and let every task"
            " see all GPUs of its node)"
        )


def plugins(given: list[Any]) -> list[Any]:
    """Plugins of the trainer. Under SLURM without Lightning's own requeueing, which saves inside a
    signal handler: in the middle of an optimizer step, too.
    """
    for plugin in given:
        if isinstance(plugin, SLURMEnvironment):
            plugin.auto_requeue = False
    others = TorchElasticEnvironment.detect() or any(
        isinstance(plugin, ClusterEnvironment) for plugin in given
    )
    return (
        given
        if others or not SLURMEnvironment.detect()
        else [*given, SLURMEnvironment(auto_requeue=False)]
    )


def _own_mark(folder: str) -> str:
    """The job, and which run of it: that of one `srun`, or else of one command line. A copy of the
    folder that bears another name is not its run.
    """
    args = [
        arg
        for before, arg in zip(sys.argv, sys.argv[1:], strict=False)
        if "--ckpt_path" not in (before, arg)
    ]
    command = os.environ.get("SLURM_STEP_ID") or f"{zlib.crc32(repr(args).encode()):08x}"
    return f"{job_id()} {command} {folder}"


def remember(folder: Path) -> None:
    """Writes down which job a run belongs to."""
    if job_id() is not None:
        (folder / JOB_FILE).write_text(f"{_own_mark(folder.name)}\n")


def own_run(logs: Path) -> str | None:
    """The folder of the run that this job began before it was started again: it goes on with that,
    and not with the run of another job. None for a new job, and where it did not come that far.

    Args:
        logs: `lightning_logs`.
    """
    if not num_restarts():
        return None
    marks = {path.parent.name: path.read_text().strip() for path in logs.glob(f"*/{JOB_FILE}")}
    own = [name for name, mark in marks.items() if mark == _own_mark(name)]
    log.info("SLURM started job %s again, for time %s", job_id(), num_restarts())
    return max(
        own,
        key=lambda name: int(name[8:]) if re.fullmatch(r"version_\d+", name) else -1,
        default=None,
    )


# ------------------------------------------------------------------ requeueing


def query(job: str) -> dict[str, str]:
    """What `scontrol` says about a job; empty if it says nothing."""
    words = _scontrol("-o", "show", "job", job).stdout.split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def reason_to_leave(
    job: Mapping[str, str], number: signal.Signals, max_restarts: int, has_stepped: bool
) -> str | None:
    """Why a job is not requeued; None if it is to be.

    Its time limit and preemption are reasons to requeue; SIGTERM alone is not, or `scancel` would
    never end a job.

    Args:
        job: What `query` found.
        number: The signal that was received.
        max_restarts: No job is requeued more often.
        has_stepped: Whether there was an optimizer step since the job started.
    """
    if num_restarts() >= max_restarts:
        return f"it was started again {num_restarts()} times (resume.max_restarts)"
    if number == signal.SIGUSR1 and num_restarts() and not has_stepped:
        return "its time was over before the first step: give it more --time, or --signal less"
    if job.get("Requeue") == "0" or job.get("BatchFlag") == "0":
        return "SLURM does not allow it: submit it by sbatch --requeue"
    if not job and number != signal.SIGUSR1:
        return "scontrol does not say why it ends"
    if job.get("JobState") in ("COMPLETING", "CANCELLED"):
        return None if job.get("Reason") == "TimeLimit" else "it was cancelled"
    if number == signal.SIGUSR1 or job.get("PreemptTime", "None") != "None":
        return None
    return "neither preemption nor its time limit ends it"


def requeue(number: signal.Signals, max_restarts: int, has_stepped: bool) -> bool:
    """Requeues this job where that is right (see `reason_to_leave`), and says what became of it. On
    one rank.
    """
    job, own_id = job_id(), os.environ["SLURM_JOB_ID"]
    assert job is not None
    state = query(own_id)
    if int(state.get("Restarts", 0)) > num_restarts():
        log.info("SLURM has requeued job %s already", job)
        return True
    reason = reason_to_leave(state, number, max_restarts, has_stepped)
    if reason is None:
        done = _scontrol("requeue", job)
        reason = (
            " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}"
            if done.returncode
            else None
        )
    log.info("job %s is %s", job, "requeued" if reason is None else f"not requeued: {reason}")
    return reason is None


def _scontrol(*args: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *args], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(args, 1, "", str(error))
