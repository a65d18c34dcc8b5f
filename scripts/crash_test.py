"""Kills a run at random moments, resumes it, and compares it bit for bit with an undisturbed run.

    python scripts/crash_test.py --kills 20 --full_disks 5 --predict builtin:arithmetic
    python scripts/crash_test.py --kills 20 --seed 1 --output_dir crash_test -- --config
    configs/demo.yaml ...

The arguments after `--` go to `fit`, on one machine with any `trainer.devices`. SIGKILL hits all
processes of the run during start-up, steps, validations, saves and the export; with several ranks,
`--one_rank` kills a single process in half of the cases, and the others must end by themselves.
`--full_disks N` also fills the disk N times: no file may grow beyond a random size, at most that of
a checkpoint. With `--predict ROWS`, the finished run answers these rows, and `predict` is killed,
too.

The comparison covers the rows of every computed micro-batch, the losses and gradient norms of
`metrics.csv`, the weights of the last checkpoint and of `hf/`, and the predictions. On a CPU, and
with deterministic GPU kernels, all must be equal. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lit_sft.checkpoint.io import read_checkpoint

ROWS = "rows"
VALIDATING = "validating"
"""File beside the recorded rows that exists during a validation."""
PREDICTIONS = "predictions.jsonl"
MOMENTS = {"start": 1, "step": 3, "any": 1, "validation": 2, "save": 3, "export": 1}
"""When a run is killed, and how often."""
SIGNS = {
    "validation": f"{ROWS}/{VALIDATING}",
    "save": "lightning_logs/version_*/checkpoints/.step=*",
    "export": "lightning_logs/version_*/.hf.*",
    "predict": f".{PREDICTIONS}.part*",
}
"""What exists below the folder of the run only during such a moment."""
LONGEST = {"validation": 0.5, "save": 0.03, "export": 0.05, "predict": 3.0}
"""Seconds between the sign of a moment and the kill, at most."""
PATIENCE = 120
"""Seconds after which ranks that have lost one of them hang."""
DEMO = [
    "--config=demo",
    "--trainer.max_steps=40",
    "--trainer.val_check_interval=10",
    "--checkpoint.every_n_train_steps=5",
]
"""Arguments of `fit` if none are given."""
SMALLEST_FILE = 100_000
"""Bytes that a file may have on a full disk, so that log lines can still be written."""
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

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / VALIDATING).touch()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.folder / VALIDATING).unlink(missing_ok=True)


class Run:
    """One run and its attempts.

    Args:
        root: Folder of the run.
        fit_args: Arguments of `fit`.
    """

    def __init__(self, root: Path, fit_args: list[str]) -> None:
        self.root, self.fit_args = root, fit_args
        root.mkdir(parents=True)

    def start(self, largest_file: int | None = None) -> subprocess.Popen:
        """Starts the run, or resumes it from the newest checkpoint.

        Args:
            largest_file: The number of bytes that a file may have. None for no limit.
        """
        (self.root / ROWS / VALIDATING).unlink(missing_ok=True)
        record = [
            {"class_path": "crash_test.RecordRows", "init_args": {"folder": str(self.root / ROWS)}}
        ]
        ours = [
            f"--trainer.default_root_dir={self.root}",
            f"--trainer.callbacks={json.dumps(record)}",
        ]
        if any(self.root.glob("lightning_logs/*/checkpoints/step=*.ckpt")):
            ours.append("--ckpt_path=last")
        return self._process(["fit", *self.fit_args, *ours], largest_file)

    def predict(self, rows: str) -> subprocess.Popen:
        """Starts or continues the predictions of the finished run."""
        asked = [f"--data.predict={rows}", f"--predict_output={self.root / PREDICTIONS}"]
        return self._process(["predict", f"--ckpt_path={self.folder}", *asked])

    def _process(self, command: list[str], largest_file: int | None = None) -> subprocess.Popen:
        path = os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )

        def limit_files() -> None:
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        with (self.root / "output.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "lit_sft", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
                preexec_fn=limit_files,
            )

    def records(self) -> dict[str, dict[str, set[str]]]:
        """Returns {file: {(epoch, step, micro-batch): rows}}."""
        found: dict[str, dict[str, set[str]]] = {}
        for path in sorted((self.root / ROWS).glob("*.txt")):
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

    def exported(self) -> dict[str, bytes]:
        """Returns the weight files of `hf/` by name."""
        return {path.name: path.read_bytes() for path in (self.folder / "hf").glob("*.safetensors")}

    def predictions(self) -> str | None:
        """Returns the predictions; None if none were asked for."""
        path = self.root / PREDICTIONS
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def signs(self, moment: str) -> set[tuple[Path, int]]:
        """Returns the files and folders that exist only during a moment; none if it has no sign.

        A kill leaves them behind, so each comes with its inode: a new one has another.
        """
        found: set[tuple[Path, int]] = set()
        if moment not in SIGNS:
            return found
        for path in self.root.glob(SIGNS[moment]):
            with suppress(FileNotFoundError):
                found.add((path, path.stat().st_ino))
        return found

    def checkpoint_size(self) -> int:
        """Returns the bytes of the largest file below the checkpoints."""
        files = (self.folder / "checkpoints").rglob("*")
        return max(path.stat().st_size for path in files if path.is_file())


def finish(process: subprocess.Popen, run: Run) -> float:
    """Waits for the end of a run, and returns the seconds since its first step."""
    started = run.size()
    while process.poll() is None and run.size() == started:
        time.sleep(0.02)
    first_step = time.monotonic()
    if process.wait() != 0:
        raise SystemExit(f"the run ended with {process.returncode}: see {run.root / 'output.txt'}")
    return time.monotonic() - first_step


def moments(chosen: list[str], generator: random.Random) -> Iterator[str]:
    """Draws the moments of kills without end, each of the chosen ones as often as `MOMENTS` says.

    The export comes last in each round: a run that is killed there has nothing left but the export.
    """
    others = [moment for moment in chosen if moment != "export" for _ in range(MOMENTS[moment])]
    while True:
        generator.shuffle(others)
        yield from others
        if "export" in chosen:
            yield "export"


def kill_at(
    moment: str, run: Run, seconds: float, generator: random.Random, alone: bool
) -> str | None:
    """Starts or resumes the run and kills it.

    Args:
        moment: One of `MOMENTS`.
        run: The run.
        seconds: Duration of the whole run from its first step.
        generator: Draws the time within the moment.
        alone: Whether only one rank is killed.

    Returns:
        The moment that was hit; `any` if the wanted one was over. None if the run ended before.
    """
    left = run.signs(moment)
    process = run.start()
    if moment in SIGNS:
        wait_for_sign(process, run, moment, left)
        delay = generator.uniform(0, LONGEST[moment])
    elif moment == "start":
        delay = generator.uniform(0, 10)
    elif moment == "any":
        wait_for_rows(process, run, 1)
        delay = generator.uniform(0, seconds)
    else:
        wait_for_rows(process, run, generator.randint(1, 6))
        delay = generator.uniform(0, 0.2)
    if not was_killed(process, delay, run, generator if alone else None):
        return None
    return "any" if moment in SIGNS and run.signs(moment) <= left else moment


def wait_for_sign(
    process: subprocess.Popen, run: Run, moment: str, left: set[tuple[Path, int]]
) -> None:
    """Waits until a moment begins or the run ends.

    Args:
        process: The run's process.
        run: The run.
        moment: One of `SIGNS`.
        left: Signs that earlier kills have left behind.
    """
    while process.poll() is None and run.signs(moment) <= left:
        time.sleep(0.001)


def wait_for_rows(process: subprocess.Popen, run: Run, records: int) -> None:
    """Waits until further micro-batches have begun, or the run ends."""
    for _ in range(records):
        before = run.size()
        while process.poll() is None and run.size() == before:
            time.sleep(0.001)


def was_killed(
    process: subprocess.Popen, delay: float, run: Run, alone: random.Random | None = None
) -> bool:
    """Kills a process group, or one rank of it, after some seconds.

    Args:
        process: The first process of the group.
        delay: Seconds.
        run: The run.
        alone: Draws the rank. None kills all.

    Returns:
        Whether it was killed; False if it ended before.

    Raises:
        SystemExit: It ended with an error, or other ranks hang.
    """
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        if alone is None:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(alone.choice(ranks(process)), signal.SIGKILL)
        wait_for_all(process, run)
        return True
    if process.returncode != 0:
        raise SystemExit(
            f"a resumed run ended with {process.returncode}: see {run.root / 'output.txt'}"
        )
    return False


def ranks(process: subprocess.Popen) -> list[int]:
    """Returns the processes of the ranks: the first, and those that it has launched."""
    found = [process.pid]
    for pid in members(process):
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"\0LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes() and pid not in found:
                found.append(pid)
    return found


def members(process: subprocess.Popen) -> list[int]:
    """Returns the living processes of the group that a process leads."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # The name in parentheses may hold spaces.
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_for_all(process: subprocess.Popen, run: Run) -> None:
    """Waits until no process of a group is left.

    Raises:
        SystemExit: One is left after `PATIENCE` seconds.
    """
    end = time.monotonic() + PATIENCE
    while members(process):
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(f"ranks hang after a kill: see {run.root / 'output.txt'}")
        time.sleep(0.05)
    process.wait()


def fill_disk(run: Run, size: int, generator: random.Random) -> bool:
    """Starts or resumes the run while no file may grow beyond a random size.

    Args:
        run: The run.
        size: Bytes of the largest file of a checkpoint.
        generator: Draws the size.

    Returns:
        Whether the run ended with an error, as it must when a file cannot be written.
    """
    process = run.start(generator.randint(SMALLEST_FILE, size))
    is_failed = process.wait() != 0
    wait_for_all(process, run)
    return is_failed


def predict_with_kills(run: Run, rows: str, kills: int, generator: random.Random) -> int:
    """Lets a finished run answer, with kills; returns their number."""
    done = 0
    for _ in range(kills):
        left = run.signs("predict")
        process = run.predict(rows)
        wait_for_sign(process, run, "predict", left)
        done += was_killed(process, generator.uniform(0, LONGEST["predict"]), run)
    if run.predict(rows).wait() != 0:
        raise SystemExit(f"predict ended with an error: see {run.root / 'output.txt'}")
    return done


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
    if run.exported() != reference.exported():
        yield "hf/"
    if run.predictions() != reference.predictions():
        yield "predictions"


def main() -> None:
    """Makes both runs and prints the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="stop killing after so many")
    parser.add_argument("--full_disks", type=int, default=0, help="fill the disk so many times")
    parser.add_argument("--predict", help="rows that the finished run answers, as data.predict")
    parser.add_argument("--predict_kills", type=int, default=2, help="kills of `predict`")
    parser.add_argument(
        "--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS), help="of the kills"
    )
    parser.add_argument(
        "--one_rank", action="store_true", help="kill a single rank in half of the cases"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="or after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output_dir", default="crash_test", help="emptied first")
    parser.add_argument(
        "fit_args", nargs="*", help="arguments of `fit`; default: the built-in model"
    )
    args = parser.parse_args()
    fit_args = args.fit_args or DEMO
    started, root = time.monotonic(), Path(args.output_dir).absolute()
    shutil.rmtree(root, ignore_errors=True)
    reference, run = Run(root / "reference", fit_args), Run(root / "killed", fit_args)
    seconds = finish(reference.start(), reference)
    generator = random.Random(args.seed)
    wanted = moments(args.moments, generator)
    moment = next(wanted)
    kills: Counter[str] = Counter()
    full_disks, of_one_rank, runs, found = 0, 0, 1, []
    while kills.total() < args.kills or full_disks < args.full_disks:
        if time.monotonic() - started > 60 * args.minutes:
            break
        if full_disks < args.full_disks and generator.random() < 0.5:
            full_disks += fill_disk(run, reference.checkpoint_size(), generator)
            continue
        alone = args.one_rank and generator.random() < 0.5
        hit = kill_at(moment, run, seconds, generator, alone)
        moment = next(wanted)
        if hit is not None:
            kills[hit] += 1
            of_one_rank += alone
            print(f"kill {kills.total()}: {hit}", file=sys.stderr)
            continue
        found = list(differences(run, reference))
        if found:
            break
        # The run ended before the kill, so it starts again.
        shutil.rmtree(run.root)
        run, runs = Run(run.root, fit_args), runs + 1
    if not found:
        finish(run.start(), run)
        if args.predict is not None:
            predict_with_kills(reference, args.predict, 0, generator)
            asked = args.predict_kills
            kills["predict"] = predict_with_kills(run, args.predict, asked, generator)
        found = list(differences(run, reference))
    result = {
        "kills": kills.total(),
        **kills,
        "of_one_rank": of_one_rank,
        "full_disks": full_disks,
        "runs": runs,
        "steps": len(reference.scalars()),
        "differ": found,
    }
    print(json.dumps({**result, "seconds": round(time.monotonic() - started)}))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
