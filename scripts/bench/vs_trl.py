"""One epoch of lit_sft beside TRL's SFTTrainer: seconds per token, peak memory and loss.

    python scripts/fetch_smollm2.py
    python scripts/bench/vs_trl.py --data alpaca_en_demo.json

Each side trains SmolLM2-135M once on the same 128 rows, in bf16 autocast over fp32 weights, with
the same optimizer, schedule and clipping. The rows are rendered once, so both sides get the same
token ids and masks. The sides take turns, each in a process of its own, and medians of the
repetitions are reported. Time is measured from the first batch to the end of the last step, without
loading, tokenizing and saving. Memory is the peak of the whole process until then. Afterwards one
function computes the held-out loss of both sides in fp32.

lit_sft  packs of `--max_length` tokens, by default the length of the longest Alpaca row.
TRL      the fastest of `TRL_SETTINGS` on a CPU (`--trl NAME` takes another), with its own chunked
         loss.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import sides

HELD_OUT = 64
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 8},
    "by_length": {"per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length"},
    "by_length_small": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "group_by_length",
    },
    "small": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padding_free": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
}
"""Settings of TRL. Eight rows per optimizer step give as many steps as lit_sft's 2 packs of 824."""


def main() -> None:
    """Runs both sides and prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="file of rows, in any format that data.train takes"
    )
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--lora", action="store_true", help="adapters instead of all weights")
    parser.add_argument("--rows", type=int, default=128, help="rows of the epoch")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--max_length", type=int, default=824, help="tokens of a pack, at least those of a row"
    )
    parser.add_argument("--micro_batch_size", type=int, default=1, help="packs per forward pass")
    parser.add_argument("--trl", choices=TRL_SETTINGS, default="by_length_small")
    parser.add_argument("--only", choices=sides.SIDES, help="measure one side only")
    parser.add_argument("--side", choices=sides.SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps((train_trl if args.side == "trl" else train_lit_sft)(args)))
        return
    if not (args.model / "config.json").is_file():
        parser.error(
            f"there is no model in {args.model}: run scripts/fetch_smollm2.py, or set --model"
        )
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        print(json.dumps(compare(args)))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all repetitions of both sides, and returns medians and ratios."""
    tokens = write_rows(args)
    chosen = (args.only,) if args.only else sides.SIDES
    python = sides.interpreters(chosen, sides.TRL_VENV, args.lora)
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in ("side", "only", "repetitions")
    }
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in chosen}
    for repetition in range(args.repetitions):
        for side, done in results.items():
            done.append(sides.run_side(python[side], __file__, side, settings))
            done[-1]["val_loss"] = held_out_loss(args, side)
            print(f"{repetition + 1}. {side}: {json.dumps(done[-1])}", flush=True)

    def median(side: str, key: str) -> float:
        return statistics.median(result[key] for result in results[side])

    report: dict[str, Any] = {
        "rows": args.rows,
        "tokens": tokens,
        "trl_setting": args.trl,
        "lora": args.lora,
    }
    if args.only is None:
        names = {"seconds": "time_ratio", "memory": "memory_ratio", "cpu_seconds": "cpu_time_ratio"}
        report |= {
            names[key]: round(median("lit_sft", key) / median("trl", key), 3) for key in names
        }
    for side, done in results.items():
        report |= {
            f"{side}_val_loss": round(median(side, "val_loss"), 4),
            f"{side}_seconds": median(side, "seconds"),
        }
        report |= {f"{side}_peak_gb": median(side, "memory"), f"{side}_steps": done[0]["steps"]}
        report[f"{side}_tokens_per_second"] = round(tokens / median(side, "seconds"), 1)
    return report


def write_rows(args: argparse.Namespace) -> int:
    """Renders all rows for both sides, and returns the number of tokens."""
    datamodule = lit_sft_data(args)
    datamodule.prepare("fit")
    for name, cache in datamodule.data.caches.items():
        sides.write_trl_rows(args.work / f"{name}.jsonl", cache)
    return int(datamodule.data.caches["train"].lengths.sum())


def lit_sft_data(args: argparse.Namespace) -> Any:
    """Builds the data module of the lit_sft side."""
    from lit_sft.datamodule import SFTDataModule

    return SFTDataModule(
        train=str(args.data),
        max_samples=args.rows + HELD_OUT,
        val_size=HELD_OUT,
        model_name_or_path=str(args.model),
        max_length=args.max_length,
        # No row may be dropped, or the sides would train different rows.
        overlong="error",
        micro_batch_size=args.micro_batch_size,
        global_batch_size=max(1, round(8 * 206 / args.max_length)),
        cache_dir=str(args.work / "cache"),
    )


def peak_memory() -> int:
    """Returns the peak resident memory in bytes. A child would inherit `ru_maxrss`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


class Meter:
    """Measures time, from its construction on, and memory of this process."""

    def __init__(self) -> None:
        self.began, self.processor = time.perf_counter(), time.process_time()

    def read(self, steps: int) -> dict[str, Any]:
        """Returns the figures. `cpu_seconds` are reliable even if the machine has other work."""
        return {
            "seconds": round(time.perf_counter() - self.began, 2),
            "cpu_seconds": round(time.process_time() - self.processor, 2),
            "memory": round(peak_memory() / 1e9, 3),
            "steps": steps,
        }


def train_lit_sft(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with lit_sft and saves the weights (or the adapter)."""
    import lightning as L
    from lightning.pytorch.callbacks import Callback

    from lit_sft.callbacks.throughput import Throughput

    class Clock(Callback):
        """Measures time and memory before anything is saved."""

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.meter = Meter()

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.result = self.meter.read(trainer.global_step)

    module, clock = sides.lit_sft_module(args.model, args.lora), Clock()
    trainer = sides.lit_sft_trainer("cpu", [Throughput(), clock])
    trainer.fit(module, lit_sft_data(args))
    module.export(args.work / "lit_sft")
    return clock.result


def train_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with TRL and saves the weights (or the adapter)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    class Clock(TrainerCallback):
        """Measures time and memory before anything is saved."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.meter = Meter()

        def on_train_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            self.result = self.meter.read(state.global_step)

    chosen = {"max_length": args.max_length, **TRL_SETTINGS[args.trl]}
    config = sides.trl_config(args.work / "trl-run", num_train_epochs=1, use_cpu=True, **chosen)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if args.lora else torch.float32
    )
    clock = Clock()
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=sides.trl_rows(args.work / "train.jsonl"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=sides.trl_lora() if args.lora else None,
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(str(args.work / "trl"))
    return clock.result


def held_out_loss(args: argparse.Namespace, side: str) -> float:
    """Returns the mean loss over the targets of the held-out rows, in fp32, without packing."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model if args.lora else args.work / side, dtype=torch.float32
    )
    if args.lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(args.work / side))
    total, count = 0.0, 0
    with torch.inference_mode():
        for line in (args.work / "validation.jsonl").read_text().splitlines():
            row = json.loads(line)
            input_ids = torch.tensor(row["input_ids"])
            kept = torch.tensor(row["completion_mask"][1:], dtype=torch.bool)
            logits = model(input_ids=input_ids[None]).logits[0, :-1][kept]
            total += float(
                torch.nn.functional.cross_entropy(logits, input_ids[1:][kept], reduction="sum")
            )
            count += int(kept.sum())
    return round(total / count, 4)


if __name__ == "__main__":
    main()
