"""What happens around the training loop: speed, answers before and after, the export, the predictions file."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.panel import Panel
from typing_extensions import override

from lit_sft.display import answers_markdown, answers_table, coloured_tokens, console
from lit_sft.model.parallel import full_state_dict
from lit_sft.types import UserError

log = logging.getLogger(__name__)

HF_FOLDER = "hf"
PREDICTIONS = "predictions.jsonl"


class Throughput(Callback):
    """Logs `train/tokens_per_second` and `train/num_tokens`, over all ranks, without waiting for the device."""

    def __init__(self) -> None:
        self.num_tokens: torch.Tensor | float = 0.0
        self.step_ended = 0.0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"num_tokens": float(self.num_tokens)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_tokens = state_dict["num_tokens"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_ended = time.monotonic()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_ended = time.monotonic()  # validation is not training time

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        now = time.monotonic()
        tokens = pl_module.window[2]  # type: ignore[index]
        self.num_tokens = tokens + self.num_tokens
        pl_module.log("train/tokens_per_second", (tokens / (now - self.step_ended)).float(), prog_bar=True)
        pl_module.log("train/num_tokens", self.num_tokens.double())
        self.step_ended = now


class FirstExample(Callback):
    """Shows the first training example before step 1, its trained tokens coloured."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.global_step:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        input_ids, loss_mask, row = datamodule.data.caches["train"][0]
        text = coloured_tokens(datamodule.tokenizer, input_ids.tolist(), loss_mask.tolist())
        console().print(Panel(text, title=f"First training example (row {row}): green is trained, the rest is read"))


class Answers(Callback):
    """Answers `data.questions` before the first step, at each validation and at the end; scores the model before it."""

    def __init__(self) -> None:
        self.columns: dict[str, list[str]] = {}
        self.scores: dict[str, float] = {}
        """Generation metrics before training."""
        self.asked_at: int | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self.columns.get("before", []), "scores": self.scores}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = state_dict["scores"]
        if state_dict["before"]:
            self.columns["before"] = state_dict["before"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._ask(trainer, pl_module, "before")
            if pl_module.evaluation is not None and "validation" in trainer.datamodule.data.rows:  # type: ignore[attr-defined]
                scores = pl_module.generation_scores("val")  # type: ignore[operator]
                self.scores = {f"val/{name}": float(score) for name, score in scores.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(self.scores, step=0)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._ask(trainer, pl_module, "after")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.asked_at != trainer.global_step:
            self._ask(trainer, pl_module, "after")
        if trainer.is_global_zero and self.columns.get("after"):
            console().print(answers_table(_questions(trainer), self.columns))
        for name, before in self.scores.items():
            if name in trainer.callback_metrics:
                log.info("%s: %.1f %% before, %.1f %% after", name, 100 * before, 100 * trainer.callback_metrics[name])

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule, column: str) -> None:
        questions = _questions(trainer)
        if not questions:
            return
        answers = [""] * len(questions)
        for prompts in trainer.datamodule.question_prompts():  # type: ignore[attr-defined]  # the same on every rank
            for index, answer in zip(prompts["index"], pl_module.answer(prompts), strict=True):  # type: ignore[operator]
                answers[index] = answer
        self.columns[column], self.asked_at = answers, trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("answers", answers_markdown(questions, self.columns), trainer.global_step)


def _questions(trainer: L.Trainer) -> Sequence[str]:
    return trainer.datamodule.options.questions  # type: ignore[attr-defined]


class HFExport(Callback):
    """Writes `hf/`, a plain Hugging Face directory (weights or adapter), when training ends."""

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = full_state_dict(pl_module.model) if trainer.world_size > 1 else None  # type: ignore[arg-type]
        folder = Path(trainer.strategy.broadcast(str(trainer.log_dir))) / HF_FOLDER
        if trainer.is_global_zero:
            pl_module.export(folder, state)  # type: ignore[operator]
            log.info("exported: %s", os.path.relpath(folder))
        trainer.strategy.barrier("export")


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
