"""Compares the losses of the first steps with TRL's SFTTrainer, on the same token ids and masks.

    python scripts/fetch_smollm2.py
    python scripts/verify_against_trl.py --data alpaca_en_demo.json

Both fine-tune the same model in fp32 on the CPU, with AdamW, a constant learning rate and clipping
by norm, without packing, and take the same examples in each optimizer step. TRL gets our
`input_ids` and `completion_mask`, because its own masks also train the newline after the stop
token. TRL pads its batches, lit_sft takes one example per forward pass. TRL runs in an environment
of its own, which is made if it does not exist.

Prints both losses of each step. Exit code 1 if they differ by more than 1e-4 of their size. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

LIMIT = 1e-4
LEARNING_RATE = 1e-4
CLIP = 1.0


def main() -> None:
    """Prints both losses of each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="file of rows, in any format that data.train takes"
    )
    parser.add_argument("--columns", type=json.loads, help="data.column_mapping, as JSON")
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows_per_step", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument(
        "--venv",
        type=Path,
        default=Path("~/.cache/lit_sft/trl-venv"),
        help="made where there is none",
    )
    parser.add_argument("--trl_side", type=Path, metavar="EXAMPLES", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl_side:
        print(json.dumps(trl_losses(args)))
        return
    from bench_data import trl_python

    python = trl_python(args.venv.expanduser())
    with tempfile.TemporaryDirectory() as scratch:
        ours = our_losses(args, Path(scratch), examples := Path(scratch) / "examples.jsonl")
        done = subprocess.run(
            [python, __file__, *sys.argv[1:], "--trl_side", str(examples)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        sys.exit(f"error: the TRL side failed: {done.stderr[-2000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    off = [abs(a - b) / abs(b) for a, b in zip(ours, theirs["losses"], strict=True)]
    print("| step | lit_sft | TRL | relative difference |\n|---|---|---|---|")
    for step, (a, b, difference) in enumerate(
        zip(ours, theirs["losses"], off, strict=True), start=1
    ):
        print(f"| {step} | {a:.6f} | {b:.6f} | {difference:.1e} |")
    print(
        json.dumps(
            {"limit": LIMIT, "largest": max(off), "trl": theirs["version"], "steps": len(off)}
        )
    )
    sys.exit(0 if max(off) <= LIMIT else 1)


def our_losses(args: argparse.Namespace, scratch: Path, examples: Path) -> list[float]:
    """Trains with lit_sft, and writes the examples in the order of the training."""
    from verify_equivalence import fit, read

    from lit_sft import datamodule
    from lit_sft.data import collate as data_collate

    used: list[dict[str, list[int]]] = []
    collate = data_collate.collate

    def recording(parts: Any) -> Any:
        used.extend(
            {"input_ids": ids.tolist(), "completion_mask": mask.tolist()} for ids, mask, _ in parts
        )
        return collate(parts)

    settings = {
        "seed_everything": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.max_steps": args.steps,
        "trainer.gradient_clip_val": CLIP,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": scratch,
        "trainer.enable_progress_bar": False,
        "model.model_name_or_path": args.model,
        "model.evaluation": None,
        "model.lr_schedule.type": "constant",
        "model.lr_schedule.warmup_ratio": 0.0,
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": LEARNING_RATE,
        "model.optimizer.weight_decay": 0.0,
        "data.train": args.data,
        "data.questions": [],
        "data.max_length": args.max_length,
        "data.packing": False,
        "data.micro_batch_size": 1,
        "data.global_batch_size": args.rows_per_step,
        # Rows longer than max_length are dropped.
        "data.max_samples": 4 * args.steps * args.rows_per_step,
        "data.cache_dir": scratch / "cache",
    }
    if args.columns:
        settings["data.column_mapping"] = args.columns
    with mock.patch.object(datamodule, "collate", recording):
        fit(settings)
    # The loader may have read more examples than were trained.
    lines = [json.dumps(example) for example in used[: args.steps * args.rows_per_step]]
    examples.write_text("\n".join(lines))
    return read(scratch).loss


def trl_losses(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with TRL on the examples in order; every step is one padded batch."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Recording(trl.SFTTrainer):
        def training_step(self, *arguments: Any, **more: Any) -> Any:
            loss = super().training_step(*arguments, **more)
            # Its log rounds to four digits.
            losses.append(float(loss))
            return loss

    losses: list[float] = []
    datasets.disable_progress_bars()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    examples = [json.loads(line) for line in args.trl_side.read_text().splitlines()]
    config = trl.SFTConfig(
        str(args.trl_side.parent / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=args.rows_per_step,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        completion_only_loss=True,
        max_length=None,
        packing=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Recording(
        model,
        args=config,
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    trainer.train()
    return {"losses": losses, "version": trl.__version__}


if __name__ == "__main__":
    main()
