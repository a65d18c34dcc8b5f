"""Writes the file of `predict`."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lit_sft.datamodule import data_of
from lit_sft.errors import UserError
from lit_sft.files import atomic_write
from lit_sft.generation.prompts import check_room
from lit_sft.model.generate import context_length
from lit_sft.model_builder import fingerprint

log = logging.getLogger(__name__)

PREDICTIONS = "predictions.jsonl"


class PredictionWriter(Callback):
    """Writes predictions as JSON lines: each row once, in input order, for any number of ranks.

    Until the end every rank writes a part beside the file. The first line of a part identifies
    prompts and settings. If `predict` is stopped and run again, it takes over the rows of parts
    with the same first line.

    Args:
        output: The file to write; None is `predictions.jsonl` in the run's folder.
        ckpt_path: The checkpoint that answers, or None. Lightning only knows it when it is
            restored, which is too late here.
    """

    def __init__(self, output: str | None, ckpt_path: str | None) -> None:
        self.output = output
        self.ckpt_path = ckpt_path
        self.path = Path()
        self.head = ""
        """The first line of the parts."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes over the parts of an earlier `predict`, before prompts are dealt to the ranks."""
        if stage != "predict":
            return
        self.path = Path(
            trainer.strategy.broadcast(self.output or str(Path(str(trainer.log_dir)) / PREDICTIONS))
        )
        datamodule = data_of(trainer)
        prompts = datamodule.predict_prompts
        done: set[int] = set()
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            asked = [(prompt.ids, prompt.text, prompt.reference) for prompt in prompts]
            settings = fingerprint(pl_module.options, trainer.precision, self.ckpt_path)  # type: ignore[arg-type]
            self.head = json.dumps({"prompts": _hash(asked), "settings": _hash(settings)}) + "\n"
            done = self._take_over(len(prompts))
        self.head, datamodule.predicted = trainer.strategy.broadcast((self.head, done))

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        max_new_tokens = pl_module.generation.max_new_tokens  # type: ignore[union-attr]
        context = context_length(pl_module.model.lm.config)  # type: ignore[union-attr, arg-type]
        check_room(data_of(trainer).predict_prompts, max_new_tokens, context)  # type: ignore[arg-type]
        self._part(trainer.global_rank).write_text(self.head, encoding="utf-8")

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
            file.flush()
            os.fsync(file.fileno())

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            parts = self._parts()
            lines = self._lines(parts)
            expected = len(data_of(trainer).predict_prompts)
            if sorted(lines) != list(range(expected)):
                raise UserError(
                    f"{self.path}: {len(lines)} predictions for {expected} prompts; the parts are"
                    " kept beside it"
                )
            with atomic_write(self.path) as file:
                file.writelines(lines[index] for index in range(expected))
            for part in parts:
                part.unlink()
            log.info("predictions: %s (%s rows)", os.path.relpath(self.path), expected)
        trainer.strategy.barrier("predictions merged")

    def _part(self, name: int | str) -> Path:
        return self.path.with_name(f".{self.path.name}.part{name}")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f".{glob.escape(self.path.name)}.part*"))

    def _take_over(self, num_prompts: int) -> set[int]:
        """Gathers the rows of earlier parts in one part, and returns their indices.

        Args:
            num_prompts: The number of all prompts.
        """
        parts = self._parts()
        lines = self._lines(parts)
        if parts and not lines:
            log.info(
                "%s: the parts beside it are of other prompts or settings: started anew", self.path
            )
        if lines:
            log.info(
                "predict goes on: %s of %s prompts are answered already", len(lines), num_prompts
            )
            with atomic_write(self._part("s")) as file:
                file.writelines((self.head, *lines.values()))
        for part in parts:
            # The new part, which is written first, holds their rows.
            if part != self._part("s") or not lines:
                part.unlink()
        return set(lines)

    def _lines(self, parts: Iterable[Path]) -> dict[int, str]:
        """Returns the lines of parts with our first line, by index, without torn last lines."""
        found: dict[int, str] = {}
        for part in parts:
            text = part.read_text(encoding="utf-8", errors="replace")
            whole_lines = text.split("\n")[:-1]
            if not whole_lines or whole_lines[0] + "\n" != self.head:
                continue
            for line in whole_lines[1:]:
                found[json.loads(line)["index"]] = line + "\n"
        return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
