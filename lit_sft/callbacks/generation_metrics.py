"""Scores generated answers at validation and test, and writes them to a table."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lit_sft import lightning_internals
from lit_sft.console import answers_markdown
from lit_sft.datamodule import data_of
from lit_sft.errors import UserError
from lit_sft.files import atomic_write
from lit_sft.generation.answer import Answer
from lit_sft.generation.prompts import Prompt
from lit_sft.generation.scoring import choose_prompts, evaluate, too_long_to_match
from lit_sft.model.generate import GenerationOptions, context_length
from lit_sft.types import Prompts

log = logging.getLogger(__name__)

TABLE = "evaluation.jsonl"
SETS = {"val": "validation", "test": "test"}
SHOWN_ROWS = 16
"""Most rows of the table in TensorBoard, which keeps every version of it."""
SHOWN_CHARACTERS = 500
"""Longest text in a cell of that table."""


class Evaluation(Callback):
    """Answers prompts of the validation (test) set greedily, and logs their scores.

    They are logged as `val/<score>` and `test/<score>`. The validation prompts are answered before
    training, too.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        """Scores before training."""
        self.last: tuple[int, dict[str, float]] = (0, {})
        """The step of the latest validation with answers, and its scores."""
        self.num_validations = 0
        self.step = 0
        """The step of the checkpoint that is evaluated."""
        self.prompts: dict[str, list[Prompt]] = {}
        """The prompts of each stage (`val`, `test`)."""
        self.is_clean = False
        """Whether the rows that a resumed run writes again are dropped from the table."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "num_validations": self.num_validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]
        self.num_validations = state_dict["num_validations"]

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.step = checkpoint["global_step"]
        if trainer.state.fn != "fit":
            # Log at the step of the checkpoint instead of 0, beside the metrics of the run.
            lightning_internals.set_logged_step(trainer, max(0, self.step - 1))
            trainer.fit_loop.epoch_progress.current.completed = checkpoint["epoch"]

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        message = self._choose(trainer, pl_module, "val")
        options = pl_module.evaluation
        scores: set[str] = set()
        if options and not self.prompts["val"]:
            scores = {f"val/{name}" for name in options.scores}
        if lost := scores & {_monitored(callback) for callback in trainer.callbacks}:  # type: ignore[attr-defined]
            raise UserError(f"{lost.pop()} is monitored, but {message}: monitor val/loss")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0 and self.prompts.get("val"):
            self.before = self._evaluate(trainer, pl_module, "val", 0)
            for logger in trainer.loggers:
                logger.log_metrics(self.before, step=0)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._choose(trainer, pl_module, "val")

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._choose(trainer, pl_module, "test")

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.prompts["val"] or trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        every_n_validations: int = pl_module.evaluation.every_n_validations  # type: ignore[union-attr, assignment]
        if fitting and self.num_validations % every_n_validations:
            self.num_validations += 1
            # Otherwise early stopping would take the old score for one that did not improve.
            for name in self.before:
                trainer.callback_metrics.pop(name, None)
            return
        step = trainer.global_step if fitting else self.step
        scores = self._evaluate(trainer, pl_module, "val", step)
        self.last = (step, scores)
        # Counted after the answers: a signal may stop the run in them, and then they are repeated.
        if fitting:
            self.num_validations += 1
        pl_module.log_dict(scores, prog_bar=True)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.prompts["test"]:
            pl_module.log_dict(self._evaluate(trainer, pl_module, "test", self.step), prog_bar=True)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, scores = self.last
        steps = trainer.global_step
        when = "after" if step == steps else f"at step {step:,} of {steps:,}"
        for name, before in self.before.items():
            if name in scores:
                log.info(
                    "%s: %.1f %% before, %.1f %% %s", name, 100 * before, 100 * scores[name], when
                )

    def _choose(self, trainer: Any, module: Any, stage: str) -> str:
        """Chooses the prompts of a stage once, before its first batch.

        So a prompt or metric that cannot be used is reported before training, and not after it.

        Returns:
            The warning that was logged, or an empty text.
        """
        if stage in self.prompts:
            return ""
        data = data_of(trainer).data
        options = module.evaluation
        message = ""
        self.prompts[stage] = []
        if options is not None and SETS[stage] in data.rows:
            asked = data.asked(data.rows[SETS[stage]], options.num_samples, skip=True)
            key = f"data.{SETS[stage]}"
            max_new_tokens = module.generation.max_new_tokens
            kept, message = choose_prompts(
                asked, options, key, max_new_tokens, context_length(module.model.lm.config)
            )
            self.prompts[stage] = kept
            for line in (message, too_long_to_match(kept, key, max_new_tokens)):
                if line:
                    log.warning(line)
        return message

    def _evaluate(self, trainer: Any, module: Any, stage: str, step: int) -> dict[str, float]:
        """Answers the prompts of a stage, writes the table, and returns the scores to log."""
        greedy = GenerationOptions(max_new_tokens=module.generation.max_new_tokens)
        batches = data_of(trainer).prompt_batches(self.prompts[stage], greedy)

        def answer(prompts: Prompts) -> list[list[Answer]]:
            module.between_answers()
            answers: list[list[Answer]] = module.answer(prompts, greedy)
            return answers

        scores, table = evaluate(batches, answer, module.evaluation)
        # `log_dir` is a collective call, so it comes before the condition.
        folder = trainer.log_dir
        if trainer.is_global_zero and folder is not None:
            rows = [{"step": step, "stage": stage, **row} for row in table]
            # A resumed run repeats all later steps, an evaluation only its own step.
            last_step = math.inf if trainer.state.fn == "fit" else step
            replaced = None if self.is_clean else (stage, (step, last_step))
            append(Path(folder) / TABLE, rows, replaced)
            self.is_clean = True
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text(f"evaluation/{stage}", markdown(table), step)
        return {f"{stage}/{name}": score for name, score in scores.items()}


def _monitored(callback: Callback) -> str | None:
    """Returns the scalar that early stopping or a checkpoint callback monitors."""
    options = getattr(callback, "options", None)
    return getattr(callback, "monitor", None) or getattr(options, "monitor", None)


def append(
    path: Path, rows: list[dict[str, Any]], replaced: tuple[str, tuple[int, float]] | None
) -> None:
    """Appends rows to the table.

    Args:
        path: The file, JSON lines.
        rows: The new rows.
        replaced: (stage, (first step, last step)) of older rows to drop, because they are written
            again. With it, a torn last line is dropped, too.
    """
    if replaced is not None and path.is_file():
        # A torn line may end in the middle of a character.
        text = path.read_text(encoding="utf-8", errors="replace")
        # `splitlines` would also split at line separators within a text.
        whole = text.split("\n")[:-1]
        kept = [f"{line}\n" for line in whole if not _is_replaced(json.loads(line), *replaced)]
        with atomic_write(path) as file:
            file.writelines(kept)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _is_replaced(row: dict[str, Any], stage: str, steps: tuple[int, float]) -> bool:
    return bool(row["stage"] == stage and steps[0] <= row["step"] <= steps[1])


def markdown(table: list[dict[str, Any]]) -> str:
    """Returns the first rows as a Markdown table, with long texts cut."""
    shown = table[:SHOWN_ROWS]
    columns = {title: [_cut(row.get(key, "")) for row in shown] for title, key in _COLUMNS.items()}
    return answers_markdown([_cut(row["prompt"]) for row in shown], columns)


_COLUMNS = {"answer": "prediction", "reference": "reference"}


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
