"""The file that `predict` writes."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lit_sft.types import UserError

log = logging.getLogger(__name__)

PREDICTIONS = "predictions.jsonl"


class PredictionWriter(Callback):
    """Writes predictions as JSON lines: input order, every row exactly once, whatever the number of ranks.

    Args:
        output: File to write; None is `predictions.jsonl` in the run's folder.
    """

    def __init__(self, output: str | None) -> None:
        self.output = output
        self.path = Path()

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.part{rank}")

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path = Path(trainer.strategy.broadcast(self.output or str(Path(str(trainer.log_dir)) / PREDICTIONS)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_text("")

    @override
    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        with self._part(trainer.global_rank).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in outputs)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            parts = [self._part(rank) for rank in range(trainer.world_size)]
            lines = [line for part in parts for line in part.read_text(encoding="utf-8").split("\n") if line]
            records = sorted(((json.loads(line)["index"], line) for line in lines), key=lambda record: record[0])
            expected = trainer.datamodule.num_predictions  # type: ignore[attr-defined]
            if [index for index, _ in records] != list(range(expected)):
                raise UserError(
                    f"{self.path}: {len(records)} predictions for {expected} prompts; the parts are kept beside it"
                )
            aside = self.path.with_name(f".{self.path.name}.tmp")
            aside.write_text("".join(line + "\n" for _, line in records), encoding="utf-8")
            os.replace(aside, self.path)
            for part in parts:
                part.unlink()
            log.info("predictions: %s (%s rows)", os.path.relpath(self.path), expected)
        trainer.strategy.barrier("predictions merged")
