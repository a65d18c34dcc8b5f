"""Shows the first training example, and answers to `data.questions` before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.panel import Panel
from typing_extensions import override

from lit_sft.console import answers_markdown, answers_table, coloured_tokens, show
from lit_sft.datamodule import data_of
from lit_sft.generation.answer import records
from lit_sft.generation.prompts import check_room
from lit_sft.generation.scoring import gathered
from lit_sft.model.generate import context_length


class FirstExample(Callback):
    """Shows the first training example before step 1, with its trained tokens coloured."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.global_step:
            return
        datamodule = data_of(trainer)
        input_ids, loss_mask, row = datamodule.data.caches["train"][0]
        text = coloured_tokens(datamodule.tokenizer, input_ids.tolist(), loss_mask.tolist())
        show(
            Panel(
                text,
                title=f"First training example (row {row}): green is trained, the rest is read",
            )
        )


class Answers(Callback):
    """Answers `data.questions` before the first step, at each validation and at the end."""

    def __init__(self) -> None:
        self.columns: dict[str, list[str]] = {}
        self.questions: list[str] = []
        """The questions that the column `before` answers."""
        self.asked_at: int | None = None
        """The step of the latest answers."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self.columns.get("before", []), "questions": self.questions}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.questions = state_dict.get("questions", [])
        if state_dict["before"]:
            self.columns["before"] = state_dict["before"]

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Refuse a question that is too long now, and not at the end of the run.
        questions = data_of(trainer).data.questions()
        check_room(
            questions,
            pl_module.generation.max_new_tokens,
            context_length(pl_module.model.lm.config),
        )
        if self.questions != list(_questions(trainer)):
            # A resumed run may have other questions.
            self.columns = {}
            self.questions = list(_questions(trainer))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._ask(trainer, pl_module, "before")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._ask(trainer, pl_module, "after")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.asked_at != trainer.global_step:
            self._ask(trainer, pl_module, "after")
        if trainer.is_global_zero and self.columns.get("after"):
            show(answers_table(_questions(trainer), self.columns))

    def _ask(self, trainer: L.Trainer, pl_module: Any, column: str) -> None:
        questions = _questions(trainer)
        if not questions:
            return
        answers = [""] * len(questions)
        datamodule = data_of(trainer)
        batches = datamodule.prompt_batches(datamodule.data.questions(), pl_module.generation)
        own: list[dict[str, Any]] = []
        for prompts in batches:
            own += records(prompts, pl_module.answer(prompts))
        for record in gathered(own):
            answers[record["index"]] = record["prediction"]
        self.columns[column] = answers
        self.asked_at = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text(
                    "answers", answers_markdown(questions, self.columns), trainer.global_step
                )


def _questions(trainer: L.Trainer) -> Sequence[str]:
    return data_of(trainer).options.questions
