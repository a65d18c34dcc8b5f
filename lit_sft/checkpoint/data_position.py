"""Whether a run goes on with the data of its checkpoint, and where: what is remembered, and what
differs, by name.
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
from lit_sft.settings import DataConfig

log = logging.getLogger(__name__)

DATA_MODULE = "SFTDataModule"
"""Key under which Lightning keeps the state of the data module in a checkpoint."""
ORDER = ("packing", "global_batch_size", "seed")
"""Settings that decide the order of the examples, besides what shares a pack."""


def remember(
    settings: Mapping[str, Any],
    options: DataConfig,
    caches: Mapping[str, ExampleCache],
    packs: Packs,
) -> dict[str, Any]:
    """What a checkpoint keeps of the data: hashes, and by the names of the settings all that
    decides the examples.

    Args:
        settings: `Preparation.identity` of the training set; what stands beside its `renderer`
            wins.
        options: Of the data module.
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
    """Refuses to go on with other examples, or in another order, than those of a checkpoint.

    Args:
        saved: What `remember` returned then; what an older checkpoint lacks counts as equal.
        now: What it returns now.

    Raises:
        UserError: Says which setting differs.
    """
    changed = _differences(saved["order"], now["order"])
    if saved["examples"] != now["examples"]:
        changed += _differences(saved["settings"], now["settings"]) or [
            "the tokens themselves, by no setting"
        ]
    elif saved.get("packs", now["packs"]) != now["packs"]:
        length = _differences(
            *({"max_length": data["settings"]["max_length"]} for data in (saved, now))
        )
        changed += length or ([] if changed else ["which examples share a row, by no setting"])
    if changed:
        raise UserError(
            "the checkpoint was made with other examples or in another order:"
            f" {'; '.join(changed)}: restore that, or set resume.allow_other_data to true"
        )


def tell_other_validation(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns where losses before and after the checkpoint are of different rows, between which the
    best is chosen.
    """
    before, after = saved.get("validation"), now["validation"]
    if before and after and before != after:
        log.warning(
            "validation: other examples than before the checkpoint; the best score so far, which"
            " best.ckpt and early stopping go by, was of those"
        )


def check_split(saved: Mapping[str, Any], rows: str) -> None:
    """Refuses to split the validation rows off other rows than those the checkpoint was trained on
    the rest of.

    Args:
        saved: What `remember` returned then.
        rows: Fingerprint of the training rows that are left now.

    Raises:
        UserError: Some of the rows to evaluate on may have been trained.
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
    """Where a run stands between two optimizer steps, whatever the number of ranks and the size of
    a micro-batch.
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

        An epoch that has got so short that it is over counts as done. But a checkpoint that was
        saved in a validation stays in its epoch, so that the validation comes first.

        Args:
            checkpoint: A checkpoint that has a position.
            order: The order of the training set.
            limit_train_batches: `trainer.limit_train_batches`.
        """
        epoch, steps = checkpoint[DATA_MODULE]["position"]
        global_step = checkpoint["global_step"]
        is_over = order.batches_in_steps(steps) >= order.limited_batches(limit_train_batches)
        validation = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
        in_validation = validation["ready"] != validation["processed"]
        if steps and is_over and not in_validation:
            return cls(epoch + 1, 0, global_step)
        return cls(epoch, steps, global_step)

    def count_batches(
        self, loops: dict[str, Any], order: StepOrder, limit_train_batches: int | float
    ) -> None:
        """Rewrites the micro-batch counters in the state of Lightning's loops. Differences between
        them are kept.

        Args:
            loops: State of the fit loop.
            order: The order of the training set.
            limit_train_batches: `trainer.limit_train_batches`.
        """
        per_epoch = order.limited_batches(limit_train_batches)
        batches = min(order.batches_in_steps(self.steps), per_epoch)
        progress = loops["epoch_loop.batch_progress"]
        _shift(progress["current"], ready=batches or per_epoch)
        _shift(progress["total"], ready=self.epoch * per_epoch + batches)

    def count_epochs(self, loops: dict[str, Any]) -> None:
        """Rewrites the epoch counters in the state of Lightning's loops, to those of an epoch that
        goes on.

        `trainer.max_steps` ends an epoch early, and Lightning has counted it as done.

        Args:
            loops: State of the fit loop.
        """
        for counters in loops["epoch_progress"].values():
            counters["processed"] = counters["started"] - (1 if self.steps else 0)
            counters["completed"] = counters["started"] - 1


def restore(checkpoint: Mapping[str, Any], trainer: Any) -> None:
    """Lets a run go on where its checkpoint stands: the data module and the counters of Lightning's
    loops.

    Lightning counts micro-batches, and an optimizer step may have another number of them than it
    had then.

    Args:
        checkpoint: Its `loops` are changed, before Lightning reads them.
        trainer: Its data module gets the position.
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
    """Settings as short texts: long ones are hashed."""
    texts = {
        key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in parts.items()
    }
    return {
        key: text if len(text) <= 80 else "#" + hashlib.sha256(text.encode()).hexdigest()[:12]
        for key, text in texts.items()
    }


def _differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs of all that both know, as `max_length (2048, now 1024)`."""
    changed = [key for key in sorted(saved.keys() & now.keys()) if saved[key] != now[key]]
    return [f"{key} ({saved[key]}, now {now[key]})" for key in changed]
