"""The position of a run in its data, and the check that a resumed run has the same data.

A checkpoint holds hashes of its data and the settings behind them, so that an error can name the
setting that differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_sft.data.cache import ExampleCache
from lit_sft.data.packing import Packs
from lit_sft.data.sampler import StepOrder
from lit_sft.errors import UserError
from lit_sft.intervals import limited_batches
from lit_sft.settings import DataConfig

log = logging.getLogger(__name__)

DATA_MODULE = "SFTDataModule"
"""Key of the data module's state in a checkpoint of Lightning."""
ORDER = ("packing", "global_batch_size", "seed")
"""Settings that decide the order of the examples, besides the packs."""


def remember(
    settings: Mapping[str, Any],
    options: DataConfig,
    caches: Mapping[str, ExampleCache],
    packs: Packs,
) -> dict[str, Any]:
    """Returns what a checkpoint keeps about its data: hashes, and the settings by name.

    Args:
        settings: `Preparation.identity` of the training set. Its own keys take precedence over
            those of its `renderer`.
        options: The settings of the data module.
        caches: The tokenized training set, and the validation set if there is one.
        packs: Which training examples share a row.
    """
    rest = dict(settings)
    return {
        "examples": caches["train"].fingerprint,
        "settings": _readable({**rest.pop("renderer"), **rest}),
        "order": _readable({key: getattr(options, key) for key in ORDER}),
        "packs": packs.fingerprint,
        "validation": caches["validation"].fingerprint if "validation" in caches else None,
    }


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that a resumed run has the examples of its checkpoint, in the same order.

    Args:
        saved: The result of `remember` in the checkpoint. An entry that an older checkpoint lacks
            counts as equal.
        now: The result of `remember` in this run.

    Raises:
        UserError: Something differs; the message names the setting.
    """
    changed = _differences(saved["order"], now["order"])
    if saved["examples"] != now["examples"]:
        by_settings = _differences(saved["settings"], now["settings"])
        changed += by_settings or ["the tokens themselves, by no setting"]
    elif saved.get("packs", now["packs"]) != now["packs"]:
        before = {"max_length": saved["settings"]["max_length"]}
        length = _differences(before, {"max_length": now["settings"]["max_length"]})
        changed += length
        if not changed:
            changed.append("which examples share a row, by no setting")
    if changed:
        raise UserError(
            "the checkpoint was made with other examples or in another order:"
            f" {'; '.join(changed)}: restore that, or set resume.allow_other_data to true"
        )


def tell_other_validation(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns if the validation set differs from that of the checkpoint.

    The best checkpoint would be chosen between losses of different rows.

    Args:
        saved: The result of `remember` in the checkpoint.
        now: The result of `remember` in this run.
    """
    before = saved.get("validation")
    after = now["validation"]
    if before and after and before != after:
        log.warning(
            "validation: other examples than before the checkpoint; the best score so far, which"
            " best.ckpt and early stopping go by, was of those"
        )


def check_split(saved: Mapping[str, Any], rows: str) -> None:
    """Checks that `data.val_size` splits off the rows that it split off for the checkpoint.

    Args:
        saved: The result of `remember` in the checkpoint.
        rows: Fingerprint of the training rows after the split.

    Raises:
        UserError: The rows differ, so the checkpoint may be trained on some validation rows.
    """
    if _differences(saved["settings"], _readable({"rows": rows})):
        raise UserError(
            "data.val_size splits off other rows than it did for the checkpoint, which may have"
            " been trained on them: restore data.train, data.val_size, data.max_samples and"
            " seed_everything, set data.validation to rows it was not trained on, or set"
            " resume.allow_other_data to true"
        )


@dataclass(frozen=True)
class Position:
    """The position between two optimizer steps.

    It depends neither on the number of ranks nor on the size of a micro-batch.
    """

    epoch: int
    steps: int
    """Optimizer steps done in the epoch."""
    global_step: int
    """Optimizer steps done in all epochs."""

    @classmethod
    def saved_in(
        cls, checkpoint: Mapping[str, Any], order: StepOrder, limit_train_batches: int | float
    ) -> Position:
        """Reads the position of a checkpoint.

        If the epoch is shorter now, so that it has ended by this position, the next epoch begins.
        But a checkpoint saved during a validation stays in its epoch, so that the validation is
        repeated first.

        Args:
            checkpoint: A checkpoint with a position.
            order: The order of the training set.
            limit_train_batches: `trainer.limit_train_batches`.
        """
        epoch, steps = checkpoint[DATA_MODULE]["position"]
        global_step = checkpoint["global_step"]
        is_over = order.batches_in_steps(steps) >= limited_batches(order, limit_train_batches)
        validation = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
        in_validation = validation["ready"] != validation["processed"]
        if steps and is_over and not in_validation:
            return cls(epoch + 1, 0, global_step)
        return cls(epoch, steps, global_step)

    def count_batches(
        self, loops: dict[str, Any], order: StepOrder, limit_train_batches: int | float
    ) -> None:
        """Rewrites the counters of micro-batches in the state of Lightning's loops.

        The differences between the counters are kept.

        Args:
            loops: State of the fit loop; it is changed.
            order: The order of the training set.
            limit_train_batches: `trainer.limit_train_batches`.
        """
        per_epoch = limited_batches(order, limit_train_batches)
        batches = min(order.batches_in_steps(self.steps), per_epoch)
        progress = loops["epoch_loop.batch_progress"]
        _shift(progress["current"], ready=batches or per_epoch)
        _shift(progress["total"], ready=self.epoch * per_epoch + batches)

    def count_epochs(self, loops: dict[str, Any]) -> None:
        """Rewrites the epoch counters in the state of Lightning's loops to an unfinished epoch.

        `trainer.max_steps` may have ended the epoch early, and then Lightning counts it as done.

        Args:
            loops: State of the fit loop; it is changed.
        """
        for counters in loops["epoch_progress"].values():
            counters["processed"] = counters["started"] - (1 if self.steps else 0)
            counters["completed"] = counters["started"] - 1


def restore(checkpoint: Mapping[str, Any], trainer: Any) -> None:
    """Restores the position of a checkpoint in the data module and in Lightning's loops.

    Lightning counts micro-batches, but the number of micro-batches per optimizer step may have
    changed since the checkpoint was saved.

    Args:
        checkpoint: The checkpoint. Its `loops` are changed before Lightning reads them.
        trainer: The trainer, whose data module gets the position.
    """
    datamodule = trainer.datamodule
    order = datamodule.orders["train"]
    position = Position.saved_in(checkpoint, order, trainer.limit_train_batches)
    datamodule.position = (position.epoch, position.steps)
    datamodule.steps_done = position.global_step
    loops = checkpoint["loops"]["fit_loop"]
    position.count_batches(loops, order, trainer.limit_train_batches)
    _, saved_steps = checkpoint[DATA_MODULE]["position"]
    if saved_steps:
        position.count_epochs(loops)


def _shift(counters: dict[str, int], ready: int) -> None:
    difference = ready - counters["ready"]
    for name in ("ready", "started", "processed", "completed"):
        counters[name] += difference


def _readable(parts: Mapping[str, Any]) -> dict[str, str]:
    """Returns settings as short texts, in which a hash replaces a long value."""
    texts = {}
    for key, value in parts.items():
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        if len(text) > 80:
            text = "#" + hashlib.sha256(text.encode()).hexdigest()[:12]
        texts[key] = text
    return texts


def _differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lists the settings in both that differ, such as `max_length (2048, now 1024)`."""
    changed = [key for key in sorted(saved.keys() & now.keys()) if saved[key] != now[key]]
    return [f"{key} ({saved[key]}, now {now[key]})" for key in changed]
