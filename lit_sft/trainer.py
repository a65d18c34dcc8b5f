"""The trainer: Lightning's, with commands of our own, and with everything that happens around a run in its order."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

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
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override

from lit_sft.callbacks.checkpointer import Checkpointer
from lit_sft.callbacks.fail_together import FailTogether
from lit_sft.callbacks.generation_metrics import Evaluation
from lit_sft.callbacks.hf_export import HFExport
from lit_sft.callbacks.nan_guard import Guard
from lit_sft.callbacks.prediction_writer import PredictionWriter
from lit_sft.callbacks.progress import Lines, Progress, has_stopped_early
from lit_sft.callbacks.run_folder import KeepFolder, LeaveFolder
from lit_sft.callbacks.sample_answers import Answers, FirstExample
from lit_sft.callbacks.throughput import Throughput
from lit_sft.callbacks.weight_averaging import Averaging
from lit_sft.checkpoint import io as checkpoint_io
from lit_sft.checkpoint.io import CheckpointFiles
from lit_sft.commands import doctor, preview
from lit_sft.commands import export as commands_export
from lit_sft.datamodule import SFTDataModule
from lit_sft.errors import UserError
from lit_sft.module import SFTModule
from lit_sft.run import folder as run_folder
from lit_sft.run import loggers
from lit_sft.run.preemption import StopOnSignal

log = logging.getLogger(__name__)


class SFTTrainer(L.Trainer):
    """Lightning's Trainer with the commands it does not have; LightningCLI makes a subcommand of every method listed
    there.
    """

    plan = doctor.Plan()
    """What `doctor` is asked about, which itself takes one device."""

    @property
    @override
    def log_dir(self) -> str | None:
        """The run's folder, whatever the loggers are; Lightning asks the first of them."""
        chosen = next((c for c in self.callbacks if isinstance(c, run_folder.RunFolder) and c.is_known), None)  # type: ignore[attr-defined]
        return super().log_dir if chosen is None else str(chosen.folder)

    @property
    def should_stop(self) -> bool:
        """Whether to stop (`trainer.max_time`, early stopping): at the end of an optimizer step, and not within one."""
        within = self.training and self.accumulate_grad_batches > 1 and self.fit_loop._should_accumulate()
        return self._should_stop and not within

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self._should_stop = value

    @override
    def _run_stage(self) -> Any:
        """As in Lightning, which leaves out all hooks of training where a resumed run has no step left: one that was
        killed after its last checkpoint is exported still, under the settings of now. One that early stopping had ended
        has none left, too.
        """
        self.should_stop = self.should_stop or (self.state.fn == "fit" and has_stopped_early(self))
        results = super()._run_stage()
        for callback in self.callbacks if self.state.fn == "fit" else []:  # type: ignore[attr-defined]
            if isinstance(callback, run_folder.RunFolder):
                callback.begin(self, has_steps=False)
            if isinstance(callback, HFExport) and not callback.is_done:
                for averaging in [c for c in self.callbacks if isinstance(c, WeightAveraging)]:  # type: ignore[attr-defined]
                    averaging.on_train_end(self, self.lightning_module)  # the model takes the average
                callback.on_train_end(self, self.lightning_module)
        return results

    def preview(
        self, model: SFTModule, datamodule: SFTDataModule, num_rows: int = 3, output: Literal["rich", "json"] = "rich"
    ) -> None:
        """Show rows of the training set as the model will see them.

        Args:
            model: Not needed.
            datamodule: Its training rows are shown.
            num_rows: Rows to show.
            output: For people (rich) or programs (json).
        """
        preview.preview(datamodule.data, num_rows, output)

    def doctor(
        self,
        model: SFTModule,
        datamodule: SFTDataModule,
        output: Literal["rich", "json"] = "rich",
        histogram: str | None = None,
    ) -> None:
        """Check data, steps, memory and disk before a run, with two real steps; exit code 1 on an error.

        Args:
            model: Its settings are used.
            datamodule: Its rows are examined.
            output: For people (rich) or programs (json).
            histogram: PNG file to write the length histogram to.
        """
        sys.exit(doctor.doctor(self, self.plan, model, datamodule, output, histogram))

    def export(
        self,
        model: SFTModule,
        datamodule: SFTDataModule,
        ckpt_path: str = "last",
        output_dir: str = "hf",
        merge_lora: bool = False,
        dequantize: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        """Turn a checkpoint into a Hugging Face directory.

        Args:
            model: The module that the checkpoint belongs to.
            datamodule: Its tokenizer and template are exported along.
            ckpt_path: Checkpoint, `last`, or `best`.
            output_dir: Directory to write.
            merge_lora: Merge the adapter into the base instead of writing an adapter directory.
            dequantize: Merge over a 4-bit base too, whose values are then written in bf16.
            dtype: Type of the written weights; null keeps theirs, which is fp32 where they were trained.
        """
        commands_export.export_checkpoint(
            self, model, datamodule, ckpt_path, Path(output_dir), merge_lora, dequantize, dtype
        )
        log.info("exported: %s", output_dir)


class GivenCheckpoint(_CheckpointConnector):
    """Goes on from `--ckpt_path` and nothing else: Lightning would take, without a word, what its own requeueing, or an
    `OnExceptionCheckpoint` of another run, has left below `trainer.default_root_dir`.
    """

    @override
    def _select_ckpt_path(self, state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool) -> Any:
        return ckpt_path


def run_callbacks(
    config: Any, ckpt_path: str | None, is_fit: bool, files: CheckpointFiles, save_config: Callable[[Path], None]
) -> list[Callback]:
    """What happens around a run. Lightning calls them in this order, but those that save last.

    Args:
        config: Settings of the command.
        ckpt_path: The checkpoint that the run goes on from, or that is evaluated.
        is_fit: Whether it trains.
        files: Writes the checkpoints.
        save_config: Writes config.yaml.
    """
    first_step = checkpoint_io.saved_step(ckpt_path) if ckpt_path and is_fit else None
    checkpointer = Checkpointer(config.checkpoint, files)
    folder = run_folder.RunFolder(ckpt_path, first_step, save_config, checkpointer.go_on_from)
    callbacks: list[Callback] = [
        FailTogether(doctor.needed_memory),
        Guard(config.faults),
        KeepFolder(run_folder.CONFIG, folder.restore),
        folder,
        checkpointer,
        Throughput(),
        Lines(),
        FirstExample(),
        Evaluation(),
        Answers(),
        Averaging(),
        HFExport(),
        PredictionWriter(config.predict_output, ckpt_path),
        loggers.LastRow(),
        StopOnSignal(_save_and_wait(checkpointer, files), config.resume.max_restarts),
        LeaveFolder(lambda: folder.folder),
    ]
    if Progress.is_wanted(config.trainer):
        callbacks.append(Progress())
    if config.early_stopping is not None:
        stop = config.early_stopping
        callbacks.append(EarlyStopping(stop.monitor, patience=stop.patience, mode=stop.mode, strict=False))
    return callbacks


def own_callbacks(trainer: Any, model: SFTModule, dry: bool = False) -> list[Callback]:
    """The user's callbacks.

    Args:
        trainer: Settings of the trainer.
        model: What is trained.
        dry: Without those that save or draw.

    Raises:
        UserError: One of them would do nothing, or could not go on after a stop.
    """
    callbacks = as_list(trainer.callbacks)
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise UserError(
            "trainer.callbacks: StochasticWeightAveraging copies the module before its model is built, and averages "
            "nothing: take lightning.pytorch.callbacks.EMAWeightAveraging"
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise UserError(
            "trainer.callbacks: GradientAccumulationScheduler would change the batch of an optimizer step: leave it "
            "out, accumulation follows from data.global_batch_size"
        )
    if any(isinstance(callback, WeightAveraging) for callback in callbacks):
        _check_averaged(trainer, model)
    return [callback for callback in callbacks if not dry or not isinstance(callback, (Checkpoint, ProgressBar))]


def _check_averaged(trainer: Any, model: SFTModule) -> None:
    """Refuses settings under which `WeightAveraging` would copy a model that has no weights yet, save a part of it, or
    keep an average in 16 bits, which its small steps do not move.
    """
    if model.options.is_adapted or model.options.trainable is not None:
        raise UserError(
            "trainer.callbacks: WeightAveraging needs all weights in its checkpoints, which leave out what is frozen: "
            "remove it, or set model.lora, model.adapter_name_or_path and model.trainable to null"
        )
    for key, value, remedy in (
        ("trainer.precision", str(trainer.precision), "bf16-mixed"),
        ("model.dtype", model.options.dtype, "auto"),
    ):
        if value in ("bf16-true", "16-true", "bfloat16", "float16"):
            raise UserError(
                f"trainer.callbacks: WeightAveraging would keep its average in the 16 bits of {key} {value}, which are "
                f"too few for it: set that to {remedy}"
            )
    if trainer.strategy == "fsdp2" or isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            "trainer.callbacks: WeightAveraging does not take sharded weights: remove it, or set trainer.strategy to "
            "ddp or auto"
        )


def as_list(value: Any) -> list[Any]:
    """Of a setting that takes one thing, a list, or nothing."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _save_and_wait(checkpointer: Checkpointer, files: CheckpointFiles) -> Callable[[L.Trainer], None]:
    """For a run that leaves: what it saves is on disk before it does."""

    def save(trainer: L.Trainer) -> None:
        checkpointer.save(trainer)
        files.wait()

    return save
