"""Runs the real command line on a tiny model, in this process or in several, and reads back what
the run wrote.
"""

from __future__ import annotations

import csv
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_sft.checkpoint.io import read_checkpoint

REPOSITORY = Path(__file__).parent.parent
START = "forkserver" if torch.cuda.is_available() else "fork"
"""How children of this process start. Autograd's threads on a GPU do not survive a fork."""
RANKS_START = "forkserver"
"""How ranks start: from a process that has imported the package and has no threads. A fork of the
tests' own process may inherit a lock that another thread holds, and would wait for it forever.
"""
multiprocessing.set_forkserver_preload(["lit_sft.cli.main"])
OF_RANKS = ("SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_")


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of different lengths, one or two turns."""
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> str:
        n = int(torch.randint(1, most, (1,), generator=generator))
        return " ".join(
            "abcdefgh"[int(i)] * 3 for i in torch.randint(0, 8, (n,), generator=generator)
        )

    rows = []
    for index in range(count):
        messages = [
            {"role": "user", "content": words(6)},
            {"role": "assistant", "content": words(12)},
        ]
        if index % 3 == 0:
            messages += [
                {"role": "user", "content": words(4)},
                {"role": "assistant", "content": words(5)},
            ]
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]], ensure_ascii: bool = False) -> str:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def arguments(model: str, train: str, root: Path, **overrides: Any) -> list[str]:
    """Arguments of a small fp32 run on the CPU; overrides use __ for dots:
    `data__packing=False`.
    """
    settings = {
        "seed_everything": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.max_epochs": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": root,
        "trainer.enable_progress_bar": False,
        "model.model_name_or_path": model,
        "model.evaluation": None,
        "model.generation.max_new_tokens": 4,
        "data.train": train,
        "data.max_length": 128,
        "data.cache_dir": root.parent / "cache",
        "data.questions": [],
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return [
        f"--{key}={'null' if value is None else json.dumps(value) if isinstance(value, (bool, list, dict)) else value}"
        for key, value in settings.items()
    ]


def run(command: str, args: list[str], subprocesses: bool = False, timeout: float = 240) -> str:
    """Runs `python -m lit_sft COMMAND ...`; in this process unless ranks or exit codes matter.
    Several ranks are children of this process. Returns the output of other processes.
    """
    if not subprocesses:
        from lit_sft.cli.main import main

        main([command, *args])
        return ""
    if devices(args) > 1:
        codes, output = run_forked(command, args, timeout)
        assert set(codes) == {0}, f"exit codes {codes}\n{output[-9000:]}"
        return output
    done = subprocess.run(
        [sys.executable, "-m", "lit_sft", command, *args],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
    )
    assert done.returncode == 0, (
        f"exit code {done.returncode}\n" + done.stdout[-3000:] + done.stderr[-6000:]
    )
    return done.stdout + done.stderr


def devices(args: list[str]) -> int:
    """The number of ranks that a command line asks for."""
    numbers = re.findall(r"^--trainer\.devices=(\d+)$", "\n".join(args), re.MULTILINE)
    return int(numbers[-1]) if numbers else 1


def run_forked(command: str, args: list[str], timeout: float = 240) -> tuple[list[int | None], str]:
    """Runs a command on several ranks, without a launcher. Returns their exit codes and the output.

    The ranks import nothing, which takes longer than a run.
    """
    context = multiprocessing.get_context(RANKS_START)
    with tempfile.NamedTemporaryFile() as log:
        port = free_ports(1)[0]
        common = (devices(args), port, log.name, command, args, dict(os.environ))
        ranks = [
            context.Process(target=_run_rank, args=(rank, *common)) for rank in range(devices(args))
        ]
        for rank in ranks:
            rank.start()
        end = time.monotonic() + timeout
        for rank in ranks:
            rank.join(max(0.0, end - time.monotonic()))
        _stop(ranks)
        return [rank.exitcode for rank in ranks], Path(log.name).read_text()


def _stop(ranks: list[Any]) -> None:
    """Kills what still runs. Each of these ranks first writes where it hangs."""
    late = [rank for rank in ranks if rank.exitcode is None]
    for rank in late:
        os.kill(rank.pid, signal.SIGUSR2)
    if late:
        time.sleep(2)
    for rank in late:
        rank.kill()
        rank.join()


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    log: str,
    command: str,
    args: list[str],
    environ: dict[str, str],
) -> None:
    from lit_sft.cli.main import main

    # As in conftest.py: what a killed process has written stays.
    os.fsync = lambda descriptor: None
    os.environ.clear()
    os.environ.update(environ)
    for name in [name for name in os.environ if name.startswith(OF_RANKS)]:
        del os.environ[name]
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank_zero_only.rank = rank
    sys.stdout = sys.stderr = Path(log).open("a", buffering=1)  # type: ignore[assignment]
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    os.chdir(REPOSITORY)
    sys.argv = ["lit_sft", command, *args]
    main([command, *args])


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def environment(**more: str) -> dict[str, str]:
    """The environment without what would make ranks or a cluster of this process, and without a
    hub.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OF_RANKS)}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def version(root: Path, number: int = 0) -> Path:
    return root / "lightning_logs" / f"version_{number}"


def scalars(root: Path, name: str, number: int = 0) -> list[float]:
    """All values of a scalar in metrics.csv, in order."""
    with (version(root, number) / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def rows(root: Path) -> list[dict[str, float]]:
    """The lines of metrics.csv, without what depends on the clock."""
    # `scripts` is not on the path of a job that imports this file.
    from crash_test import CLOCK

    with (version(root) / "metrics.csv").open() as file:
        return [
            {k: float(v) for k, v in row.items() if v and k not in CLOCK}
            for row in csv.DictReader(file)
        ]


def assert_same_run(root: Path, expected: Path) -> None:
    """The same log and the same weights to the last bit, in one folder."""
    assert rows(root) == rows(expected)
    assert not version(root, 1).exists()
    weights, others = final_weights(root), final_weights(expected)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in others)


def call_at(hook: str, step: int | None, nth: int, then: Callable[[], Any]) -> None:
    """From now on, `then` is called where callbacks are about to get a hook for the nth time at a
    step (None: any). For a child of this process.
    """
    from lightning.pytorch.trainer import call

    call_hooks, seen = call._call_callback_hooks, []

    def hooked(trainer: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == hook and step in (None, trainer.global_step):
            seen.append(name)
            if len(seen) == nth:
                then()
        return call_hooks(trainer, name, *args, **kwargs)

    call._call_callback_hooks = hooked


def final_weights(root: Path, number: int = 0) -> dict[str, torch.Tensor]:
    return read_checkpoint(version(root, number) / "checkpoints" / "last.ckpt")["state_dict"]
