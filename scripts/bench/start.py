"""Start-up time: help, configuration, and from the command to the first training step.

    python scripts/fetch_smollm2.py
    python scripts/bench/start.py --data alpaca_en_demo.json

Measures processor seconds of `import torch, lightning`, of `fit --help` and of `fit
--print_config`. Then, with tokenized data, it measures seconds from the command to the first batch,
beside those of a program that only loads the same model. All are medians of the repetitions. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

HERE = Path(__file__).parent
IMPORT = "import torch, lightning"
LOAD = (
    "import sys, torch; from transformers import AutoModelForCausalLM; "
    "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)"
)


class EndAtFirstBatch(Callback):
    """Prints the time of the first batch, and ends the program."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints the time."""
        print(f"first batch at {time.time()}", flush=True)
        os._exit(0)


def main() -> None:
    """Measures all start-up times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    commands = {
        "import": ["-c", IMPORT],
        "help": ["-m", "lit_sft", "fit", "--help"],
        "print_config": ["-m", "lit_sft", "fit", "--print_config"],
    }
    report: dict[str, Any] = {}
    for name, command in commands.items():
        report[f"{name}_cpu_seconds"] = _median(
            args, lambda command=command: _processor_seconds(command)
        )  # type: ignore[misc]
    for name in ("help", "print_config"):
        report[f"{name}_ratio"] = round(
            report[f"{name}_cpu_seconds"] / report["import_cpu_seconds"], 2
        )
    with tempfile.TemporaryDirectory() as work:
        # Tokenizes.
        _first_batch(args, work)
        report["load_seconds"] = _median(args, lambda: _seconds(["-c", LOAD, str(args.model)]))
        report["first_step_seconds"] = _median(args, lambda: _first_batch(args, work))
    report["beyond_loading_seconds"] = round(
        report["first_step_seconds"] - report["load_seconds"], 2
    )
    print(json.dumps(report))


def _median(args: argparse.Namespace, measure: Any) -> float:
    return round(statistics.median(measure() for _ in range(args.repetitions)), 2)


def _run(command: list[str]) -> str:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:3])} failed: {done.stderr[-2000:]}")
    return done.stdout


def _processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    _run(command)
    return time.perf_counter() - started


def _first_batch(args: argparse.Namespace, work: str) -> float:
    settings = {
        "model.model_name_or_path": args.model,
        "model.evaluation": "null",
        "data.train": args.data,
        "data.questions": "[]",
        "data.cache_dir": f"{work}/cache",
        "trainer.default_root_dir": work,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "start.EndAtFirstBatch",
    }
    started = time.time()
    out = _run(["-m", "lit_sft", "fit", *(f"--{key}={value}" for key, value in settings.items())])
    found = re.search(r"first batch at ([\d.]+)", out)
    assert found, out[-2000:]
    return float(found[1]) - started


if __name__ == "__main__":
    main()
