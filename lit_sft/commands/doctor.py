"""`doctor`: checks data, steps, memory and disk before a run, and makes two real steps."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lit_sft.console import console
from lit_sft.data.packing import Packs
from lit_sft.data.sampler import StepOrder
from lit_sft.data.stats import Counts
from lit_sft.datamodule import SFTDataModule
from lit_sft.errors import UserError
from lit_sft.memory_plan import Plan, needed_memory
from lit_sft.model import memory_estimate
from lit_sft.model_builder import refuse_adapter
from lit_sft.module import SFTModule
from lit_sft.preprocessing import num_overlapping

log = logging.getLogger(__name__)

GIB = 2**30
LABELS = {
    "rows_read": "rows read",
    "rows_kept": "rows kept",
    "dropped": "rows dropped",
    "trained_token_share": "tokens trained",
    "stop_tokens": "stop tokens trained",
    "duplicates": "rows that are copies",
    "overlap": "validation rows in train",
    "pack_fill": "packs filled",
    "steps_per_epoch": "steps per epoch",
    "tokens_per_step": "tokens per step",
    "memory": "memory expected",
}
"""Key of the JSON report -> label in the table. The value is null if it is not known."""
BARS = 12
"""Bars of the histogram of lengths."""


def doctor(
    trainer: L.Trainer,
    plan: Plan,
    module: SFTModule,
    datamodule: SFTDataModule,
    output: Literal["rich", "json"],
) -> int:
    """Checks a configuration before it is run.

    Args:
        trainer: Trainer for two steps on one device.
        plan: Devices of the planned run.
        module: The module of the run.
        datamodule: Its training and validation sets are examined.
        output: `rich`: tables; `json`: one object on stdout.

    Returns:
        The exit code: 1 if the report has an error, else 0.
    """
    report: dict[str, Any] = {**dict.fromkeys(LABELS), "warnings": [], "errors": []}
    lengths = np.zeros(0, dtype=np.int64)
    step = None
    try:
        refuse_adapter(module.options)
        datamodule.prepare("fit")
        lengths = datamodule.data.caches["train"].lengths
        report |= _examine_data(datamodule, report)
        packs, options = datamodule.pack("train"), datamodule.options
        # Only the checks of the constructor are wanted: it refuses batch sizes that do not fit.
        StepOrder(
            len(packs), options.global_batch_size, options.micro_batch_size, plan.devices, seed=0
        )
        report["memory"] = _expect_memory(trainer, plan, module, datamodule, report)
        alone = needed_memory(trainer, module, datamodule).total
        if plan.sharded and alone > report["memory"]["available"]:
            report["warnings"].append(
                f"no step was tried: one device alone would need {alone / GIB:.1f} GiB"
            )
        else:
            step = _try_step(trainer, module, datamodule)
            took = step["peak_bytes"] / GIB
            log.info(
                f"memory of a real step on one device: {took:.2f} GiB, expected"
                f" {alone / GIB:.2f} GiB"
            )
    except (UserError, torch.OutOfMemoryError) as error:
        report["errors"].append(" ".join(str(error).split()))
    if output == "json":
        print(json.dumps(report))
    else:
        _show(report, lengths, step)
    return 1 if report["errors"] else 0


def _examine_data(datamodule: SFTDataModule, report: dict[str, Any]) -> dict[str, Any]:
    """Returns the counts of the training set, and adds its problems to the report."""
    data, options = datamodule.data, datamodule.options
    cache, tokenizer = data.caches["train"], data.tokenizer
    counts = Counts(**cache.meta)
    warnings: list[str] = report["warnings"]
    warnings += counts.lines("train")[1:]
    if not counts.stop_ids and options.format != "text":
        report["errors"].append(
            "no stop token is trained: the model would not learn to end; check data.chat_template"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        warnings.append("pad and eos are one token: harmless here, masks go by position")
    if tokenizer.bos_token_id is not None:
        first = [cache[index][0][:2].tolist() for index in range(min(len(cache), 100))]
        if any(ids == [tokenizer.bos_token_id] * 2 for ids in first):
            report["errors"].append(
                "examples begin with two BOS tokens: remove bos_token from data.chat_template"
            )
    overlap = 0
    if "validation" in data.caches:
        overlap = num_overlapping(cache, data.caches["validation"])
    if overlap:
        warnings.append(f"{overlap:,} validation rows are in the training set too")
    packs = datamodule.pack("train")
    pack_fill = None
    if options.packing:
        pack_fill = float(packs.num_tokens(cache.lengths).mean() / options.max_length)
    steps = -(-len(packs) // options.global_batch_size)
    return {
        "rows_read": counts.rows_read,
        "rows_kept": counts.rows_kept,
        "dropped": dict(counts.dropped),
        "trained_token_share": counts.trained_tokens / max(1, counts.tokens),
        "stop_tokens": tokenizer.convert_ids_to_tokens(counts.stop_ids),
        "duplicates": counts.duplicates,
        "overlap": overlap,
        "pack_fill": pack_fill,
        "steps_per_epoch": steps,
        "tokens_per_step": counts.tokens / steps,
    }


def _expect_memory(
    trainer: L.Trainer,
    plan: Plan,
    module: SFTModule,
    datamodule: SFTDataModule,
    report: dict[str, Any],
) -> dict[str, int]:
    """Returns the expected memory of a step in bytes, and adds a lack of memory or disk."""
    expected = needed_memory(trainer, module, datamodule, plan)
    device = trainer.strategy.root_device
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = psutil.virtual_memory().available
    if expected.total > available:
        where = " on each device" if plan.devices > 1 else ""
        report["errors"].append(
            f"the step needs about {expected.total / GIB:.1f} GiB{where} and"
            f" {available / GIB:.1f} GiB are free:"
            " lower data.micro_batch_size or data.max_length, or set model.gradient_checkpointing,"
            " model.lora, or trainer.strategy to fsdp2 on more devices"
        )
    room = shutil.disk_usage(_existing(Path(trainer.default_root_dir))).free
    if 3 * expected.checkpoint > room:
        report["errors"].append(
            f"three checkpoints take {3 * expected.checkpoint / GIB:.1f} GiB, the disk has"
            f" {room / GIB:.1f} GiB: free some, or set trainer.default_root_dir to another disk"
        )
    return {**expected.parts, "total": expected.total, "available": available}


def _existing(folder: Path) -> Path:
    """Returns the folder, or its nearest parent that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _try_step(trainer: L.Trainer, module: SFTModule, datamodule: SFTDataModule) -> dict[str, float]:
    """Makes two optimizer steps on the fullest packs: the first one creates the optimizer state.

    Returns:
        Seconds, additional peak memory in bytes, and the last loss.
    """
    before = memory_estimate.resident()
    started = time.monotonic()
    trainer.callbacks.append(FullestFirst())  # type: ignore[attr-defined]
    trainer.fit(module, datamodule)
    device = trainer.strategy.root_device
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = memory_estimate.resident(peak=True) - before
    return {
        "seconds_with_loading": time.monotonic() - started,
        "peak_bytes": peak,
        "loss": float(trainer.callback_metrics["train/loss"]),
    }


class FullestFirst(Callback):
    """Replaces the training set by its fullest packs, which need the most memory.

    Two optimizer steps are left, each of one micro-batch, or of two if the run accumulates
    gradients.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        datamodule: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        packs, size = datamodule.packs["train"], datamodule.options.micro_batch_size
        tokens = packs.num_tokens(datamodule.data.caches["train"].lengths)
        parts = [packs[int(index)] for index in np.argsort(-tokens, kind="stable")[:size]]
        passes = min(2, datamodule.orders["train"].accumulation)
        parts *= 2 * passes
        datamodule.packs["train"] = Packs(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))
        order = datamodule.orders["train"]
        datamodule.orders["train"] = replace(
            order, num_packs=len(parts), global_batch_size=size * passes, shuffle=False, costs=None
        )
        trainer.accumulate_grad_batches = passes


def _show(report: dict[str, Any], lengths: np.ndarray, step: dict[str, float] | None) -> None:
    """Prints the report as tables."""
    screen = console()
    screen.print(_report_table(report, step))
    if len(lengths):
        _print_bars(lengths)
    _print_problems(screen, "warning", report["warnings"], "yellow")
    _print_problems(screen, "error", report["errors"], "bold red")
    if not report["errors"]:
        screen.print("ready to run", style="bold green")


def _report_table(report: dict[str, Any], step: dict[str, float] | None) -> Table:
    table = Table(title="doctor", show_header=False)
    for key, label in LABELS.items():
        if report[key] is not None:
            table.add_row(label, _readable(key, report[key]))
    if step is not None:
        peak = f"{step['peak_bytes'] / GIB:.2f} GiB more than before"
        seconds = step["seconds_with_loading"]
        table.add_row(
            "two steps, longest batch",
            f"loss {step['loss']:.3f}, {peak}, {seconds:.0f} s with loading",
        )
    return table


def _print_bars(lengths: np.ndarray) -> None:
    """Prints a histogram of the example lengths, one bar a line."""
    counts, edges = np.histogram(lengths, bins=BARS)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        print(f"{low:8.0f} to {high:6.0f} tokens {'█' * int(50 * count / counts.max())} {count:,}")


def _print_problems(screen: Console, kind: str, texts: list[str], style: str) -> None:
    for text in texts:
        screen.print(f"{kind}: {text}", style=style, markup=False, highlight=False)


def _readable(key: str, value: Any) -> str:
    if key == "memory":
        return "\n".join(f"{size / GIB:7.2f} GiB {name}" for name, size in value.items())
    if key in ("trained_token_share", "pack_fill"):
        return f"{value:.1%}"
    if isinstance(value, dict):
        return "\n".join(f"{count:,}: {reason}" for reason, count in value.items()) or "none"
    return ", ".join(value) if isinstance(value, list) else f"{value:,.0f}"
