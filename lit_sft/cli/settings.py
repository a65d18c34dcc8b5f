"""The parsed settings, checked and completed before objects are made of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from lit_sft.checkpoint import find
from lit_sft.errors import UserError
from lit_sft.run import folder as run_folder
from lit_sft.run import slurm

log = logging.getLogger(__name__)


def reject_unsupported(trainer: Any, command: str) -> None:
    """Refuses settings of Lightning's that it would take without a word and that do not work here.

    Args:
        trainer: Settings of the trainer.
        command: Which is run.

    Raises:
        UserError: One of them is set.
    """
    if trainer.overfit_batches:
        raise UserError(
            "trainer.overfit_batches must be 0: set data.max_samples to train on a few rows"
        )
    if trainer.use_distributed_sampler:
        raise UserError(
            "trainer.use_distributed_sampler must be false: it would shuffle over our own order"
        )
    if trainer.enable_checkpointing is False and command == "fit":
        raise UserError(
            "trainer.enable_checkpointing must be true: to save less, raise"
            " checkpoint.every_n_minutes"
        )


def complete_trainer(trainer: Any) -> None:
    """Writes out what the user's words stand for: a home folder, the accelerator that can be used,
    FSDP.
    """
    if trainer.default_root_dir is not None:
        trainer.default_root_dir = str(Path(trainer.default_root_dir).expanduser())
    trainer.accelerator = _without_apples_gpu(trainer.accelerator)
    if trainer.strategy == "fsdp":
        log.info(
            "trainer.strategy fsdp: FSDP2 is taken (fsdp2), whose shards any number of devices can"
            " load"
        )
        trainer.strategy = "fsdp2"


def resolve_checkpoint(config: Any, command: str) -> str | None:
    """Finds the checkpoint to resume from or to evaluate; None where a run starts anew.

    Args:
        config: Settings of the command.
        command: Which is run.

    Raises:
        UserError: The checkpoint that is asked for is not there.
    """
    logs = Path(config.trainer.default_root_dir or ".") / run_folder.LOGS
    asked = config.get("ckpt_path")
    own = slurm.own_run(logs) if command == "fit" else None
    if own is not None:
        # A requeued SLURM job resumes its own run, whatever checkpoint it was first started from.
        found = find.find_last(logs, own)
        if found is not None:
            return str(found)
        if asked == "last":
            return None
    return find.find_checkpoint(asked, logs, command)


def _without_apples_gpu(chosen: Any) -> Any:
    """The accelerator, but for Apple's GPU, which `auto` would take.

    Raises:
        UserError: It is asked for.
    """
    if not torch.backends.mps.is_available() or chosen not in ("auto", "gpu", "mps"):
        return chosen
    if chosen != "auto":
        raise UserError(
            f"trainer.accelerator {chosen}: Apple's GPU cannot sum losses in float64: set it to cpu"
        )
    log.info("Apple's GPU cannot sum losses in float64: the CPU is taken (trainer.accelerator)")
    return "cpu"
