"""The private attributes of Lightning and jsonargparse that the package uses, each with a reason.

Nothing here has a public way. When a release changes its internals, this is the file to change.
"""

from __future__ import annotations

import warnings
from argparse import Action
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override

# ------------------------------------------------------------------ checkpoints


class _GivenCheckpoint(_CheckpointConnector):
    """Resumes from the given checkpoint only."""

    @override
    def _select_ckpt_path(
        self, state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool
    ) -> Any:
        return ckpt_path


def resume_only_from_given_checkpoint(trainer: L.Trainer) -> None:
    """Makes the trainer resume from `ckpt_path` only.

    Otherwise Lightning silently prefers a checkpoint below `trainer.default_root_dir` that its own
    requeueing (`hpc_ckpt_*.ckpt`, Lightning #13773) or an `OnExceptionCheckpoint` has left there,
    even if it belongs to another run.
    """
    trainer._checkpoint_connector = _GivenCheckpoint(trainer)


class _LastOrRefused(_CheckpointConnector):
    """Resumes from what Lightning finds as `last`, or else from what a function finds."""

    def __init__(self, trainer: L.Trainer, find_last: Callable[[str], str]) -> None:
        super().__init__(trainer)
        self.find_last = find_last

    @override
    def _select_ckpt_path(
        self, state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool
    ) -> Any:
        with warnings.catch_warnings():
            # The function says what is wrong.
            warnings.filterwarnings("ignore", message=".*there is no last checkpoint available.*")
            found = super()._select_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)
        if found is None and ckpt_path == "last":
            return self.find_last(state_fn.value)
        return found


def never_ignore_last(trainer: L.Trainer, find_last: Callable[[str], str]) -> None:
    """Makes `ckpt_path="last"` find a checkpoint, or fail.

    Lightning only warns if its own callbacks know none, and then trains anew or evaluates the
    weights as they are. No setting changes this.

    Args:
        trainer: The trainer.
        find_last: Takes the name of the stage, such as `fit`, and returns a path or raises.
    """
    trainer._checkpoint_connector = _LastOrRefused(trainer, find_last)


def dump_checkpoint(trainer: L.Trainer) -> dict[str, Any]:
    """Returns the whole state of a run. All ranks call it.

    The public `trainer.save_checkpoint` ends with a barrier. If rank 0 cannot write the file, it
    never reaches the barrier, and the other ranks wait for it (as in Lightning #20187). So the
    caller writes the state, and then tells all ranks whether it succeeded.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def saves_by_clock(callback: ModelCheckpoint) -> bool:
    """Whether a `ModelCheckpoint` saves at intervals of time, which it does not tell publicly."""
    return callback._train_time_interval is not None


def saves_at_epoch_end_only(callback: ModelCheckpoint) -> bool:
    """Whether a `ModelCheckpoint` saves at the end of an epoch only, and never in a validation."""
    return bool(callback._save_on_train_epoch_end)


def mark_as_saved(callback: ModelCheckpoint, step: int) -> None:
    """Tells a `ModelCheckpoint` that it has saved this step already.

    It does not restore this from a checkpoint. A resumed run would save its first step once more,
    in the middle of the next optimizer step.
    """
    callback._last_global_step_saved = step


# ------------------------------------------------------------------ the training loop


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after the current batch.

    The answer depends on several settings, which only a private method of Lightning combines.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def validate_at_the_end(trainer: L.Trainer) -> None:
    """Makes Lightning validate after the last step, too, if the run ends inside an epoch.

    Lightning does so for `trainer.max_time` in an epoch that validates, but not for
    `trainer.max_steps`. No setting asks for it.
    """
    loop = trainer.fit_loop.epoch_loop

    def is_due(fetcher: Any) -> bool:
        by_steps = -1 != trainer.max_steps <= trainer.global_step
        is_stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
        if trainer.enable_validation and (by_steps or is_stopped):
            return True
        return type(loop)._should_check_val_fx(loop, fetcher)

    loop._should_check_val_fx = is_due  # type: ignore[method-assign, assignment]


def validates_by_clock(trainer: L.Trainer) -> bool:
    """Whether `trainer.val_check_interval` is a time. The public attribute only holds numbers."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


def begin_new_epoch(trainer: L.Trainer) -> None:
    """Makes a run resumed at the end of an epoch begin the next epoch.

    With `trainer.max_steps` Lightning takes the finished epoch for an interrupted one, and then
    ends the next epoch at once (Lightning #19617). With `max_steps` the public setter of
    `restarting` does not clear the flag.
    """
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.restarting = False


def logged_step(trainer: L.Trainer) -> int:
    """Returns the step that Lightning logs next, which is not `trainer.global_step`.

    See Lightning #11805.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_step(trainer: L.Trainer, step: int) -> None:
    """Sets the step that Lightning logs next.

    After some stops Lightning restores a number that is too small or too large. See Lightning
    #12274 and #19367.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def metrics_to_log(trainer: L.Trainer) -> dict[str, float] | None:
    """Returns the metrics that Lightning logs for the current batch; None if it logs nothing.

    The public `trainer.logged_metrics` also holds metrics of earlier steps, for instance those of
    the last validation.
    """
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return None
    return {name: float(value) for name, value in connector.metrics["log"].items()}


def attach_datamodule(
    trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule
) -> None:
    """Attaches a data module to a trainer before `fit`, `validate`, `test` or `predict` does it."""
    trainer._data_connector.attach_datamodule(module, datamodule)


# ------------------------------------------------------------------ signals and ranks


def replace_signal_handling(trainer: L.Trainer, install: Callable[[], None]) -> None:
    """Replaces Lightning's handling of signals by our signal handlers.

    Lightning's handler runs a collective wherever the signal interrupts the program, and its loop
    synchronizes with the device in every forward pass to ask for signals (Lightning #20806 and
    #21487). No setting turns either off.
    """
    trainer._signal_connector.register_signal_handlers = install  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]


def _do_nothing() -> None:
    pass


def kill_launched_ranks(strategy: Strategy) -> None:
    """Kills the ranks that Lightning's script launcher has started from this process.

    A thread of the launcher polls the list of these processes, and kills this process if one of
    them has failed (Lightning #18218). The thread ends when the list is empty.
    """
    launcher = strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    processes = list(launcher.procs)
    launcher.procs.clear()
    for process in processes:
        process.kill()


def share_gradient_buckets(strategy: DDPStrategy) -> None:
    """Makes gradients views of DDP's buckets, which otherwise hold copies of them.

    Lightning makes the strategies `ddp` and `auto` itself, without a way to pass this argument.
    """
    strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)


# ------------------------------------------------------------------ other objects


def move_tensorboard_logger(logger: TensorBoardLogger, folder: Path) -> None:
    """Sets the folder of a TensorBoard logger that exists already, perhaps a user's own."""
    logger._root_dir = str(folder.parent.parent)
    logger._name = folder.parent.name
    logger._version = folder.name


# ------------------------------------------------------------------ jsonargparse


def parser_actions(parser: ArgumentParser) -> list[Action]:
    """Returns the options of a parser.

    Neither argparse nor jsonargparse lists them publicly. `get_defaults()` returns keys and
    defaults, but no types, and no keys of a group that is null.
    """
    return parser._actions


def class_arguments(chosen: type) -> list[str]:
    """Returns the names of the arguments that jsonargparse accepts as `init_args` of a class.

    Besides the signature these are arguments that the class passes on as `**kwargs`, which
    jsonargparse finds in its source.
    """
    return [parameter.name for parameter in get_signature_parameters(chosen)]


def option_type(action: Action) -> Any:
    """Returns the type hint of an option; None for a group or a link.

    jsonargparse replaces `action.type`, and keeps the type hint in a private attribute.
    """
    return getattr(action, "_typehint", None)
