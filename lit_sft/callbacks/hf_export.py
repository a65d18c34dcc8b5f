"""Exports a Hugging Face directory at the end of a run."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override

from lit_sft.model.parallel import full_state_dict

log = logging.getLogger(__name__)

HF_FOLDER = "hf"


class HFExport(Callback):
    """Writes `hf/`, a plain Hugging Face directory (weights or adapter), when training ends."""

    def __init__(self) -> None:
        self.is_done = False

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sharded = trainer.world_size > 1 or isinstance(trainer.strategy, ModelParallelStrategy)
        state = full_state_dict(pl_module.model) if sharded else None  # type: ignore[arg-type]
        folder = Path(trainer.strategy.broadcast(str(trainer.log_dir))) / HF_FOLDER
        if trainer.is_global_zero:
            # Remains of a killed export.
            for left in folder.parent.glob(f".{HF_FOLDER}.*"):
                shutil.rmtree(left, ignore_errors=True)
            pl_module.export(folder, state)  # type: ignore[operator]
            log.info("exported: %s", os.path.relpath(folder))
        trainer.strategy.barrier("export")
        self.is_done = True
