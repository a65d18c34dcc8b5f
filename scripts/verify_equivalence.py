"""Makes the same run in many ways; compares losses, gradient norms and weights with a plain run.

    python scripts/verify_equivalence.py
    python scripts/verify_equivalence.py --only ddp fsdp2 --optimizers sgd

The built-in model from random weights on made-up conversations, fp32 on the CPU (ranks talk over
gloo), constant learning rate. An epoch has steps of 16, 16 and 5 rows: the last window is partial,
its rows are uneven over ranks, and one rank gets a micro-batch without a target. Plain SGD without
clipping shows a gradient that is wrong by a constant factor, which AdamW with clipping would hide;
both are run.

Prints a table of the largest relative differences of losses, gradient norms and weight tensors
(norm of the difference by norm). Exit code 1 if one is above 1e-5. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

LIMIT, BF16_LIMIT = 1e-5, 1e-2
"""Tolerance in bf16, where products of other shapes round differently.

Gradients that are not reduced over 2 ranks would differ by 0.7.
"""
ROWS = 37
EPOCHS = 2
GLOBAL_BATCH = 16
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.1,
        "trainer.gradient_clip_val": None,
    },
    "adamw": {
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 1e-3,
        "trainer.gradient_clip_val": 0.5,
    },
}


def own_logits() -> AbstractContextManager[Any]:
    """Replaces the chunked loss by the full logits of the model."""
    from lit_sft.model.loss import CausalLMLoss

    return mock.patch.object(
        CausalLMLoss, "check_head", lambda self: setattr(self, "own_logits", True)
    )


def small_chunks() -> AbstractContextManager[Any]:
    """Makes the chunks of the head small. By default all targets fit into one chunk."""
    from lit_sft.model import loss

    return mock.patch.object(loss, "CHUNK_ELEMENTS", 320 * 7)


@dataclass(frozen=True)
class Variant:
    """A way to make the run."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from `BASE`."""
    like: str = "one process"
    """The variant that must give the same result."""
    nodes: int = 1
    """Launched by as many torchrun agents."""
    resumed_at: int | None = None
    """Optimizer steps after which the run resumes from its checkpoint; later steps are lost."""
    resume_with: dict[str, Any] = field(default_factory=dict)
    """Settings that change on the resume."""
    patch: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    needs_compiler: bool = False

    @property
    def limit(self) -> float:
        """The largest difference that counts as rounding."""
        return BF16_LIMIT if self.settings.get("trainer.precision") == "bf16-mixed" else LIMIT


FSDP2 = "lit_sft.distributed.fsdp2.FSDP2Strategy"
FSDP2_OPTIONS = {
    "cpu_offload": True,
    "reshard_after_forward": False,
    "sync_every_micro_batch": False,
}
TWO_RANKS = {"trainer.devices": 2, "data.micro_batch_size": 2}
# One step per epoch: the only way to have the same examples in each step, packed and not.
ONE_STEP = {"data.global_batch_size": 64, "data.micro_batch_size": 1, "trainer.max_epochs": 3}
LORA = {"model.lora.r": 4, "model.lora.lora_alpha": 16}
BF16 = {"trainer.precision": "bf16-mixed"}
# Before, during and after training; the weights are cast for them meanwhile.
ANSWERS = {
    "data.questions": ["abc"],
    "model.evaluation.num_samples": 2,
    "model.generation.max_new_tokens": 4,
}
VARIANTS = {
    "one process": Variant(),
    "accumulation of 4": Variant({"data.micro_batch_size": 4}),
    "accumulation of 16": Variant({"data.micro_batch_size": 1}),
    "own logits": Variant(patch=own_logits),
    "head in small chunks": Variant(patch=small_chunks),
    # With its masks for packs.
    "transformers' sdpa": Variant({"model.attn_implementation": "sdpa"}),
    "activation checkpointing": Variant({"model.gradient_checkpointing": True}),
    "selective checkpointing": Variant({"model.gradient_checkpointing": "selective"}),
    "compile": Variant({"model.compile": True}, needs_compiler=True),
    "2 data workers": Variant({"data.num_workers": 2}),
    "resumed in the middle": Variant({"data.micro_batch_size": 4}, resumed_at=4),
    "ddp": Variant({**TWO_RANKS, "trainer.strategy": "ddp"}),
    "ddp, 2 nodes, torchrun": Variant(
        {"trainer.num_nodes": 2, "data.micro_batch_size": 2, "trainer.strategy": "ddp"}, nodes=2
    ),
    "ddp, resumed on one": Variant(
        {**TWO_RANKS, "trainer.strategy": "ddp"},
        resumed_at=4,
        resume_with={"trainer.devices": 1, "trainer.strategy": "auto"},
    ),
    "fsdp2": Variant({**TWO_RANKS, "trainer.strategy": "fsdp2"}),
    "fsdp2, resumed": Variant({**TWO_RANKS, "trainer.strategy": "fsdp2"}, resumed_at=4),
    "fsdp2, offloaded, reduced once": Variant(
        {**TWO_RANKS, "trainer.strategy": {"class_path": FSDP2, "init_args": FSDP2_OPTIONS}}
    ),
    "fsdp2, checkpointing, compile": Variant(
        {
            **TWO_RANKS,
            "trainer.strategy": "fsdp2",
            "model.gradient_checkpointing": True,
            "model.compile": True,
        },
        needs_compiler=True,
    ),
    "one step per epoch": Variant(ONE_STEP, like="one step per epoch"),
    "packed": Variant(
        {**ONE_STEP, "data.packing": True, "data.micro_batch_size": 2}, like="one step per epoch"
    ),
    "lora": Variant(LORA, like="lora"),
    "lora, ddp": Variant({**LORA, **TWO_RANKS, "trainer.strategy": "ddp"}, like="lora"),
    "lora, fsdp2": Variant({**LORA, **TWO_RANKS, "trainer.strategy": "fsdp2"}, like="lora"),
    "bf16": Variant(BF16, like="bf16"),
    "bf16, accumulation of 4": Variant({**BF16, "data.micro_batch_size": 4}, like="bf16"),
    "bf16, answers": Variant({**BF16, **ANSWERS}, like="bf16"),
    "bf16, ddp, answers": Variant(
        {**BF16, **ANSWERS, **TWO_RANKS, "trainer.strategy": "ddp"}, like="bf16"
    ),
    "bf16, fsdp2, answers": Variant(
        {**BF16, **ANSWERS, **TWO_RANKS, "trainer.strategy": "fsdp2"}, like="bf16"
    ),
}


def base(train: str, root: Path) -> dict[str, Any]:
    """Settings of the plain run."""
    return {
        "seed_everything": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.max_epochs": EPOCHS,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": root,
        "trainer.enable_progress_bar": False,
        "model.model_name_or_path": "builtin:demo",
        "model.init": "random",
        "model.evaluation": None,
        "model.lr_schedule.type": "constant",
        "model.lr_schedule.warmup_ratio": 0.0,
        "data.train": train,
        "data.max_length": 256,
        "data.packing": False,
        "data.global_batch_size": GLOBAL_BATCH,
        "data.micro_batch_size": GLOBAL_BATCH,
        "data.cache_dir": root.parent / "cache",
        "data.questions": [],
    }


@dataclass(frozen=True)
class Result:
    """The results of a run."""

    loss: list[float]
    """Of each optimizer step."""
    grad_norm: list[float]
    """Of each optimizer step, before clipping."""
    weights: dict[str, torch.Tensor]
    """Of the last checkpoint, by name."""


def write_rows(path: Path, count: int = ROWS) -> str:
    """Makes conversations of different lengths, with one or two turns."""
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choice("abcdefgh") * 3 for _ in range(draw.randint(1, most)))

    with path.open("w") as file:
        for index in range(count):
            turns = 2 if index % 3 else 4
            roles = ("user", "assistant")
            messages = [{"role": roles[turn % 2], "content": words(12)} for turn in range(turns)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def train(
    variant: Variant,
    optimizer: str,
    train_file: str,
    root: Path,
    start: Callable[[dict[str, Any], int], None] | None = None,
) -> Result:
    """Makes the run in a folder of its own, and reads its results.

    Args:
        variant: The way to make it.
        optimizer: A key of `OPTIMIZERS`.
        train_file: The rows.
        root: The folder.
        start: Takes settings and a number of nodes, and runs `fit`.
    """
    start = start or fit
    settings = {**base(train_file, root), **OPTIMIZERS[optimizer], **variant.settings}
    with variant.patch():
        if variant.resumed_at is not None:
            start(
                {**settings, "checkpoint.every_n_train_steps": 1, "checkpoint.keep_last": 99},
                variant.nodes,
            )
            for path in root.glob("lightning_logs/version_0/checkpoints/*=*.ckpt"):
                if int(path.stem.partition("=")[2]) > variant.resumed_at:
                    (
                        shutil.rmtree(path)
                        if path.is_dir() and not path.is_symlink()
                        else path.unlink()
                    )
            settings |= {"ckpt_path": "last", **variant.resume_with}
        start(settings, variant.nodes)
    return read(root)


def fit(settings: dict[str, Any], nodes: int = 1) -> None:
    """Runs `fit`: one rank in this process, several by Lightning's launcher or by torchrun."""
    args = ["fit", *options(settings)]
    if settings["trainer.devices"] == 1 and nodes == 1:
        from lit_sft.cli.main import main

        with mock.patch.object(sys, "argv", ["lit_sft"]), contextlib.redirect_stdout(io.StringIO()):
            main(args)
        return
    commands = [[sys.executable, "-m", "lit_sft", *args]]
    if nodes > 1:
        agent = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={nodes}",
            "--nproc_per_node=1",
        ]
        agent += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}"]
        commands = [
            [*agent, f"--node_rank={node}", "-m", "lit_sft", *args] for node in range(nodes)
        ]
    # Lightning sets LOCAL_RANK in a run of this process. The launcher would then wait for other
    # ranks.
    of_ranks = ("SLURM_", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(of_ranks)}
    running = [
        subprocess.Popen(
            command,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in running:
            process.kill()


def read(root: Path) -> Result:
    """Reads losses and gradient norms from metrics.csv, and weights from the last checkpoint."""
    from lit_sft.checkpoint.io import read_checkpoint

    folder = root / "lightning_logs" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    loss, grad_norm = (
        [float(row[key]) for row in rows if row.get(key)]
        for key in ("train/loss", "train/grad_norm")
    )
    return Result(
        loss, grad_norm, read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    )


def differences(ours: Result, theirs: Result) -> dict[str, float]:
    """Returns the largest relative difference of losses, gradient norms and weights.

    It is infinite if their numbers differ.
    """
    if len(ours.loss) != len(theirs.loss) or ours.weights.keys() != theirs.weights.keys():
        return dict.fromkeys(("loss", "grad_norm", "weights"), float("inf"))
    pairs = [(ours.weights[name], weight) for name, weight in theirs.weights.items()]
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(ours.loss, theirs.loss, strict=True)),
        "grad_norm": max(
            abs(a - b) / abs(b) for a, b in zip(ours.grad_norm, theirs.grad_norm, strict=True)
        ),
        "weights": max(float((a - b).norm() / b.norm()) for a, b in pairs),
    }


def missing(variant: Variant) -> str | None:
    """Returns the reason why a variant cannot run here; None if it can."""
    compiler = os.environ.get("CXX", "g++")
    return (
        f"no C++ compiler ({compiler})"
        if variant.needs_compiler and shutil.which(compiler) is None
        else None
    )


def options(settings: dict[str, Any]) -> list[str]:
    """Returns the settings as options of the command line."""
    return [f"--{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def compare(names: list[str], optimizer: str, scratch: Path) -> list[dict[str, Any]]:
    """Runs the variants, compares each with its reference, and prints a line for each."""
    rows, done, table = write_rows(scratch / "train.jsonl"), {}, []
    for name in names:
        variant, started = VARIANTS[name], time.monotonic()
        line: dict[str, Any] = {"optimizer": optimizer, "variant": name, "limit": variant.limit}
        if (reason := missing(variant)) is not None:
            print(f"| {optimizer} | {name} | skipped: {reason} | | | |", flush=True)
            table.append({**line, "skipped": reason})
            continue
        done[name] = train(variant, optimizer, rows, scratch / optimizer / name.replace(" ", "_"))
        if name == variant.like:
            cells = [
                f"{value:.6f}" for value in (done[name].loss[-1], done[name].grad_norm[-1])
            ] + ["reference"]
        else:
            line |= differences(done[name], done[variant.like])
            cells = [f"{line[key]:.1e}" for key in ("loss", "grad_norm", "weights")]
        print(
            f"| {optimizer} | {name} | {' | '.join(cells)} | {time.monotonic() - started:.0f} s |",
            flush=True,
        )
        table.append(line)
    return table


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, help="these, beside what they must equal"
    )
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    args = parser.parse_args()
    wanted = args.only or list(VARIANTS)
    names = [
        name
        for name in VARIANTS
        if name in wanted or name in {VARIANTS[other].like for other in wanted}
    ]
    print(
        "| optimizer | variant | loss | gradient norm | weights | time"
        " |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        table = [
            line
            for optimizer in args.optimizers
            for line in compare(names, optimizer, Path(scratch))
        ]
    keys = ("loss", "grad_norm", "weights")
    off = [line for line in table if not all(line.get(key, 0.0) <= line["limit"] for key in keys)]
    print(json.dumps({"off": [f"{o['optimizer']}, {o['variant']}" for o in off], "runs": table}))
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
