"""How time and memory grow with packs, rows and ranks: growth beyond the work is a defect.

    python scripts/fetch_smollm2.py
    python scripts/bench/scale.py

On made-up rows: tokens per second and peak memory of a training step for packs of 512 to
`--longest` tokens (`scripts/bench/step.py`), and seconds and peak memory of the preparation for
1,000 to `--most_rows` rows (`scripts/bench_data.py --second_start`). Then `fit` itself on one rank
and on two, each with one thread and two packs of 512 tokens per step. Two ranks do twice the work
per step, so without overhead they reach twice the tokens per second. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORDS = 150
"""Words of an answer, for rows of about 200 tokens as in Alpaca."""


def main() -> None:
    """Measures packs, rows and ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--longest", type=int, default=16384, help="tokens of the longest pack")
    parser.add_argument("--most_rows", type=int, default=1_000_000)
    parser.add_argument(
        "--only", nargs="+", choices=("packs", "rows", "ranks"), default=["packs", "rows", "ranks"]
    )
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in args.only:
            report[name] = {}
            for size, result in globals()[name](args, Path(work)):
                report[name][size] = result
                print(f"{name} {size}: {result}", flush=True)
    print(json.dumps(report))


def packs(args: argparse.Namespace, work: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Measures a training step with longer and longer packs."""
    length = 512
    while length <= args.longest:
        settings = {**common(args, work), "data.max_length": length, "data.global_batch_size": 1}
        step = last_line(HERE / "step.py", *options(settings))
        yield length, {key: step[key] for key in ("tokens_per_second", "peak_gb", "mfu")}
        length *= 2


def rows(args: argparse.Namespace, work: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Measures the preparation of more and more rows."""
    count = 1000
    while count <= args.most_rows:
        arguments = ("--second_start", str(count), "--tokenizer", str(args.model))
        yield count, last_line(HERE.parent / "bench_data.py", *arguments)
        count *= 10


def ranks(args: argparse.Namespace, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures `fit` on one rank and on two: medians over the steps after the first two."""
    for strategy, devices in (("auto", 1), ("ddp", 2), ("fsdp2", 2)):
        root = work / strategy
        settings = {
            **common(args, work),
            "data.max_length": 512,
            "data.micro_batch_size": 1,
            "data.global_batch_size": 2 * devices,
            "trainer.accelerator": "cpu",
            "trainer.devices": devices,
            "trainer.strategy": strategy,
            "trainer.precision": "bf16-mixed",
            "trainer.max_steps": 8,
            "trainer.log_every_n_steps": 1,
            "trainer.default_root_dir": root,
        }
        run("-m", "lit_sft", "fit", *options(settings), env={"OMP_NUM_THREADS": "1"})
        (metrics,) = root.rglob("metrics.csv")
        with metrics.open() as file:
            steps = [row for row in csv.DictReader(file) if row.get("train/tokens_per_second")][2:]
        names = ("tokens_per_second", "peak_memory_gb", "data_wait")
        yield (
            f"{devices} {strategy}",
            {
                name: round(statistics.median(float(row[f"train/{name}"]) for row in steps), 4)
                for name in names
            },
        )


def common(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Returns the settings that all trainings share, and writes their rows."""
    data = work / "rows.jsonl"
    if not data.exists():
        answer = "it is what it is and so on " * (WORDS // 8)
        made = [
            {"prompt": f"What is {index}?", "completion": answer}
            for index in range(16 * args.longest // WORDS)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in made))
    return {
        "model.model_name_or_path": args.model,
        "model.evaluation": "null",
        "data.train": data,
        "data.cache_dir": work / "cache",
    }


def options(settings: dict[str, Any]) -> list[str]:
    """Formats settings for the command line."""
    return [f"--{key}={value}" for key, value in settings.items()]


def last_line(script: Path, *arguments: str) -> Any:
    """Runs a script and parses its last line as JSON."""
    return json.loads(run(str(script), *arguments).splitlines()[-1])


def run(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Runs a Python program and returns its stdout."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(env or {})}
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(arguments[:3])} failed: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
