"""Tunes micro-batch, gradient checkpointing and compile for tokens per second under a memory cap.

    python scripts/tune.py --memory_gb 8 --config configs/smollm2_135m.yaml --data.train
    alpaca_en_demo.json

Takes the arguments of `fit`. Every candidate makes a few real steps in a process of its own
(`scripts/bench/step.py`). The micro-batch doubles as long as it divides `data.global_batch_size`,
fits and is faster. From the largest one that fits on, checkpointing and compile are tried. The last
line is one JSON object with the best settings as arguments of `fit`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

STEP = Path(__file__).parent / "bench" / "step.py"


def main() -> None:
    """Measures the candidates and prints the best."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--memory_gb", type=float, required=True, help="most that may be used, in GB (1e9 bytes)"
    )
    parser.add_argument("--largest", type=int, default=64, help="largest micro-batch to try")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help=(
            "try model.compile, too; on by default where there is a GPU (a CPU needs a C++ compiler"
            " for it)"
        ),
    )
    args, settings = parser.parse_known_args()
    tried = list(candidates(args, settings))
    fitting = [result for result in tried if result["peak_gb"] <= args.memory_gb]
    if not fitting:
        sys.exit(
            f"error: nothing fits in {args.memory_gb} GB: lower data.max_length, or set model.lora"
        )
    best = max(fitting, key=lambda result: result["tokens_per_second"])
    print(json.dumps({"best": best.pop("settings"), **best, "candidates": len(tried)}))


def candidates(args: argparse.Namespace, settings: list[str]) -> Iterator[dict[str, Any]]:
    """Yields one result after the other.

    A larger micro-batch is tried only if the smaller one fits. Settings that save memory are tried
    only from the largest micro-batch on that fits.
    """
    largest = 1
    for checkpointing in ("false", "selective", "full"):
        for compiled in ("false", "true") if args.compile else ("false",):
            size, before = largest, 0.0
            while size <= args.largest:
                chosen = {
                    "data.micro_batch_size": str(size),
                    "model.gradient_checkpointing": checkpointing,
                    "model.compile": compiled,
                }
                result = measure(chosen, settings)
                if result is None:
                    break
                yield result
                if result["peak_gb"] > args.memory_gb:
                    break
                largest = max(largest, size)
                if result["tokens_per_second"] < 1.02 * before:
                    break
                size, before = 2 * size, result["tokens_per_second"]


def measure(chosen: dict[str, str], settings: list[str]) -> dict[str, Any] | None:
    """Makes a few steps; returns None if they fail, such as for lack of memory."""
    command = [
        sys.executable,
        str(STEP),
        "--brief",
        *settings,
        *(f"--{key}={value}" for key, value in chosen.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    name = ", ".join(f"{key} {value}" for key, value in chosen.items())
    if done.returncode:
        print(f"{name}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}", flush=True)
        return None
    report = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name}: {report['tokens_per_second']:,.0f} tokens/s, {report['peak_gb']:.2f} GB",
        flush=True,
    )
    return {
        "settings": chosen,
        **{key: report[key] for key in ("tokens_per_second", "peak_gb", "mfu")},
    }


if __name__ == "__main__":
    main()
