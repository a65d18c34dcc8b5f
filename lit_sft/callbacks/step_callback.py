"""A hook that is called once per optimizer step; Lightning's are called once per micro-batch."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


def is_between_steps(trainer: L.Trainer) -> bool:
    """Whether the latest micro-batch was the last of its optimizer step.

    Lightning makes an optimizer step after every `accumulate_grad_batches` micro-batches, and after
    the last micro-batch of an epoch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    num_batches = progress.current.ready
    is_last = progress.is_last_batch or num_batches == trainer.num_training_batches
    return is_last or num_batches % trainer.accumulate_grad_batches == 0


class StepCallback(Callback):
    """A callback with `on_step_end`, which Lightning lacks."""

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        """Called after an optimizer step, also after one that was skipped.

        Args:
            trainer: The trainer; its `global_step` already counts the step.
            pl_module: The module.
            batch: The last micro-batch of the step.
        """

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_between_steps(trainer):
            self.on_step_end(trainer, pl_module, batch)
