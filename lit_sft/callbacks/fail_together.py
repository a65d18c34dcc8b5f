"""A failure on one rank ends all of them, in seconds, and is told once."""

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

KEY = "lit_sft/failures"
"""Counts, in the store that all ranks met at, those that have failed."""
POLL_SECONDS = 2.0
GRACE_SECONDS = 10.0
"""In which a rank may notice by itself that another has failed; gloo does, NCCL waits for its
time-out.
"""
TEARDOWN_SECONDS = 45
"""In which a rank that failed may clean up."""


class FailTogether(Callback):
    """Tells why a run fails, on the rank that failed first, and ends the ranks that would wait for
    it.

    The collective time-out (Lightning's 30 minutes) is left as it is: a rank may have to wait for
    another that writes a large model. Instead a thread of each rank looks every two seconds whether
    one has failed.

    Args:
        needed_memory: (trainer, module, datamodule) -> the estimate of `doctor`.
    """

    def __init__(self, needed_memory: Callable[..., MemoryEstimate]) -> None:
        self.needed_memory = needed_memory
        self.ended = threading.Event()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.ended.clear()
        if trainer.world_size > 1:
            # torch has no public access to the store that all ranks met at.
            threading.Thread(target=self._watch, args=(_get_default_store(),), daemon=True).start()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.ended.set()

    def _watch(self, shared: Any) -> None:
        # A connection of its own: one that waits would block this thread, too.
        store = shared.clone()
        while not self.ended.wait(POLL_SECONDS):
            if _num_failed(store):
                break
        if not self.ended.wait(GRACE_SECONDS):
            os._exit(1)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, Exception):
            # A signal: all ranks get it, or are told.
            self.ended.set()
            return
        if trainer.world_size > 1:
            # A clean-up that waits for the others ends, too.
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
        """Which settings take less memory, of those that are not at their least."""
        datamodule = data_of(trainer)
        if "train" not in datamodule.data.caches:
            # No training step: answers or a validation.
            return (
                "lower data.micro_batch_size or model.generation.max_new_tokens, or shorten the"
                " prompts"
            )
        data: Any = datamodule.options
        model: Any = pl_module.options
        knobs = [
            (
                f"lower data.micro_batch_size ({data.micro_batch_size})"
                if data.micro_batch_size > 1
                else ""
            ),
            f"lower data.max_length ({data.max_length})",
            (
                ""
                if model.gradient_checkpointing in (True, "full")
                else "set model.gradient_checkpointing to true"
            ),
            "set model.lora" if model.lora is None else "",
            "set trainer.strategy to fsdp2 on more devices" if trainer.world_size == 1 else "",
        ]
        expected = self.needed_memory(trainer, pl_module, datamodule).total / 2**30
        return (
            f"`doctor` expects {expected:.2f} GiB for a step; to need less,"
            f" {', '.join(filter(None, knobs))}"
        )


def _num_failed(store: Any) -> int:
    """Ranks that have failed; 1 also where the store is gone, and with it the rank that kept it."""
    try:
        return int(store.add(KEY, 0))
    except RuntimeError:
        return 1


def _is_first(error: Exception, rank: int) -> bool:
    """Whether no other rank has told of a failure. One that only lost another waits for what that
    has to say.
    """
    if not dist.is_initialized():
        # It failed before the ranks met: nobody can be asked.
        return True
    store = _get_default_store()
    lost = errors.is_lost_rank(error)
    # What all ranks find is told by rank 0.
    wait = time.monotonic() + (5 if lost else 1 if rank else 0)
    try:
        while time.monotonic() < wait:
            if store.add(KEY, 0):
                return False
            time.sleep(0.1)
        return bool(store.add(KEY, 1) == 1)
    except RuntimeError:
        # Rank 0 keeps the store: it was killed.
        return lost and dist.get_node_local_rank(fallback_rank=0) in (0, 1)
