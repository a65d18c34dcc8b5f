"""Weights that a callback of the user's averages: what a validation and a checkpoint hold of
them.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, WeightAveraging
from typing_extensions import override

from lit_sft import lightning_internals
from lit_sft.errors import UserError


class Averaging(Callback):
    """Lets the average stand for the whole of a validation. `WeightAveraging` itself puts the
    weights back before answers are scored, and in a checkpoint that is saved before that takes one
    for the other.

    Comes after all callbacks that ask the model.
    """

    def __init__(self) -> None:
        self.averaging: WeightAveraging | None = None
        self.is_swapped = False
        """Whether the model holds the average."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.averaging = next(
            (callback for callback in callbacks if isinstance(callback, WeightAveraging)), None
        )
        if self.averaging is not None:
            # It calls that when a validation begins and when it ends.
            lightning_internals.replace_swap(self.averaging, self._swap_once)

    def _swap_once(self, pl_module: L.LightningModule) -> None:
        if not self.is_swapped:
            self._swap(pl_module)

    def _swap(self, pl_module: L.LightningModule) -> None:
        assert self.averaging is not None
        lightning_internals.swap_models(self.averaging, pl_module)
        self.is_swapped = not self.is_swapped

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_swapped:
            self._swap(pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.is_swapped:
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint |= {"state_dict": average, "current_model_state": current}

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and self.averaging is None and "averaging_state" in checkpoint:
            raise UserError(
                "the checkpoint holds averaged weights, from which training would go on: put its"
                " callback (EMAWeightAveraging) into trainer.callbacks again, or begin another run"
                " (without --ckpt_path) from the exported weights"
            )
