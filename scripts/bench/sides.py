"""Shared by the comparisons with TRL: one process per side, and the same recipe on both sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from bench_data import trl_python  # noqa: E402

SIDES = ("lit_sft", "trl")
LR, WARMUP = 1e-4, 1
TRL_VENV = Path("~/.cache/lit_sft/trl-venv")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def interpreters(sides: tuple[str, ...], venv: Path, lora: bool) -> dict[str, str]:
    """Returns the Python of each side, after making an environment with TRL if there is none."""
    python = {"lit_sft": sys.executable}
    if "trl" in sides:
        python["trl"] = trl_python(venv.expanduser())
        if (
            lora
            and subprocess.run([python["trl"], "-c", "import peft"], capture_output=True).returncode
        ):
            subprocess.run([python["trl"], "-m", "pip", "install", "--quiet", "peft"], check=True)
    return {side: python[side] for side in sides}


def run_side(python: str, script: str, side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs one training in a process of its own, and parses its last line as JSON.

    Args:
        python: The interpreter.
        script: The benchmark, which takes `--side`.
        side: One of `SIDES`.
        settings: Other arguments by name; True is a flag, False and None are left out.
    """
    command = [python, script, "--side", side]
    for name, value in settings.items():
        if value not in (None, False):
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    # this checkout's lit_sft, on the side of TRL too, where it is not installed (a benchmark may
    # count operations)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # With more, TRL would use or refuse them.
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": one}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"error: the {side} side failed: {done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def lit_sft_module(model: Path, lora: bool, **settings: Any) -> Any:
    """Builds the module of the lit_sft side."""
    from torch.optim import AdamW

    from lit_sft.model.lora.lora_config import LoraConfig
    from lit_sft.module import SFTModule
    from lit_sft.training.optim import ScheduleOptions

    return SFTModule(
        model_name_or_path=str(model),
        lora=LoraConfig(**LORA) if lora else None,
        optimizer=lambda parameters: AdamW(parameters, lr=LR, weight_decay=0.0),
        lr_schedule=ScheduleOptions(warmup_steps=WARMUP),
        evaluation=None,
        **settings,
    )


def lit_sft_trainer(accelerator: str, callbacks: list[Any], **settings: Any) -> Any:
    """Builds lit_sft's trainer without checkpoints, answers and exports."""
    from lit_sft.trainer import SFTTrainer

    return SFTTrainer(
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **settings,
    )


def trl_config(output: Path, **settings: Any) -> Any:
    """Returns the recipe for TRL, which uses a mask over ids only with `completion_only_loss`."""
    from trl import SFTConfig

    defaults = {
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": True,
        "completion_only_loss": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SFTConfig(str(output), **{**defaults, **settings})


def trl_lora() -> Any:
    """Returns the adapter settings for TRL."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **LORA)


def trl_rows(file: Path) -> Any:
    """Reads rows of token ids and masks, without writing to the user's cache."""
    import datasets

    return datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(file.parent / "trl-cache")
    )


def write_trl_rows(file: Path, cache: Any) -> None:
    """Writes a cache of lit_sft for TRL: the same ids and masks, one row per line."""
    with file.open("w") as lines:
        for input_ids, loss_mask, _ in (cache[index] for index in range(len(cache))):
            row = {"input_ids": input_ids.tolist(), "completion_mask": loss_mask.tolist()}
            lines.write(json.dumps(row) + "\n")
