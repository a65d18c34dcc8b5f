"""A SLURM cluster of its own on this machine: munged, slurmctld and a slurmd for each emulated
node, no accounting.

All nodes are 127.0.0.1 and differ by port; each has a host name and an /etc/hosts of its own, so
that tasks find each other by the names that SLURM tells them. Jobs in partition `urgent` preempt
those in `main`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from running import REPOSITORY, environment, free_ports

from lit_sft import signals

NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare")
PATH = (  # the job scripts call `python`
    f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
)
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""
"""cred_expire is how long a requeued job waits, 2 minutes by default. KillOnBadExit is left at its
default, off.
"""


class Hold(Callback):
    """Waits at a step of a job's first start until a signal has come: whatever the machine's speed,
    it comes there.
    """

    def __init__(self, step: int, says: str) -> None:
        self.step, self.says = step, says

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.step or "SLURM_RESTART_COUNT" in os.environ:
            return
        Path(f"{self.says}.{trainer.global_rank}").write_text(str(os.getpid()))
        while not signals.received():
            time.sleep(0.01)


def why_not() -> str | None:
    """Why there can be no cluster here."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (packages slurm-wlm and munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    done = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


class Cluster:
    """Commands to a running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **environment(PATH=PATH, PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}"),
            **self.conf(),
        }

    def conf(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: object) -> str:
        done = subprocess.run(
            [*map(str, command)],
            env=self.env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, output: Path, *command: object) -> str:
        """The id of a new job."""
        return self.call("sbatch", "--parsable", f"--output={output}", *command)

    def job(self, job: str) -> dict[str, str]:
        words = self.call("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, timeout: float = 300) -> str:
        """The state a job ended in."""
        return self.until(
            lambda: self.job(job)["JobState"],
            lambda state: state not in ("PENDING", "RUNNING", "COMPLETING"),
            timeout,
        )

    @staticmethod
    def until(ask, enough=bool, timeout=60):
        """The first answer that is enough."""
        end = time.monotonic() + timeout
        while not enough(answer := ask()):
            assert time.monotonic() < end, answer
            time.sleep(0.2)
        return answer


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster, which ends with all its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: it holds a socket
    folder.chmod(0o755)
    (folder / "state").mkdir()
    hosts = Path("/etc/hosts").read_text() + "".join(f"\n127.0.0.1 {node}" for node in NODES)
    (folder / "hosts").write_text(hosts + "\n")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=free_ports(3)))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    made = Cluster(folder)
    daemons = []

    def start(name: str, *command: str) -> None:
        log = (folder / f"{name}.log").open("wb")
        daemons.append(
            subprocess.Popen(command, env=made.env, stdout=log, stderr=log, start_new_session=True)
        )

    try:
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = dict(
            zip(names, ("key", "munge.socket", "munge.pid", "munge.log", "seed"), strict=True)
        )
        start(
            "munged",
            "munged",
            "--foreground",
            *(f"--{name}={folder / file}" for name, file in files.items()),
        )
        made.until((folder / "munge.socket").exists)
        start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            (folder / f"spool.{node}").mkdir()
            alone = (
                f"hostname {node} && mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -N"
                f" {node}"
            )
            start(node, "unshare", "--uts", "--mount", "sh", "-c", alone)
        made.until(
            lambda: subprocess.run(["sinfo"], env=made.env, capture_output=True).returncode == 0
        )
        made.until(
            lambda: (
                made.call("sinfo", "-hN", "-p", "main", "-o", "%T").split() == ["idle"] * len(NODES)
            )
        )
        yield made
        made.call("scancel", "--user=root")
        with contextlib.suppress(AssertionError):
            made.until(lambda: not made.call("squeue", "-h"), timeout=20)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(20)
        for process in left_behind(made.conf()["SLURM_CONF"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def left_behind(conf: str) -> list[int]:
    """Processes that were started by daemons with this configuration."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={conf}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [process for process in found if process != os.getpid()]
