"""Every private attribute of Lightning and jsonargparse that the package touches, each in a
function with the reason.

Whatever has a public way is not here. When a new release moves its internals, this is the file to
change.
"""

from __future__ import annotations

from argparse import Action
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override

# ------------------------------------------------------------------ checkpoints


class _GivenCheckpoint(_CheckpointConnector):
    """Resumes from the given checkpoint and from no other."""

    @override
    def _select_ckpt_path(
        self, state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool
    ) -> Any:
        return ckpt_path


def resume_only_from_given_checkpoint(trainer: L.Trainer) -> None:
    """Makes the trainer take `ckpt_path` and nothing else.

    Lightning also takes, without a word, what its own requeueing (`hpc_ckpt_*.ckpt`, Lightning
    #13773) or an `OnExceptionCheckpoint` of another run has left below `trainer.default_root_dir`.
    """
    trainer._checkpoint_connector = _GivenCheckpoint(trainer)


def dump_checkpoint(trainer: L.Trainer) -> dict[str, Any]:
    """Returns the whole state of a run. All ranks call it.

    The public `trainer.save_checkpoint` ends with a barrier. When rank 0 cannot write the file, it
    never gets there, and the other ranks wait for it (as in Lightning #20187). So the caller writes
    the state, and then tells all ranks.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def saves_by_clock(callback: ModelCheckpoint) -> bool:
    """Whether a `ModelCheckpoint` saves after an interval of time. It has no public attribute for
    its intervals.
    """
    return callback._train_time_interval is not None


def saves_at_epoch_end_only(callback: ModelCheckpoint) -> bool:
    """Whether a `ModelCheckpoint` was told to save at the end of an epoch, and so not after a
    validation.
    """
    return bool(callback._save_on_train_epoch_end)


def mark_as_saved(callback: ModelCheckpoint, step: int) -> None:
    """Tells a `ModelCheckpoint` that it has saved a step.

    It does not restore that from a checkpoint. A resumed run would save the step that it resumes
    from once more, in the middle of the next one.
    """
    callback._last_global_step_saved = step


# ------------------------------------------------------------------ the training loop


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after the current batch. It asks itself by several settings, in
    private.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def validates_by_clock(trainer: L.Trainer) -> bool:
    """Whether `trainer.val_check_interval` is a time. `Trainer` keeps only numbers in its public
    attribute.
    """
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


def begin_new_epoch(trainer: L.Trainer) -> None:
    """Lets a resumed run begin an epoch, instead of ending the one that the checkpoint was saved at
    the end of.

    With `trainer.max_steps` Lightning counts a finished epoch as interrupted, and then ends the
    next one at once (Lightning #19617). The public setter of `restarting` keeps the flag with
    `max_steps`.
    """
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.restarting = False


def logged_step(trainer: L.Trainer) -> int:
    """Returns the step under which Lightning logs next, which is not `trainer.global_step`
    (Lightning #11805).
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_step(trainer: L.Trainer, step: int) -> None:
    """Sets the step under which Lightning logs next. After some stops it restores one that is too
    small or too large.

    See Lightning #12274 and #19367.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def metrics_to_log(trainer: L.Trainer) -> dict[str, float] | None:
    """Returns the metrics that Lightning will log for the current batch; None if it logs nothing.

    The public `trainer.logged_metrics` also holds metrics of earlier steps, such as those of the
    last validation.
    """
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return None
    return {name: float(value) for name, value in connector.metrics["log"].items()}


def attach_datamodule(
    trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule
) -> None:
    """Connects a data module outside of `fit` and its siblings, which do it for their own arguments
    only.
    """
    trainer._data_connector.attach_datamodule(module, datamodule)


# ------------------------------------------------------------------ signals and ranks


def replace_signal_handling(trainer: L.Trainer, install: Callable[[], None]) -> None:
    """Installs our signal handlers where Lightning would install its own.

    Lightning's handler runs a collective wherever the signal interrupts the program, and its loop
    waits for the device in every forward pass to learn of a signal (Lightning #20806 and #21487).
    There is no setting for either.
    """
    trainer._signal_connector.register_signal_handlers = install  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]


def _do_nothing() -> None:
    pass


def kill_launched_ranks(strategy: Strategy) -> None:
    """Kills the ranks that this process has started, if Lightning's script launcher did that.

    A thread of the launcher polls the same list of processes, and kills this process when one of
    them has failed (Lightning #18218). It ends by itself when the list is empty.
    """
    launcher = strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    processes = list(launcher.procs)
    launcher.procs.clear()
    for process in processes:
        process.kill()


def share_gradient_buckets(strategy: DDPStrategy) -> None:
    """Lets gradients be views of DDP's buckets, which otherwise hold copies of them.

    The strategies `ddp` and `auto` are made by Lightning, which takes arguments only where a user
    makes the object.
    """
    strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)


# ------------------------------------------------------------------ other objects


def move_tensorboard_logger(logger: TensorBoardLogger, folder: Path) -> None:
    """Makes a logger write into a folder that was chosen after it was made. It may be one of the
    user's own.
    """
    logger._root_dir = str(folder.parent.parent)
    logger._name = folder.parent.name
    logger._version = folder.name


# ------------------------------------------------------------------ jsonargparse


def parser_actions(parser: ArgumentParser) -> list[Action]:
    """The options of a parser.

    Neither argparse nor jsonargparse lists them publicly. `get_defaults()` gives keys and defaults,
    without the types that a key may take and without the keys of a group that is null.
    """
    return parser._actions


def option_type(action: Action) -> Any:
    """The type that an option was added with; None for a group or a link.

    jsonargparse replaces `action.type` and keeps the type hint in a private attribute, which groups
    do not have.
    """
    return getattr(action, "_typehint", None)
