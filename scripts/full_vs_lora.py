"""Trains full, LoRA, DoRA and QLoRA for the same time on one task, and prints a table and JSON.

    python scripts/full_vs_lora.py [--minutes 2.5] [--methods full lora dora qlora] [--data
    train.jsonl val.jsonl]

The learning rate is constant after a short warm-up, because the number of steps is not known
before.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_arithmetic.yaml"
LORA = {"r": 16, "lora_alpha": 32}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"model.optimizer.init_args.lr": 1e-4},
    "lora": {"model.optimizer.init_args.lr": 1e-3, "model.lora": LORA},
    "dora": {"model.optimizer.init_args.lr": 1e-3, "model.lora": {**LORA, "use_dora": True}},
    "qlora": {
        "model.optimizer.init_args.lr": 1e-3,
        "model.lora": LORA,
        "model.quantization": "nf4",
    },
}
"""Method -> settings. Adapters take ten times the learning rate of full fine-tuning."""


def settings(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Returns the settings that all methods share."""
    train, validation = options.data
    return {
        "model.model_name_or_path": options.model,
        "model.lr_schedule": {"type": "constant", "warmup_steps": 5},
        "model.evaluation.num_samples": 64,
        "data.train": train,
        "data.validation": validation,
        "data.max_samples": None,
        "data.max_length": 512,
        "data.micro_batch_size": 2,
        "data.questions": [],
        "trainer.max_epochs": 1000,
        "trainer.limit_val_batches": 1.0,
        "trainer.val_check_interval": 1.0,
        "trainer.max_time": time.strftime("00:%H:%M:%S", time.gmtime(60 * options.minutes)),
        "trainer.enable_progress_bar": False,
        "trainer.default_root_dir": str(root),
    }


def run(name: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Trains in a process of its own, so the peak memory is only this run's."""
    values = {**settings(options, root), **METHODS[name]}
    arguments = [
        f"--{key}={json.dumps(value) if not isinstance(value, str) else value}"
        for key, value in values.items()
    ]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_sft", "fit", "--config", str(CONFIG), *arguments]
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {name} ended with exit code {os.waitstatus_to_exitcode(status)}")
    folder = root / "lightning_logs" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {key: float(row[key]) for row in rows for key, value in row.items() if value}
    return {
        "method": name,
        "val_loss": last["val/loss"],
        "exact_match": last["val/exact_match"],
        "steps": int(last["step"]),
        "trained_parameters": trained_parameters(folder / "hf"),
        "peak_bytes": usage.ru_maxrss * 1024,
        "seconds": time.monotonic() - started,
        "checkpoint_bytes": (folder / "checkpoints" / "last.ckpt").stat().st_size,
    }


def trained_parameters(folder: Path) -> int:
    """Counts the exported weights, of the adapter or of the whole model."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
        for shape in shapes:
            size = 1
            for side in shape:
                size *= side
            total += size
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as a Markdown table."""
    lines = [
        (
            "| method | val loss | exact match | trained parameters | steps | peak memory | wall"
            " time | checkpoint |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['val_loss']:.3f} | {row['exact_match']:.1%} |"
            f" {row['trained_parameters'] / 1e6:.1f} M | {row['steps']} |"
            f" {row['peak_bytes'] / 2**30:.1f} GiB | {row['seconds']:.0f} s |"
            f" {row['checkpoint_bytes'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the methods one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="models/SmolLM2-135M-Instruct", help="directory or hub id"
    )
    parser.add_argument(
        "--data", nargs=2, default=["builtin:arithmetic"] * 2, help="training and validation set"
    )
    parser.add_argument("--minutes", type=float, default=2.5, help="training time of each method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.methods:
            rows.append(run(name, options, Path(folder) / name))
    print(table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
