"""Trains the same model by lit_sft and by TRL's SFTTrainer; compares held-out loss and exact match.

    python scripts/compare_with_trl.py

Model and task are the built-in ones. For every seed, both sides start from the same random weights.
They train on the 4,190 rows equally often, 32 rows per step, with the token ids and masks of
lit_sft, AdamW, the same cosine schedule and clipping, in fp32. Only the order of the rows differs.
The command `lit_sft test` evaluates both. TRL runs in an environment of its own
(scripts/bench_data.py makes it). The last line is one JSON object.
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
import time
from pathlib import Path
from typing import Any

from bench_data import trl_python

LR, WARMUP, BATCH = 3.0e-3, 0.05, 32


def main() -> None:
    """Trains on both sides with every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--venv",
        type=Path,
        default=Path("~/.cache/lit_sft/trl-venv"),
        help="made where there is none",
    )
    parser.add_argument("--trl", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        train_trl(**args.trl)
        return
    python = trl_python(args.venv.expanduser())
    results: dict[str, list[dict[str, float]]] = {"lit_sft": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            place = Path(scratch) / str(seed)
            start = write_start(seed, place)
            for side, found in results.items():
                began = time.monotonic()
                model = place / side
                settings = {
                    "start": str(start),
                    "output": str(model),
                    "seed": seed,
                    "epochs": args.epochs,
                }
                if side == "trl":
                    run(
                        python,
                        __file__,
                        "--trl",
                        json.dumps({**settings, "rows": str(place / "rows.jsonl")}),
                    )
                else:
                    model = train_lit_sft(**settings)
                found.append(
                    {"seconds": time.monotonic() - began, **test(model, place / f"test_{side}")}
                )
                print(f"seed {seed}, {side}: {json.dumps(found[-1])}", flush=True)
    print(json.dumps({side: summary(found) for side, found in results.items()}))


def summary(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """Returns [mean, standard deviation] over the seeds."""
    names = found[0]
    values = {name: [one[name] for one in found] for name in names}
    spread = {
        name: statistics.stdev(all_) if len(all_) > 1 else 0.0 for name, all_ in values.items()
    }
    return {
        name: [round(statistics.mean(values[name]), 4), round(spread[name], 4)] for name in names
    }


def run(*command: str) -> None:
    """Runs a program on one thread, which is fastest for this small model."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:4])} failed: {done.stderr[-2000:]}")


def write_start(seed: int, place: Path) -> Path:
    """Writes random weights with their tokenizer, and the rows as token ids and masks."""
    import torch

    from lit_sft.datamodule import SFTDataModule
    from lit_sft.model import load
    from lit_sft.model_builder import model_directory

    path = model_directory("builtin:demo")
    model = load.load_model(
        path, init="random", dtype=torch.float32, attn_implementation="sdpa", seed=seed
    )
    model.save_pretrained(place / "start")
    data = SFTDataModule(train="builtin:arithmetic", model_name_or_path=path, max_length=128).data
    data.prepare("fit")
    data.tokenizer.save_pretrained(place / "start")
    with (place / "rows.jsonl").open("w") as file:
        cache = data.caches["train"]
        for index in range(len(cache)):
            input_ids, loss_mask, _ = cache[index]
            file.write(
                json.dumps({"input_ids": input_ids.tolist(), "completion_mask": loss_mask.tolist()})
                + "\n"
            )
    return place / "start"


def train_lit_sft(start: str, output: str, seed: int, epochs: int) -> Path:
    """Trains with the command line, and returns the exported directory."""
    settings: dict[str, Any] = {
        "seed_everything": seed,
        "trainer.default_root_dir": output,
        "trainer.max_epochs": epochs,
        "trainer.check_val_every_n_epoch": epochs,
        "model.model_name_or_path": start,
        "model.init": "pretrained",
        "model.evaluation": "null",
        "model.optimizer.lr": LR,
        "model.lr_schedule": json.dumps({"type": "cosine", "warmup_ratio": WARMUP}),
        "data.packing": "false",
        "data.micro_batch_size": BATCH,
        "data.global_batch_size": BATCH,
        "data.questions": "[]",
    }
    own = [f"--{key}={value}" for key, value in settings.items()]
    run(sys.executable, "-m", "lit_sft", "fit", "--config", "demo", *own)
    return Path(output) / "lightning_logs" / "version_0" / "hf"


def train_trl(start: str, output: str, seed: int, epochs: int, rows: str) -> None:
    """Trains with TRL, in its environment, and writes a model directory."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(start)
    config = SFTConfig(
        output,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        # Below 1, TRL takes it as a share of all steps.
        warmup_steps=WARMUP,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=128,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=100,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(start, dtype="float32"),
        args=config,
        train_dataset=datasets.load_dataset("json", data_files=rows, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(output)


def test(model: Path, root: Path) -> dict[str, float]:
    """Returns loss and exact match on the 300 rows of the test set."""
    own = [
        f"--model.model_name_or_path={model}",
        "--model.init=pretrained",
        f"--trainer.default_root_dir={root}",
    ]
    run(sys.executable, "-m", "lit_sft", "test", "--config", "demo", *own)
    with (root / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    return {name: float(row[f"test/{name}"]) for name in ("loss", "exact_match")}


if __name__ == "__main__":
    main()
