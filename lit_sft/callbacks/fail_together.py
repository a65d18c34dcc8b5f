"""Ends all ranks within seconds if one of them fails, and reports the failure once."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed.distributed_c10d import _get_default_store
from typing_extensions import override

from lit_sft import errors, lightning_internals
from lit_sft.datamodule import data_of
from lit_sft.model.memory_estimate import MemoryEstimate
from lit_sft.run import remains

KEY = "lit_sft/failures"
"""Key in the process group's store: how many ranks have failed."""
POLL_SECONDS = 2.0
GRACE_SECONDS = 10.0
"""Time for a rank to notice by itself that another has failed, as it does with gloo. With NCCL it
would wait for the time-out.
"""
TEARDOWN_SECONDS = 45
"""Time for a failed rank to clean up."""


class FailTogether(Callback):
    """Reports why a run fails, on the rank that failed first, and ends the other ranks.

    The time-out of collectives (30 minutes in Lightning) stays, because a rank may have to wait for
    another that writes a large model. Instead a thread of each rank asks every two seconds whether
    another rank has failed.

    Args:
        needed_memory: Takes (trainer, module, datamodule) and returns the estimate of `doctor`.
    """

    def __init__(self, needed_memory: Callable[..., MemoryEstimate]) -> None:
        self.needed_memory = needed_memory
        self.ended = threading.Event()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.ended.clear()
        if trainer.world_size > 1:
            # torch has no public access to the store of the default process group.
            threading.Thread(target=self._watch, args=(_get_default_store(),), daemon=True).start()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.ended.set()

    def _watch(self, shared: Any) -> None:
        # Its own connection: a call that waits on the shared one would block this thread.
        store = shared.clone()
        while not self.ended.wait(POLL_SECONDS):
            if _num_failed(store):
                break
        if not self.ended.wait(GRACE_SECONDS):
            remains.remove()
            os._exit(1)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, Exception):
            # A signal. All ranks receive it, or learn of it.
            self.ended.set()
            return
        if trainer.world_size > 1:
            # Ends this rank if its clean-up waits for other ranks.
            faulthandler.dump_traceback_later(
                TEARDOWN_SECONDS, exit=True, file=open(os.devnull, "w")
            )
        advice = (
            self._memory_advice(trainer, pl_module) if errors.is_out_of_memory(exception) else ""
        )
        if trainer.world_size == 1 or _is_first(exception, trainer.global_rank):
            errors.report_error(exception, trainer.global_rank, advice)
        else:
            errors.keep_silent(exception)
        if trainer.world_size > 1:
            lightning_internals.kill_launched_ranks(trainer.strategy)

    def _memory_advice(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        """Returns which settings would lower the memory that a step needs."""
        datamodule = data_of(trainer)
        if "train" not in datamodule.data.caches:
            # There is no training step: the command generates answers or validates.
            return (
                "lower data.micro_batch_size or model.generation.max_new_tokens, or shorten the"
                " prompts"
            )
        data: Any = datamodule.options
        model: Any = pl_module.options
        remedies = []
        if data.micro_batch_size > 1:
            remedies.append(f"lower data.micro_batch_size ({data.micro_batch_size})")
        remedies.append(f"lower data.max_length ({data.max_length})")
        if model.gradient_checkpointing not in (True, "full"):
            remedies.append("set model.gradient_checkpointing to true")
        if model.lora is None:
            remedies.append("set model.lora")
        if trainer.world_size == 1:
            remedies.append("set trainer.strategy to fsdp2 on more devices")
        gib = self.needed_memory(trainer, pl_module, datamodule).total / 2**30
        return f"`doctor` expects {gib:.2f} GiB for a step; to need less, {', '.join(remedies)}"


def _num_failed(store: Any) -> int:
    """Returns the number of failed ranks; 1 if the store is gone with the rank that kept it."""
    try:
        return int(store.add(KEY, 0))
    except RuntimeError:
        return 1


def _is_first(error: Exception, rank: int) -> bool:
    """Whether no other rank has reported a failure before this one.

    A rank that only lost its connection to another waits for the report of that rank.

    Args:
        error: The failure of this rank.
        rank: The global rank of this process.
    """
    if not dist.is_initialized():
        # There is no process group yet, so there is no other rank to ask.
        return True
    store = _get_default_store()
    lost = errors.is_lost_rank(error)
    if lost:
        seconds = 5
    else:
        # If all ranks fail alike, rank 0 is the first to report.
        seconds = 1 if rank else 0
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if store.add(KEY, 0):
                return False
            time.sleep(0.1)
        return bool(store.add(KEY, 1) == 1)
    except RuntimeError:
        # The store is gone, because rank 0, which keeps it, was killed.
        return lost and dist.get_node_local_rank(fallback_rank=0) in (0, 1)
