"""What people read: the first training example, and the answers to `data.questions` before and after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.panel import Panel
from typing_extensions import override

from lit_sft.display import answers_markdown, answers_table, coloured_tokens, console

log = logging.getLogger(__name__)


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
