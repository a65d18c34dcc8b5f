"""Runs the real command line on a tiny model, in this process or in several, and reads back what
the run wrote.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lit_sft.checkpoint.io import read_checkpoint

REPOSITORY = Path(__file__).parent.parent


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
    Returns its output.
    """
    if not subprocesses:
        from lit_sft.cli.main import main

        main([command, *args])
        return ""
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


def environment(**more: str) -> dict[str, str]:
    """The environment without what would make ranks or a cluster of this process, and without a
    hub.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_"))
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def version(root: Path, number: int = 0) -> Path:
    return root / "lightning_logs" / f"version_{number}"


def scalars(root: Path, name: str, number: int = 0) -> list[float]:
    """All values of a scalar in metrics.csv, in order."""
    with (version(root, number) / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def final_weights(root: Path, number: int = 0) -> dict[str, torch.Tensor]:
    return read_checkpoint(version(root, number) / "checkpoints" / "last.ckpt")["state_dict"]
