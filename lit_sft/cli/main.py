"""The command line: LightningCLI with our commands, links between settings and one-line errors."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_sft import errors
from lit_sft.callbacks.checkpointer import CheckpointOptions
from lit_sft.callbacks.nan_guard import FaultOptions
from lit_sft.callbacks.run_folder import RunFolder
from lit_sft.checkpoint.io import CheckpointFiles
from lit_sft.cli import arguments, front_door, settings, terminal_log
from lit_sft.cli.errors import missing_package, of_trainer
from lit_sft.cli.parser import OneLineParser
from lit_sft.cli.trainer import CommandTrainer
from lit_sft.datamodule import SFTDataModule
from lit_sft.distributed import fsdp2
from lit_sft.errors import UserError
from lit_sft.lightning_internals import resume_only_from_given_checkpoint
from lit_sft.memory_plan import Plan
from lit_sft.model_builder import refuse_adapter
from lit_sft.module import SFTModule
from lit_sft.run import folder as run_folder
from lit_sft.run import launch, remains, slurm
from lit_sft.settings import check_seed
from lit_sft.trainer import as_list, own_callbacks, run_callbacks

log = logging.getLogger(__name__)

WITHOUT_STEPS = ("preview", "export")
"""Commands whose trainer needs no devices, loggers or callbacks."""
OURS = (*WITHOUT_STEPS, "doctor")
"""Commands that Lightning does not have."""
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
"""Keys that every command has. Only these are saved in config.yaml."""
LINKED_TO_DATA = (
    "model_name_or_path",
    "revision",
    "trust_remote_code",
    "add_tokens",
    "adapter_name_or_path",
)
"""Settings of the model that are copied to `data`."""
TRAINER_DEFAULTS = {
    "precision": "bf16-mixed",
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "enable_autolog_hparams": False,
}
"""Our defaults for the trainer where they differ from Lightning's."""


class SFTCLI(LightningCLI):
    """`python -m lit_sft {fit,validate,test,predict,preview,doctor,export}`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lists Lightning's commands and ours, each with the arguments that are no options."""
        ours = {name: {"model", "datamodule"} for name in OURS}
        return {**LightningCLI.subcommands(), **ours}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Adds keys to the parser of the chosen command only: all parsers would take 0.5 s."""
        if sys.argv[1:2] != [subcommand]:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Gives error messages access to all parsers, and the help the name of each command."""
        super()._add_subcommands(parser, **kwargs)
        OneLineParser.commands = self._subcommand_parsers
        for name, command in self._subcommand_parsers.items():
            command.prog = f"{front_door.PROGRAM} {name}"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds our groups of settings, and links that copy a setting to a second place."""
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
            "--predict_output",
            type=str | None,
            default=None,
            help="File of `predict`; null: in the run's folder",
        )
        for key in LINKED_TO_DATA:
            parser.link_arguments(f"model.{key}", f"data.{key}")
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)
        parser.link_arguments("resume.allow_other_data", "data.allow_other_data")

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let values in the checkpoint override the user's."""

    def _set_seed(self) -> None:
        """Refuses seeds that Lightning would replace by a random one, or fail on.

        Raises:
            UserError: The seed is true, false or out of range.
        """
        seed = self._get(self.config, "seed_everything")
        if isinstance(seed, bool):
            raise UserError(
                "seed_everything must be a number: the split, the order and start values follow"
                " from it"
            )
        check_seed("seed_everything", seed)
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Checks and completes the settings, and resolves `ckpt_path`."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        errors.refuse_hidden({item.key: item.value for item in arguments.written(sys.argv[1:])})
        settings.reject_unsupported(config.trainer, self.subcommand)
        settings.check_certify(config, [item.key for item in arguments.written(sys.argv[1:])])
        if self.subcommand in ("fit", "doctor"):
            settings.check_end(config)
        settings.complete_trainer(config.trainer)
        slurm.check_launch()
        if self.subcommand not in OURS:
            asks_for_nodes = any(
                item.key == "trainer.num_nodes" for item in arguments.written(sys.argv[1:])
            )
            self.environments = launch.take_ranks(config.trainer, asks_for_nodes)
        self.missing: UserError | None = None
        try:
            self.ckpt_path = settings.resolve_checkpoint(config, self.subcommand)
        except UserError as error:
            # Another rank may have found a checkpoint, and would wait for this one.
            if config.get("ckpt_path") != "last" or not launch.is_one_of_many():
                raise
            self.missing, self.ckpt_path = error, None
        if "ckpt_path" in config:
            config.ckpt_path = self.ckpt_path
        if "weights_only" in config:
            # Loading pickled objects could run code.
            config.weights_only = True

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds the trainer of the command."""
        config = self.config_init[self.subcommand]
        if self.subcommand in WITHOUT_STEPS:
            return self._trainer_without_steps(config)
        if self.subcommand == "doctor":
            return self._doctor_trainer(config)
        return self._run_trainer(config, **kwargs)

    def _trainer_without_steps(self, config: Any) -> CommandTrainer:
        """Builds a plain trainer on the CPU."""
        return CommandTrainer(
            accelerator="cpu",
            devices=1,
            # The precision decides the dtype of the weights.
            precision=config.trainer.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )

    def _doctor_trainer(self, config: Any) -> CommandTrainer:
        """Builds a trainer for two steps on one device that writes no file."""
        asked = config.trainer
        replaced = {
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "max_steps": 2,
            "limit_val_batches": 0,
            "logger": DummyLogger(),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": own_callbacks(asked, dry=True),
            "default_root_dir": str(Path(asked.default_root_dir or ".")),
        }
        trainer: Any = self._build({**asked, **replaced}, [])
        present = trainer.accelerator.auto_device_count()
        trainer.plan = Plan.of_settings(asked.devices, asked.num_nodes, asked.strategy, present)
        resume_only_from_given_checkpoint(trainer)
        return trainer

    def _run_trainer(self, config: Any, **kwargs: Any) -> L.Trainer:
        """Builds the trainer of a run, with its callbacks and loggers."""
        is_fit = self.subcommand == "fit"
        root = Path(config.trainer.default_root_dir or ".")
        files = CheckpointFiles(config.checkpoint.async_save)
        callbacks = run_callbacks(config, self.ckpt_path, is_fit, files, self._save_config)
        asked = dict(config.trainer)
        if is_fit:
            asked["callbacks"] = own_callbacks(config.trainer)
        plugins = [*as_list(asked.get("plugins")), *self.environments, files]
        asked["plugins"] = slurm.plugins(plugins)
        if asked.get("logger") in (None, True):
            asked["logger"] = run_folder.loggers(root)
        trainer = self._build({**asked, "default_root_dir": str(root), **kwargs}, callbacks)
        fsdp2.check(trainer.strategy)
        slurm.check_devices(trainer, asked["plugins"])
        resume_only_from_given_checkpoint(trainer)
        return trainer

    def _build(self, settings: dict[str, Any], callbacks: list[Any]) -> Any:
        """Builds a trainer.

        Raises:
            UserError: Lightning refuses a setting, or there is no such device.
        """
        try:
            return self._instantiate_trainer(settings, callbacks)
        except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
            raise UserError(of_trainer(str(error), settings)) from error

    def _save_config(self, path: Path) -> None:
        """Writes config.yaml with the keys that every command can read, without secrets."""
        config = self.config[self.subcommand].clone()
        for key in list(vars(config)):
            if key not in SHARED_KEYS:
                config.pop(key)
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        path.write_text(errors.redact_yaml(text), encoding="utf-8")

    def before_fit(self) -> None:
        """Prepares the data before a process group exists, then claims the folder of the run."""
        refuse_adapter(self.model.options)
        self._prepare("fit")
        config = self.config_init["fit"]
        validated = "validation" in self.datamodule.data.caches
        scores = self.model.evaluation.scores if self.model.evaluation else []
        if config.early_stopping is not None:
            run_folder.check_monitor("early_stopping", config.early_stopping, scores, validated)
        if validated:
            run_folder.check_monitor("checkpoint", config.checkpoint, scores, validated)

    def before_validate(self) -> None:
        """Prepares the data and the folder, like `before_fit`."""
        self._prepare("validate")

    def before_test(self) -> None:
        """Prepares the data and the folder, like `before_fit`."""
        self._prepare("test")

    def before_predict(self) -> None:
        """Prepares the data and the folder, like `before_fit`."""
        self._prepare("predict")
        log.info("predict: %s prompts", len(self.datamodule.predict_prompts))

    def _prepare(self, stage: str) -> None:
        self.datamodule.prepare(stage)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder):
                callback.claim(self.trainer, stage, self.missing)


def main(args: list[str] | None = None) -> None:
    """Runs the command line. An error that the user can mend becomes one line and exit code 1."""
    terminal_log.set_up()
    fsdp2.register()
    arguments.read_moved_classes()
    # The help of nested settings is that of the fields.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    descriptions = {name: {"description": text} for name, text in front_door.COMMANDS.items()}
    try:
        # Lightning starts the other ranks with `sys.argv`, so they get the expanded arguments.
        sys.argv[1:] = arguments.expand_arguments(sys.argv[1:] if args is None else args)
        SFTCLI(
            SFTModule,
            SFTDataModule,
            trainer_class=CommandTrainer,
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=None,
            seed_everything_default=42,
            parser_class=OneLineParser,
            parser_kwargs={"prog": front_door.PROGRAM, **descriptions},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        remains.keep()
    except Exception as error:
        remains.remove()
        errors.exit_with_error(missing_package(error, sys.argv[1:]))
    except BaseException:
        # A signal, or a command that sets its exit code.
        remains.remove()
        raise
