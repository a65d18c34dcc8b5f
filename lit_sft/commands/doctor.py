"""`doctor`: a pre-flight. Everything about data, steps and memory that can be known in a minute, and two real steps."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import numpy as np
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.table import Table
from typing_extensions import override

from lit_sft.console import console, draw_histogram
from lit_sft.data.packing import Packs
from lit_sft.data.sampler import StepOrder
from lit_sft.data.stats import Counts
from lit_sft.datamodule import SFTDataModule
from lit_sft.errors import UserError
from lit_sft.model import load, memory_estimate
from lit_sft.model_builder import (
    base_directory,
    choose_trained,
    is_adapted,
    model_directory,
    refuse_adapter,
    stored_dtype,
)
from lit_sft.module import SFTModule
from lit_sft.preprocessing import num_overlapping
from lit_sft.training.optim import bytes_per_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
"""What `--output json` prints, beside warnings and errors, and how people read it. null: not reached, or not used."""
BARS = 12


@dataclass(frozen=True)
class Plan:
    """What a run is spread over; `doctor` itself takes one device of it."""

    devices: int = 1
    """Over all nodes."""
    sharded: bool = False
    """Whether each holds a part of weights, gradients and optimizer state."""

    @classmethod
    def of_settings(cls, devices: Any, num_nodes: int, strategy: Any, present: int) -> Plan:
        """Of `trainer.devices`, `num_nodes` and `strategy`; `auto` and -1 are the devices that are present."""
        if isinstance(devices, str) and "," in devices:
            devices = devices.strip(",").split(",")
        every = present if devices in ("auto", -1, "-1") else None
        if every is None and not isinstance(devices, list) and not str(devices).isdecimal():
            raise UserError(f"trainer.devices is {devices}; set it to auto, a number, or a list of numbers")
        per_node = every or (len(devices) if isinstance(devices, list) else int(devices))
        return cls(per_node * num_nodes, "fsdp" in str(strategy).lower())


def doctor(
    trainer: L.Trainer,
    plan: Plan,
    module: SFTModule,
    datamodule: SFTDataModule,
    output: Literal["rich", "json"],
    histogram: str | None,
) -> int:
    """Looks at a configuration before it is run.

    Args:
        trainer: For one device and two steps.
        plan: What the run itself is to have.
        module: Its settings.
        datamodule: Its `train` and validation set are examined.
        output: `rich` for people; `json`: one object on stdout.
        histogram: PNG file for the lengths, if one is wanted.

    Returns:
        The exit code: 1 if there is an error, else 0; warnings do not fail.
    """
    report: dict[str, Any] = {**dict.fromkeys(LABELS), "warnings": [], "errors": []}
    lengths, step = np.zeros(0, dtype=np.int64), None
    try:
        refuse_adapter(module.options)
        datamodule.prepare("fit")
        lengths = datamodule.data.caches["train"].lengths
        report |= _examine_data(datamodule, report)
        packs, options = datamodule.pack("train"), datamodule.options
        StepOrder(len(packs), options.global_batch_size, options.micro_batch_size, plan.devices, seed=0)  # refuses
        report["memory"] = _expect_memory(trainer, plan, module, datamodule, report)
        alone = needed_memory(trainer, module, datamodule).total
        if plan.sharded and alone > report["memory"]["available"]:
            report["warnings"].append(f"no step was tried: one device alone would need {alone / GIB:.1f} GiB")
        else:
            step = _try_step(trainer, module, datamodule)
            took = step["peak_bytes"] / GIB
            log.info(f"memory of a real step on one device: {took:.2f} GiB, expected {alone / GIB:.2f} GiB")
    except (UserError, torch.OutOfMemoryError) as error:
        report["errors"].append(" ".join(str(error).split()))
    if output == "json":
        print(json.dumps(report))
    else:
        _show(report, lengths, step)
    if histogram is not None and len(lengths):
        draw_histogram(lengths, Path(histogram))
    return 1 if report["errors"] else 0


def _examine_data(datamodule: SFTDataModule, report: dict[str, Any]) -> dict[str, Any]:
    data, options = datamodule.data, datamodule.options
    cache, tokenizer = data.caches["train"], data.tokenizer
    counts = Counts(**cache.meta)
    warnings: list[str] = report["warnings"]
    warnings += counts.lines("train")[1:]
    if not counts.stop_ids and options.format != "text":
        report["errors"].append("no stop token is trained: the model would not learn to end; check data.chat_template")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        warnings.append("pad and eos are one token: harmless here, masks go by position")
    if tokenizer.bos_token_id is not None:
        first = [cache[index][0][:2].tolist() for index in range(min(len(cache), 100))]
        if any(ids == [tokenizer.bos_token_id] * 2 for ids in first):
            report["errors"].append("examples begin with two BOS tokens: remove bos_token from data.chat_template")
    overlap = num_overlapping(cache, data.caches["validation"]) if "validation" in data.caches else 0
    if overlap:
        warnings.append(f"{overlap:,} validation rows are in the training set too")
    packs = datamodule.pack("train")
    steps = -(-len(packs) // options.global_batch_size)
    return {
        "rows_read": counts.rows_read,
        "rows_kept": counts.rows_kept,
        "dropped": dict(counts.dropped),
        "trained_token_share": counts.trained_tokens / max(1, counts.tokens),
        "stop_tokens": tokenizer.convert_ids_to_tokens(counts.stop_ids),
        "duplicates": counts.duplicates,
        "overlap": overlap,
        "pack_fill": float(packs.num_tokens(cache.lengths).mean() / options.max_length) if options.packing else None,
        "steps_per_epoch": steps,
        "tokens_per_step": counts.tokens / steps,
    }


def needed_memory(
    trainer: L.Trainer, module: SFTModule, datamodule: SFTDataModule, plan: Plan | None = None
) -> memory_estimate.MemoryEstimate:
    """What a step is expected to need on a device: of this run, or of the one that is planned."""
    if plan is None:
        plan = Plan(trainer.world_size, isinstance(trainer.strategy, ModelParallelStrategy))
    options, precision, lora = module.options, trainer.precision, module.options.lora
    lm, total = _without_weights(options)
    adapted, data = is_adapted(options), datamodule.options
    stored = stored_dtype(options.dtype, precision, adapted)
    packs, lengths = datamodule.pack("train"), datamodule.data.caches["train"].lengths
    plain_lora = options.quantization is None and not (lora is not None and (lora.use_dora or lora.lora_dropout))
    step = memory_estimate.StepShape(
        num_parameters=total,
        num_trained=lm.num_parameters(only_trainable=True),
        tokens=int(packs.num_tokens(lengths).max()) * data.micro_batch_size,
        stored_bytes=stored.itemsize,
        compute_bytes=2 if precision.startswith(("bf16", "16")) else 4,
        optimizer_bytes=bytes_per_parameter(options.optimizer, torch.float32 if adapted else stored),
        gradient_checkpointing=options.gradient_checkpointing,
        accumulates=data.global_batch_size > data.micro_batch_size * plan.devices,
        shards=plan.devices if plan.sharded else 1,
        adapted=adapted,
        input_copies=not plain_lora,
        normed_heads=any(name.endswith("q_norm") for name, _ in lm.named_modules()),
        on_cpu=trainer.strategy.root_device.type == "cpu",
        quantized=options.quantization is not None,
    )
    return memory_estimate.estimate(lm.config, step)


def _without_weights(options: Any) -> tuple[PreTrainedModel, int]:
    """The model on the meta device, with what is trained of it; and the parameters of its base."""
    path = base_directory(model_directory(options.model_name_or_path, options.revision))
    lm = load.load_model(
        path,
        init=options.init,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=options.trust_remote_code,
        seed=0,
        on_meta=True,
    )
    total = lm.num_parameters()
    choose_trained(lm, path, options, on_meta=True)
    return lm, total


def _expect_memory(
    trainer: L.Trainer, plan: Plan, module: SFTModule, datamodule: SFTDataModule, report: dict[str, Any]
) -> dict[str, int]:
    expected = needed_memory(trainer, module, datamodule, plan)
    device = trainer.strategy.root_device
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if expected.total > available:
        report["errors"].append(
            f"the step needs about {expected.total / GIB:.1f} GiB{' on each device' * (plan.devices > 1)} and "
            f"{available / GIB:.1f} GiB are free: lower data.micro_batch_size or data.max_length, or set "
            "model.gradient_checkpointing, model.lora, or trainer.strategy to fsdp2 on more devices"
        )
    room = shutil.disk_usage(_existing(Path(trainer.default_root_dir))).free
    if 3 * expected.checkpoint > room:
        report["errors"].append(
            f"three checkpoints take {3 * expected.checkpoint / GIB:.1f} GiB, the disk has {room / GIB:.1f} GiB: free "
            "some, or set trainer.default_root_dir to another disk"
        )
    return {**expected.parts, "total": expected.total, "available": available}


def _existing(folder: Path) -> Path:
    """The folder, or what of its path is there before the first run."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _try_step(trainer: L.Trainer, module: SFTModule, datamodule: SFTDataModule) -> dict[str, float]:
    """Two optimizer steps on the fullest packs: at the second the optimizer's state is there, too."""
    before = memory_estimate.resident()
    started = time.monotonic()
    trainer.callbacks.append(FullestFirst())  # type: ignore[attr-defined]
    trainer.fit(module, datamodule)
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else memory_estimate.resident(peak=True) - before
    return {
        "seconds_with_loading": time.monotonic() - started,
        "peak_bytes": peak,
        "loss": float(trainer.callback_metrics["train/loss"]),
    }


class FullestFirst(Callback):
    """Leaves two optimizer steps of one forward pass, or of two where the run accumulates gradients: the fullest packs,
    which need the most memory.
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
    screen = console()
    table = Table(title="doctor", show_header=False)
    for key, label in LABELS.items():
        if report[key] is not None:
            table.add_row(label, _readable(key, report[key]))
    if step is not None:
        peak, seconds = f"{step['peak_bytes'] / GIB:.2f} GiB more than before", step["seconds_with_loading"]
        table.add_row("two steps, longest batch", f"loss {step['loss']:.3f}, {peak}, {seconds:.0f} s with loading")
    screen.print(table)
    if len(lengths):
        counts, edges = np.histogram(lengths, bins=BARS)
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            print(f"{low:8.0f} to {high:6.0f} tokens {'█' * int(50 * count / counts.max())} {count:,}")
    for name, style in (("warnings", "yellow"), ("errors", "bold red")):
        for text in report[name]:
            screen.print(f"{name[:-1]}: {text}", style=style, markup=False, highlight=False)
    if not report["errors"]:
        screen.print("ready to run", style="bold green")


def _readable(key: str, value: Any) -> str:
    if key == "memory":
        return "\n".join(f"{size / GIB:7.2f} GiB {name}" for name, size in value.items())
    if key in ("trained_token_share", "pack_fill"):
        return f"{value:.1%}"
    if isinstance(value, dict):
        return "\n".join(f"{count:,}: {reason}" for reason, count in value.items()) or "none"
    return ", ".join(value) if isinstance(value, list) else f"{value:,.0f}"
