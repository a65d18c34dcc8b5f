"""Parsed settings: checked and completed before any object is built from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from lit_sft.checkpoint import find
from lit_sft.errors import UserError
from lit_sft.run import folder as run_folder
from lit_sft.run import slurm
from lit_sft.training.optim import check_open_end

log = logging.getLogger(__name__)

REFUSED_OF_TRAINER = (
    "overfit_batches",
    "use_distributed_sampler",
    "enable_checkpointing",
    "accumulate_grad_batches",
)
"""Settings of Lightning's trainer that do not work here: each is refused with its remedy."""


def reject_unsupported(trainer: Any, command: str) -> None:
    """Refuses settings of Lightning's trainer that do not work here.

    Args:
        trainer: The settings of the trainer.
        command: The command that runs.

    Raises:
        UserError: One of them is set.
    """
    if trainer.overfit_batches:
        raise UserError(
            "trainer.overfit_batches must be 0: set data.max_samples to train on a few rows"
        )
    every = trainer.check_val_every_n_epoch
    if every is not None and every < 1:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {every}, it must be at least 1: to validate never,"
            " set trainer.limit_val_batches to 0"
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


def check_certify(config: Any, given: list[str]) -> None:
    """Refuses a number of rows beside `preview --certify`, which reads no rows.

    Args:
        config: The settings of the command.
        given: The keys that the user wrote.

    Raises:
        UserError: Both are given.
    """
    if config.get("certify") and "num_rows" in given:
        raise UserError(
            "--num_rows chooses rows of the data, which --certify does not read: leave one of them"
            " out"
        )


def check_end(config: Any) -> None:
    """Refuses a run that has neither an end nor a number of steps (see `check_open_end`).

    Args:
        config: The settings of the command.

    Raises:
        UserError: It has not.
    """
    trainer = config.trainer
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        # Whether a callback of the user ends the run is checked later, when it exists.
        ends = (trainer.max_time, config.early_stopping, trainer.callbacks)
        check_open_end(config.model.lr_schedule, any(ends))


def complete_trainer(trainer: Any) -> None:
    """Replaces `~`, an accelerator that does not work here, and the strategy `fsdp`."""
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
    """Finds the checkpoint to resume from or to evaluate; None if a run starts from step 0.

    Args:
        config: The settings of the command.
        command: The command that runs.

    Raises:
        UserError: The checkpoint does not exist.
    """
    logs = Path(config.trainer.default_root_dir or ".") / run_folder.LOGS
    asked = config.get("ckpt_path")
    own = slurm.own_run(logs) if command == "fit" else None
    if own is not None:
        # A requeued SLURM job resumes its own run, not the checkpoint of its first start.
        found = find.find_last(logs, own)
        if found is not None:
            return str(found)
        if asked == "last":
            return None
    return find.find_checkpoint(asked, logs, command)


def _without_apples_gpu(chosen: Any) -> Any:
    """Returns the accelerator, or the CPU where `auto` would take Apple's GPU.

    Raises:
        UserError: Apple's GPU is set explicitly.
    """
    if not torch.backends.mps.is_available() or chosen not in ("auto", "gpu", "mps"):
        return chosen
    if chosen != "auto":
        raise UserError(
            f"trainer.accelerator {chosen}: Apple's GPU cannot sum losses in float64: set it to cpu"
        )
    log.info("Apple's GPU cannot sum losses in float64: the CPU is taken (trainer.accelerator)")
    return "cpu"
