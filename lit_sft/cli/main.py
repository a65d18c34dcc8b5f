"""The command line: LightningCLI with our links and one-line errors."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_sft import errors
from lit_sft.callbacks.checkpointer import CheckpointOptions
from lit_sft.callbacks.nan_guard import FaultOptions
from lit_sft.callbacks.run_folder import RunFolder
from lit_sft.checkpoint import find
from lit_sft.checkpoint.io import CheckpointFiles
from lit_sft.cli import errors as cli_errors
from lit_sft.commands import doctor
from lit_sft.datamodule import SFTDataModule
from lit_sft.distributed import fsdp2
from lit_sft.errors import UserError
from lit_sft.lightning_internals import resume_only_from_given_checkpoint
from lit_sft.model_builder import refuse_adapter
from lit_sft.module import SFTModule
from lit_sft.run import folder as run_folder
from lit_sft.run import slurm
from lit_sft.trainer import SFTTrainer, as_list, own_callbacks, run_callbacks

log = logging.getLogger("lit_sft")

RUN_COMMANDS = ("fit", "validate", "test", "predict")
WITHOUT_TRAINER = ("preview", "export")
OURS = (*WITHOUT_TRAINER, "doctor")
SHARED_KEYS = (
    "seed_everything",
    "trainer",
    "model",
    "data",
    "checkpoint",
    "faults",
    "early_stopping",
    "resume",
    "predict_output",
)


class SFTCLI(LightningCLI):
    """`python -m lit_sft {fit,validate,test,predict,preview,doctor,export}`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's four, and ours."""
        ours = {name: {"model", "datamodule"} for name in OURS}
        return {**LightningCLI.subcommands(), **ours}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Only the command that is asked for gets its keys: building all parsers takes half a second."""
        if sys.argv[1:2] != [subcommand]:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        cli_errors.OneLineParser.commands = self._subcommand_parsers

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Groups beside trainer, model and data; links, so that nothing is written twice."""
        parser.add_class_arguments(CheckpointOptions, "checkpoint")
        parser.add_class_arguments(FaultOptions, "faults")
        parser.add_argument(
            "--early_stopping",
            type=run_folder.EarlyStoppingOptions | None,
            default=None,
            help="Stop early; null: never",
        )
        parser.add_class_arguments(run_folder.ResumeOptions, "resume")
        parser.add_argument(
            "--predict_output", type=str | None, default=None, help="File of `predict`; null: in the run's folder"
        )
        for key in ("model_name_or_path", "revision", "trust_remote_code", "add_tokens", "adapter_name_or_path"):
            parser.link_arguments(f"model.{key}", f"data.{key}")
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)
        parser.link_arguments("resume.allow_other_data", "data.allow_other_data")

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let hyper-parameters in the checkpoint overwrite what the user typed."""

    def _set_seed(self) -> None:
        """As in Lightning, which takes true for a number that nobody knows and false for none."""
        if isinstance(self._get(self.config, "seed_everything"), bool):
            raise UserError("seed_everything must be a number: the split, the order and start values follow from it")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Checks what Lightning would take without a word; finds the checkpoint that is meant."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        errors.refuse_hidden({item.key: item.value for item in cli_errors.written(sys.argv[1:])})
        if config.trainer.overfit_batches:
            raise UserError("trainer.overfit_batches must be 0: set data.max_samples to train on a few rows")
        if config.trainer.default_root_dir is not None:
            config.trainer.default_root_dir = str(Path(config.trainer.default_root_dir).expanduser())
        if config.trainer.use_distributed_sampler:
            raise UserError("trainer.use_distributed_sampler must be false: it would shuffle over our own order")
        if config.trainer.enable_checkpointing is False and self.subcommand == "fit":
            raise UserError("trainer.enable_checkpointing must be true: to save less, raise checkpoint.every_n_minutes")
        config.trainer.accelerator = _accelerator(config.trainer.accelerator)
        if config.trainer.strategy == "fsdp":
            log.info("trainer.strategy fsdp: FSDP2 is taken (fsdp2), whose shards any number of devices can load")
            config.trainer.strategy = "fsdp2"
        slurm.check_launch()
        logs, ckpt_path = Path(config.trainer.default_root_dir or ".") / run_folder.LOGS, config.get("ckpt_path")
        own = slurm.own_run(logs) if self.subcommand == "fit" else None
        found = None if own is None else find.find_last(logs, own)
        if own is not None and (found is not None or ckpt_path == "last"):
            self.ckpt_path = None if found is None else str(found)
        else:
            self.ckpt_path = find.find_checkpoint(ckpt_path, logs, self.subcommand)
        if "ckpt_path" in config:
            config.ckpt_path = self.ckpt_path
        if "weights_only" in config:
            config.weights_only = True  # never run pickled code

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with our callbacks and loggers; a plain CPU one for commands that do not train."""
        config = self.config_init[self.subcommand]
        if self.subcommand in WITHOUT_TRAINER:
            precision = config.trainer.precision  # decides the type of the weights
            return SFTTrainer(
                accelerator="cpu",
                devices=1,
                precision=precision,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
            )
        root = Path(config.trainer.default_root_dir or ".")
        if self.subcommand == "doctor":
            one_step = {"devices": 1, "num_nodes": 1, "strategy": "auto", "max_steps": 2, "limit_val_batches": 0}
            quiet = {"logger": DummyLogger(), "enable_checkpointing": False, "enable_progress_bar": False}
            own = {
                "callbacks": own_callbacks(config.trainer, self.model, dry=True),
                "default_root_dir": str(root),
            }
            trainer: Any = self._instantiate_trainer({**config.trainer, **one_step, **quiet, **own}, [])
            asked = config.trainer
            present = trainer.accelerator.auto_device_count()
            trainer.plan = doctor.Plan.of_settings(asked.devices, asked.num_nodes, asked.strategy, present)
            resume_only_from_given_checkpoint(trainer)
            return trainer
        files = CheckpointFiles(config.checkpoint.async_save)
        callbacks = run_callbacks(config, self.ckpt_path, self.subcommand == "fit", files, self._save_config)
        trainer_config = dict(config.trainer)
        if self.subcommand == "fit":
            trainer_config["callbacks"] = own_callbacks(config.trainer, self.model)
        trainer_config["plugins"] = slurm.plugins([*as_list(trainer_config.get("plugins")), files])
        if trainer_config.get("logger") in (None, True):
            trainer_config["logger"] = run_folder.loggers(root)
        try:
            trainer = self._instantiate_trainer({**trainer_config, "default_root_dir": str(root), **kwargs}, callbacks)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UserError(f"trainer: {error}") from error
        fsdp2.check(trainer.strategy)
        slurm.check_devices(trainer, trainer_config["plugins"])
        resume_only_from_given_checkpoint(trainer)
        return trainer

    def _save_config(self, path: Path) -> None:
        """The run's configuration, readable by every command."""
        config = self.config[self.subcommand].clone()
        for key in [key for key in vars(config) if key not in SHARED_KEYS]:
            config.pop(key)
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        path.write_text(errors.redact_yaml(text), encoding="utf-8")

    def before_fit(self) -> None:
        """Data work, before a process group exists; then the run's folder."""
        refuse_adapter(self.model.options)
        self._prepare("fit")
        config, validated = self.config_init["fit"], "validation" in self.datamodule.data.caches
        scores = self.model.evaluation.scores if self.model.evaluation else []
        if config.early_stopping is not None:
            run_folder.check_monitor("early_stopping", config.early_stopping, scores, validated)
        if validated:
            run_folder.check_monitor("checkpoint", config.checkpoint, scores, validated)

    def before_validate(self) -> None:
        """As `before_fit`."""
        self._prepare("validate")

    def before_test(self) -> None:
        """As `before_fit`."""
        self._prepare("test")

    def before_predict(self) -> None:
        """As `before_fit`."""
        self._prepare("predict")
        log.info("predict: %s prompts", len(self.datamodule.predict_prompts))

    def _prepare(self, stage: str) -> None:
        self.datamodule.prepare(stage)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder):
                callback.claim(self.trainer, stage)


def _accelerator(chosen: Any) -> Any:
    """Not Apple's GPU, which `auto` would take."""
    if not torch.backends.mps.is_available() or chosen not in ("auto", "gpu", "mps"):
        return chosen
    if chosen != "auto":
        raise UserError(f"trainer.accelerator {chosen}: Apple's GPU cannot sum losses in float64: set it to cpu")
    log.info("Apple's GPU cannot sum losses in float64: the CPU is taken (trainer.accelerator)")
    return "cpu"


NOT_HERE = (
    "does not have many workers",  # batches are slices of a mapped file
    "not resumable",  # the position is ours
    "is smaller than the logging interval",
    "sync_dist=True)`",  # all ranks log the same
    "across ranks is zero",  # no validation set
    "treespec, LeafSpec",  # Lightning with torch 2.13
    "deprecated",  # of jsonargparse, by Lightning
    "The `srun` command is available",  # where it is needed and not used, that is an error of ours
)
"""Advice of libraries that does not apply."""


class _Terminal(logging.StreamHandler):
    """Writes to what is `sys.stderr` at that moment: a progress bar that is drawn puts lines above itself there."""

    @property  # type: ignore[override]
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


def _quiet() -> None:
    """Our own log lines on the terminal, plain; of the libraries what is a warning and applies here."""
    if not log.handlers:
        handler = _Terminal()
        handler.setFormatter(errors.RedactingFormatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.ERROR)  # type: ignore[attr-defined]
    log.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it misses a kernel of the hub
    for text in NOT_HERE:
        warnings.filterwarnings("ignore", f".*{re.escape(text)}.*")
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def main(args: list[str] | None = None) -> None:
    """Runs the command line; what the user can mend ends in one line and exit code 1."""
    _quiet()
    fsdp2.register()
    try:
        # Ranks that Lightning starts run this same command line again, so what was expanded stays expanded.
        sys.argv[1:] = cli_errors.expand_arguments(sys.argv[1:] if args is None else args)
        SFTCLI(
            SFTModule,
            SFTDataModule,
            trainer_class=SFTTrainer,
            trainer_defaults={
                "precision": "bf16-mixed",
                "max_epochs": 1,
                "gradient_clip_val": 1.0,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "log_every_n_steps": 10,
                "enable_model_summary": False,
                "enable_autolog_hparams": False,
            },
            save_config_callback=None,
            seed_everything_default=42,
            parser_class=cli_errors.OneLineParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except Exception as error:
        errors.end(cli_errors.missing_package(error, sys.argv[1:]))
