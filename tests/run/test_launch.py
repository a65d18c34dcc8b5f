"""Ranks that another program has started: taken as they are, or refused in one line on each."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from cluster import free_ports
from running import REPOSITORY, arguments, chat_rows, environment, scalars, version, write_rows
from tiny import save_tiny

from lit_sft.errors import UserError
from lit_sft.run.launch import take_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def settings(devices="auto", num_nodes=1):
    return SimpleNamespace(devices=devices, num_nodes=num_nodes, plugins=None)


def started(monkeypatch, **variables):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


TWO_NODES = dict(RANK=3, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, WORLD_SIZE=4, MASTER_ADDR="a")
POD = dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="a")
NO_LOCAL_SIZE = dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, MASTER_ADDR="a")
TAKEN = [
    (TWO_NODES, settings(), False, (2, 2)),
    (TWO_NODES, settings(2, 2), True, (2, 2)),
    (TWO_NODES, settings("0,1", 2), True, ("0,1", 2)),
    (POD, settings(), False, (1, 2)),
    (POD, settings(1, 2), True, (1, 2)),
    (NO_LOCAL_SIZE, settings(-1), False, (2, 1)),
]


@pytest.mark.parametrize(("variables", "trainer", "asks_for_nodes", "taken"), TAKEN)
def test_what_is_taken(variables, trainer, asks_for_nodes, taken, monkeypatch):
    started(monkeypatch, **variables)
    (found,) = take_ranks(trainer, asks_for_nodes)
    assert (trainer.devices, trainer.num_nodes) == taken
    assert found.world_size() == variables["WORLD_SIZE"]
    assert found.global_rank() == variables["RANK"]
    assert found.local_rank() == variables.get("LOCAL_RANK", 0)


REFUSED = [
    (TWO_NODES, settings(1), False),
    (TWO_NODES, settings(4), False),
    (TWO_NODES, settings("auto", 1), True),
    (POD, settings(1), False),
    (POD, settings(2), False),
    (NO_LOCAL_SIZE, settings(1), False),
]


@pytest.mark.parametrize(("variables", "trainer", "asks_for_nodes"), REFUSED)
def test_what_is_refused(variables, trainer, asks_for_nodes, monkeypatch):
    started(monkeypatch, **variables)
    words = f"the launcher has started {variables['WORLD_SIZE']} ranks .* set trainer.devices to"
    with pytest.raises(UserError, match=words):
        take_ranks(trainer, asks_for_nodes)


def test_ranks_that_could_not_meet(monkeypatch):
    started(monkeypatch, RANK=0, WORLD_SIZE=2)
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        take_ranks(settings(), False)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # A job with one pod, whose process starts a rank for each device.
        dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="a"),
        # A rank that Lightning has started.
        dict(LOCAL_RANK=1, WORLD_SIZE=2, MASTER_ADDR="a"),
    ],
)
def test_what_lightning_starts_itself(variables, monkeypatch):
    started(monkeypatch, **variables)
    trainer = settings(2)
    assert take_ranks(trainer, False) == [] and trainer.devices == 2


def pods(args):
    """`fit` in two processes that know of each other, as in two pods: (exit code, stderr) each."""
    port = free_ports(1)[0]
    processes = []
    for rank in range(2):
        names = dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env = environment(**{name: str(value) for name, value in names.items()})
        command = [sys.executable, "-m", "lit_sft", "fit", *args]
        processes.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture
def args(tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(16))
    model = save_tiny(tmp_path / "model")

    def get(**overrides):
        return arguments(model, rows, tmp_path / "runs", data__packing=False, **overrides)

    return get


def test_two_pods_train_together(args, tmp_path):
    ended = pods(args(trainer__devices="auto"))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "micro-batch 1 x 2 devices x accumulation 4" in ended[0][1]
    assert len(scalars(tmp_path / "runs", "train/loss")) == 2
    assert [path.name for path in version(tmp_path / "runs").parent.iterdir()] == ["version_0"]


def test_each_pod_is_refused_by_itself(args, tmp_path):
    """Also where the other one never starts: none waits for it."""
    for code, said in pods(args()):
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(lines) == 1 and "Traceback" not in said, said
        assert "2 ranks (WORLD_SIZE), 1 on each node, but trainer.devices is 1" in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_torchrun_with_auto_and_with_too_few(args, tmp_path):
    launcher = (
        "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_ports(1)[0]}",
    )  # fmt: skip
    for devices, code in (("auto", 0), (1, 1)):
        command = [sys.executable, *launcher, "-m", "lit_sft", "fit"]
        done = subprocess.run(
            [*command, *args(trainer__devices=devices)],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr[-3000:]
        refusals = done.stderr.count("error: the launcher has started 2 ranks")
        assert bool(refusals) == bool(code)
