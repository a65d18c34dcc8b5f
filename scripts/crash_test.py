"""Kills a run at random moments, resumes it, and compares it bit for bit with an undisturbed run.

    python scripts/crash_test.py --kills 20 --seed 1 --output_dir crash_test -- --config
    configs/demo.yaml ...

The arguments after `--` go to `fit`, on one machine with any `trainer.devices`. SIGKILL hits all
processes of the run during start-up, steps, validations and saves. The comparison covers the rows
of every computed micro-batch, the losses and gradient norms of `metrics.csv`, and the weights of
the last checkpoint. On a CPU, and with deterministic GPU kernels, all must be equal. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lit_sft.checkpoint.io import read_checkpoint

ROWS = "rows"
CLOCK = {
    f"train/{name}"
    for name in (
        "tokens_per_second",
        "tokens_per_second_min",
        "tokens_per_second_max",
        "trained_tokens_per_second",
        "mfu",
        "data_wait",
        "data_wait_max",
        "peak_memory_gb",
    )
}
"""Scalars that always differ between two runs."""


class RecordRows(Callback):
    """Records the rows of every micro-batch, in one file per rank.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        record = [trainer.current_epoch, trainer.global_step, batch_idx, *batch["rows"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank{trainer.global_rank}.txt").open("a") as file:
            file.write(" ".join(map(str, record)) + "\n")


class Run:
    """One run and its attempts.

    Args:
        root: Folder of the run.
        fit_args: Arguments of `fit`.
    """

    def __init__(self, root: Path, fit_args: list[str]) -> None:
        self.root, self.fit_args = root, fit_args
        root.mkdir(parents=True)

    def start(self) -> subprocess.Popen:
        """Starts the run, or resumes it from the newest checkpoint."""
        record = [
            {"class_path": "crash_test.RecordRows", "init_args": {"folder": str(self.root / ROWS)}}
        ]
        ours = [
            "--ckpt_path=last",
            f"--trainer.default_root_dir={self.root}",
            f"--trainer.callbacks={json.dumps(record)}",
        ]
        path = os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        with (self.root / "output.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "lit_sft", "fit", *self.fit_args, *ours],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )

    def records(self) -> dict[str, dict[str, set[str]]]:
        """Returns {file: {(epoch, step, micro-batch): rows}}."""
        found: dict[str, dict[str, set[str]]] = {}
        for path in sorted((self.root / ROWS).iterdir()):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    words = line.split()
                    found.setdefault(path.name, {}).setdefault(" ".join(words[:3]), set()).add(
                        " ".join(words[3:])
                    )
        return found

    def size(self) -> int:
        """Returns the number of recorded bytes, which grows while the run makes progress."""
        return sum(path.stat().st_size for path in (self.root / ROWS).glob("*.txt"))

    @property
    def folder(self) -> Path:
        """The newest `version_N`. There are more only after a kill before the first checkpoint."""
        return max(
            (self.root / "lightning_logs").iterdir(),
            key=lambda path: int(path.name.rpartition("_")[2]),
        )

    def scalars(self) -> list[dict[str, str]]:
        """Returns metrics.csv without columns that depend on the clock."""
        with (self.folder / "metrics.csv").open() as file:
            return [
                {k: v for k, v in row.items() if v and k not in CLOCK}
                for row in csv.DictReader(file)
            ]

    def weights(self) -> dict[str, torch.Tensor]:
        """Loads the weights of the last checkpoint."""
        return read_checkpoint(
            self.folder / "checkpoints" / "last.ckpt", without=("optimizer_states",)
        )["state_dict"]

    def is_saving(self) -> bool:
        """Whether a kill left an incomplete save."""
        return any(self.root.glob("lightning_logs/version_*/checkpoints/.step=*"))


def finish(process: subprocess.Popen, run: Run) -> float:
    """Waits for the end of a run, and returns the seconds since its first step."""
    started = run.size()
    while process.poll() is None and run.size() == started:
        time.sleep(0.02)
    first_step = time.monotonic()
    if process.wait() != 0:
        raise SystemExit(f"the run ended with {process.returncode}: see {run.root / 'output.txt'}")
    return time.monotonic() - first_step


def kill_at_random(run: Run, seconds: float, generator: random.Random) -> bool:
    """Starts or resumes the run and kills it; returns False if it ended before.

    Args:
        run: The run.
        seconds: Duration of the whole run from its first step.
        generator: Draws the moment: in 9 of 10 cases after the first step, else during start-up.
    """
    process, started = run.start(), run.size()
    if generator.random() < 0.9:
        while process.poll() is None and run.size() == started:
            time.sleep(0.002)
        delay = generator.uniform(0, seconds)
    else:
        delay = generator.uniform(0, 10)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    if process.returncode != 0:
        raise SystemExit(
            f"a resumed run ended with {process.returncode}: see {run.root / 'output.txt'}"
        )
    return False


def differences(run: Run, reference: Run) -> Iterator[str]:
    """Lists the differences of two runs."""
    ours, theirs = run.records(), reference.records()
    if ours != theirs:
        yield "rows of the micro-batches"
    if run.scalars() != reference.scalars():
        yield "metrics.csv"
    weights, expected = run.weights(), reference.weights()
    if weights.keys() != expected.keys() or not all(
        torch.equal(weights[k], expected[k]) for k in expected
    ):
        yield "weights"


def main() -> None:
    """Makes both runs and prints the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="stop killing after so many")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="or after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output_dir", default="crash_test", help="emptied first")
    parser.add_argument("fit_args", nargs="*", help="arguments of `fit`")
    args = parser.parse_args()
    started, root = time.monotonic(), Path(args.output_dir).absolute()
    shutil.rmtree(root, ignore_errors=True)
    reference, run = Run(root / "reference", args.fit_args), Run(root / "killed", args.fit_args)
    seconds = finish(reference.start(), reference)
    generator, kills, in_saves, runs = random.Random(args.seed), 0, 0, 1
    while kills < args.kills and time.monotonic() - started < 60 * args.minutes:
        if kill_at_random(run, seconds, generator):
            kills, in_saves = kills + 1, in_saves + run.is_saving()
            continue
        if found := list(differences(run, reference)):
            break
        # The run ended before the kill, so it starts again.
        shutil.rmtree(run.root)
        run, runs = Run(run.root, args.fit_args), runs + 1
    else:
        finish(run.start(), run)
        found = list(differences(run, reference))
    result = {
        "kills": kills,
        "in_saves": in_saves,
        "runs": runs,
        "steps": len(reference.scalars()),
        "differ": found,
    }
    print(json.dumps({**result, "seconds": round(time.monotonic() - started)}))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
