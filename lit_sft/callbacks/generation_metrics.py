"""Answers to held-out prompts at validation and test: their scores, and the table of them."""

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
from lit_sft.generation.prompts import Prompt
from lit_sft.generation.scoring import choose_prompts, evaluate, too_long_to_match
from lit_sft.model.generate import GenerationOptions, context_length
from lit_sft.types import Prompts

log = logging.getLogger(__name__)

TABLE = "evaluation.jsonl"
SETS = {"val": "validation", "test": "test"}
SHOWN_ROWS, SHOWN_CHARACTERS = 16, 500
"""Of the table in TensorBoard, which keeps every version of it."""


class Evaluation(Callback):
    """Answers some rows of the validation (test) set greedily and logs `val/<score>`; before
    training, too.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        """Scores before training."""
        self.last: tuple[int, dict[str, float]] = (0, {})
        """The step of the newest validation with answers, and its scores."""
        self.num_validations = 0
        self.step = 0
        """Of the checkpoint that is evaluated."""
        self.prompts: dict[str, list[Prompt]] = {}
        self.is_clean = False
        """Whether rows of the table that a resumed run makes again were dropped."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "num_validations": self.num_validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.num_validations = state_dict["before"], state_dict["num_validations"]

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.step = checkpoint["global_step"]
        if trainer.state.fn != "fit":
            # Where Lightning logs: beside what the run found for this checkpoint, not at 0.
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
        if fitting:
            if self.num_validations % pl_module.evaluation.every_n_validations:  # type: ignore[union-attr, operator]
                self.num_validations += 1
                for name in self.before:
                    # Else early stopping takes an old score for one that did not improve.
                    trainer.callback_metrics.pop(name, None)
                return
        step = trainer.global_step if fitting else self.step
        scores = self._evaluate(trainer, pl_module, "val", step)
        self.last = (step, scores)
        # Not sooner: a signal may end the run in it, which then repeats it.
        self.num_validations += fitting
        pl_module.log_dict(scores, prog_bar=True)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.prompts["test"]:
            pl_module.log_dict(self._evaluate(trainer, pl_module, "test", self.step), prog_bar=True)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (step, scores), steps = self.last, trainer.global_step
        when = "after" if step == steps else f"at step {step:,} of {steps:,}"
        for name, before in self.before.items():
            if name in scores:
                log.info(
                    "%s: %.1f %% before, %.1f %% %s", name, 100 * before, 100 * scores[name], when
                )

    def _choose(self, trainer: Any, module: Any, stage: str) -> str:
        """Chooses the prompts of a stage once, before the first step or batch, and returns what was
        told about them.

        A prompt or a metric that cannot be used is known at once.
        """
        if stage in self.prompts:
            return ""
        data = data_of(trainer).data
        options = module.evaluation
        message = ""
        self.prompts[stage] = []
        if options is not None and SETS[stage] in data.rows:
            asked = data.asked(data.rows[SETS[stage]], options.num_samples, skip=True)
            key, most = f"data.{SETS[stage]}", module.generation.max_new_tokens
            kept, message = choose_prompts(
                asked, options, key, most, context_length(module.model.lm.config)
            )
            self.prompts[stage] = kept
            for line in filter(None, (message, too_long_to_match(kept, key, most))):
                log.warning(line)
        return message

    def _evaluate(self, trainer: Any, module: Any, stage: str, step: int) -> dict[str, float]:
        """Scores by the names under which they are logged; the table is written."""
        greedy = GenerationOptions(max_new_tokens=module.generation.max_new_tokens)
        batches = data_of(trainer).prompt_batches(self.prompts[stage], greedy)

        def answer(prompts: Prompts) -> list[list[str]]:
            module.between_answers()
            answers: list[list[str]] = module.answer(prompts, greedy)
            return answers

        scores, table = evaluate(batches, answer, module.evaluation)
        # A collective call.
        folder = trainer.log_dir
        if trainer.is_global_zero and folder is not None:
            rows = [{"step": step, "stage": stage, **row} for row in table]
            again = (step, math.inf if trainer.state.fn == "fit" else step)
            append(Path(folder) / TABLE, rows, None if self.is_clean else (stage, again))
            self.is_clean = True
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text(f"evaluation/{stage}", markdown(table), step)
        return {f"{stage}/{name}": score for name, score in scores.items()}


def _monitored(callback: Callback) -> str | None:
    """The scalar that a callback follows: early stopping, and what keeps the best checkpoint."""
    return getattr(callback, "monitor", None) or getattr(
        getattr(callback, "options", None), "monitor", None
    )


def append(
    path: Path, rows: list[dict[str, Any]], replaced: tuple[str, tuple[int, float]] | None
) -> None:
    """Adds lines to the table.

    Args:
        path: JSON lines.
        rows: What is added.
        replaced: (stage, (first, last step)): lines of these are made again, and dropped; so is a
            last line that is torn.
    """
    if replaced is not None and path.is_file():
        # A torn line may end within a character.
        text = path.read_text(encoding="utf-8", errors="replace")
        # `splitlines` splits at more than that.
        whole = text.split("\n")[:-1]
        kept = [f"{line}\n" for line in whole if not _is_replaced(json.loads(line), *replaced)]
        with atomic_write(path) as file:
            file.writelines(kept)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _is_replaced(row: dict[str, Any], stage: str, steps: tuple[int, float]) -> bool:
    return bool(row["stage"] == stage and steps[0] <= row["step"] <= steps[1])


def markdown(table: list[dict[str, Any]]) -> str:
    """Prompt, answer and reference of the first rows, cut where they are long."""
    shown = table[:SHOWN_ROWS]
    columns = {title: [_cut(row.get(key, "")) for row in shown] for title, key in _COLUMNS.items()}
    return answers_markdown([_cut(row["prompt"]) for row in shown], columns)


_COLUMNS = {"answer": "prediction", "reference": "reference"}


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
