"""SFTTrainer, and the callbacks of a run in their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from typing_extensions import override

from lit_sft import lightning_internals
from lit_sft.callbacks.checkpointer import Checkpointer
from lit_sft.callbacks.fail_together import FailTogether
from lit_sft.callbacks.generation_metrics import Evaluation
from lit_sft.callbacks.hf_export import HFExport
from lit_sft.callbacks.last_row import LastRow
from lit_sft.callbacks.nan_guard import Guard
from lit_sft.callbacks.prediction_writer import PredictionWriter
from lit_sft.callbacks.preemption import StopOnSignal
from lit_sft.callbacks.progress import Lines, Progress, has_stopped_early
from lit_sft.callbacks.run_folder import LeaveFolder, RunFolder
from lit_sft.callbacks.sample_answers import Answers, FirstExample
from lit_sft.callbacks.step_callback import is_between_steps
from lit_sft.callbacks.throughput import Throughput
from lit_sft.checkpoint import find
from lit_sft.checkpoint import io as checkpoint_io
from lit_sft.checkpoint.io import CheckpointFiles
from lit_sft.errors import UserError
from lit_sft.memory_plan import needed_memory
from lit_sft.run import folder as run_folder


class SFTTrainer(L.Trainer):
    """Lightning's Trainer, which only stops between optimizer steps and knows the run's folder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        lightning_internals.never_ignore_last(self, self._find_last)

    def _find_last(self, stage: str) -> str:
        """Finds the checkpoint `last` below `default_root_dir`, as the command line does.

        Raises:
            UserError: There is none.
        """
        logs = Path(self.default_root_dir) / run_folder.LOGS
        found = find.find_checkpoint("last", logs, stage)
        assert found is not None
        return found

    @property
    @override
    def log_dir(self) -> str | None:
        """The run's folder. Lightning would ask the first logger, which may be a user's own."""
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder) and callback.is_known:
                return str(callback.folder)
        return super().log_dir

    @property
    def should_stop(self) -> bool:
        """Whether training stops (`trainer.max_time`, early stopping, a callback).

        Within an optimizer step it is false, so that the step is completed first.
        """
        within = self.training and self.accumulate_grad_batches > 1 and not is_between_steps(self)
        return self._should_stop and not within

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self._should_stop = value

    @override
    def _run_stage(self) -> Any:
        """Runs the stage, and then exports a resumed run that has no step left.

        Such a run was killed after its last checkpoint, or ended by early stopping. Lightning calls
        no training hooks then.
        """
        if self.state.fn != "fit":
            return super()._run_stage()
        lightning_internals.validate_at_the_end(self)
        self.should_stop = self.should_stop or has_stopped_early(self)
        results = super()._run_stage()
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder):
                callback.begin(self, has_steps=False)
            if isinstance(callback, HFExport) and not callback.is_done:
                callback.on_train_end(self, self.lightning_module)
        return results


def run_callbacks(
    config: Any,
    ckpt_path: str | None,
    is_fit: bool,
    files: CheckpointFiles,
    save_config: Callable[[Path], None],
) -> list[Callback]:
    """Lists the callbacks of a run.

    Lightning calls them in this order, but moves those that subclass `Checkpoint` to the end.

    Args:
        config: The settings of the command.
        ckpt_path: The checkpoint to resume from, or to evaluate.
        is_fit: Whether the command is `fit`.
        files: The plugin that writes checkpoints.
        save_config: A function that writes config.yaml to a path.
    """
    first_step = checkpoint_io.saved_step(ckpt_path) if ckpt_path and is_fit else None
    checkpointer = Checkpointer(config.checkpoint, files)
    folder = RunFolder(ckpt_path, first_step, save_config, checkpointer)
    callbacks: list[Callback] = [
        FailTogether(needed_memory),
        Guard(config.faults),
        folder,
        checkpointer,
        Throughput(),
        Lines(),
        FirstExample(),
        Evaluation(),
        Answers(),
        HFExport(),
        PredictionWriter(config.predict_output, ckpt_path),
        LastRow(),
        StopOnSignal(checkpointer, config.resume.max_restarts),
        LeaveFolder(folder),
    ]
    if Progress.is_wanted(config.trainer):
        callbacks.append(Progress())
    if config.early_stopping is not None:
        stop = config.early_stopping
        callbacks.append(
            EarlyStopping(stop.monitor, patience=stop.patience, mode=stop.mode, strict=False)
        )
    return callbacks


def own_callbacks(trainer: Any, dry: bool = False) -> list[Callback]:
    """Returns the callbacks that the user has set in `trainer.callbacks`.

    Args:
        trainer: The settings of the trainer.
        dry: Whether to leave out callbacks that save checkpoints or draw progress bars.

    Raises:
        UserError: A callback is not supported.
    """
    callbacks = as_list(trainer.callbacks)
    for callback in callbacks:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} is not supported, weights are not"
                " averaged: leave it out"
            )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise UserError(
            "trainer.callbacks: GradientAccumulationScheduler would change the batch of an"
            " optimizer step: leave it out, accumulation follows from data.global_batch_size"
        )
    if dry:
        return [each for each in callbacks if not isinstance(each, (Checkpoint, ProgressBar))]
    return list(callbacks)


def as_list(value: Any) -> list[Any]:
    """Returns a setting as a list; it may be one value, a list, or None."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
