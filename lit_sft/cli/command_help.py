"""The help of a command: all its settings in groups, the most used first, a sentence each."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import types
import typing
from argparse import Action
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import docstring_parser
import yaml

from lit_sft.cli.errors import expected
from lit_sft.cli.settings import REFUSED_OF_TRAINER
from lit_sft.lightning_internals import option_type

GROUPS = {
    "": "the run",
    "model": "model: what is trained, and how",
    "data": "data: what it is trained on",
    "trainer": "trainer: devices and duration (Lightning's Trainer)",
    "checkpoint": "checkpoint: what is saved, and when",
    "early_stopping": "early_stopping: null never stops early",
    "faults": "faults: what is done about steps that fail",
    "resume": "resume: what a resume may do",
}
"""First part of a key -> title of its group, in the order of the help."""
OF_THE_RUN = {
    "config": "A YAML file of settings, or the name of a recipe; may be repeated, later ones win.",
    "print_config": "Print all settings as YAML, and end.",
    "seed_everything": "Seed of the split, the order, dropout and start values.",
    "ckpt_path": "A checkpoint to resume or to evaluate: a path, `last`, or `best` (not for fit).",
    "verbose": "Print the figures at the end.",
    "predict_output": "File of `predict`. null writes it into the run's folder.",
}
"""Keys without a group -> their sentence, in the order of the help."""
OF_TRAINER = {
    "devices": "Number of devices, their numbers, or `auto` for all.",
    "accelerator": "`gpu`, `cpu`, or `auto`.",
    "strategy": "Work of several devices: `ddp`, `fsdp2` (shards weights), or a class.",
    "num_nodes": "Number of machines.",
    "precision": "Precision of the arithmetic: `bf16-mixed`, `32-true`, `bf16-true`, `16-mixed`.",
    "max_epochs": "Passes over the training data.",
    "max_steps": "Optimizer steps; -1 for as many as `max_epochs` has.",
    "max_time": "Longest duration of the run over all its starts, as DD:HH:MM:SS.",
    "default_root_dir": "Folder in which `lightning_logs` is made. null takes the current one.",
    "logger": "Loggers in place of TensorBoard and CSV; false for none.",
    "callbacks": "Callbacks of your own, as a list of classes.",
    "gradient_clip_val": "Norm of the gradient above which it is scaled down. null never does.",
    "log_every_n_steps": "Optimizer steps between two rows of the log.",
    "val_check_interval": "Share of an epoch, or number of micro-batches, between validations.",
    "check_val_every_n_epoch": "Epochs between validations. null counts micro-batches only.",
    "limit_val_batches": "Share or number of validation batches; 0 never validates.",
    "limit_train_batches": "Share or number of micro-batches of an epoch.",
    "limit_test_batches": "Share or number of test batches.",
    "limit_predict_batches": "Share or number of batches of `predict`.",
    "num_sanity_val_steps": "Validation batches to try before training.",
    "enable_progress_bar": "Show progress in the terminal. null does.",
    "enable_model_summary": "Print a table of the modules.",
    "fast_dev_run": "Run this number of batches of everything, to try the settings.",
    "min_epochs": "Epochs before which early stopping cannot end the run.",
    "min_steps": "Steps before which early stopping cannot end the run.",
    "gradient_clip_algorithm": "Clip by `norm` or by `value`. null takes norm.",
    "deterministic": "Use deterministic algorithms only.",
    "benchmark": "Let cuDNN try its algorithms.",
    "inference_mode": "Evaluate in torch's inference mode.",
    "profiler": "`simple`, `advanced`, `pytorch`, or a class. null does not measure.",
    "detect_anomaly": "Find the operation that makes a NaN; slow.",
    "plugins": "Plugins of Lightning.",
    "enable_autolog_hparams": "Give all arguments of the modules to the loggers.",
}
"""Keys of the trainer -> their sentence, in the order of the help.

Lightning's own texts state Lightning's defaults.
"""
WITHOUT_USE = ("barebones", "sync_batchnorm", "reload_dataloaders_every_n_epochs", "model_registry")
"""Keys of the trainer that have no use for a language model in this package."""
OF_CLASSES = (
    "A class is written as class_path and init_args; `--KEY.help CLASS` shows its arguments, for"
    " example `--model.optimizer.help torch.optim.AdamW`."
)
HIDDEN = ("help", "weights_only", "return_predictions")
MOST_OF_A_DEFAULT = 60
"""Characters of a default that are shown."""
MOST_CHOICES = 6
"""Choices that are listed. The sentence of a setting with more of them names the usual ones."""
MOST_USED = (
    "model.model_name_or_path",
    "model.lora",
    "model.quantization",
    "model.optimizer",
    "model.lr_schedule",
    "data.train",
    "data.validation",
    "data.val_size",
    "data.max_length",
    "data.packing",
    "data.global_batch_size",
    "data.micro_batch_size",
)
"""Settings of model and data that come first in their group, each with those below it."""


class Setting(NamedTuple):
    """A setting, as the help shows it."""

    key: str
    """Dotted."""
    kind: str
    """What it takes, in words."""
    default: str
    """Empty if there is none."""
    text: str
    """One sentence or two."""


def command_help(usage: str, description: str, actions: Iterable[Action]) -> str:
    """Returns the help of a command.

    Args:
        usage: The command line, without settings.
        description: What the command does.
        actions: The options of its parser.
    """
    groups: dict[str, list[Setting]] = {group: [] for group in GROUPS}
    for setting in _settings(actions):
        first, _, rest = setting.key.partition(".")
        group = first if first in GROUPS and (rest or first == "early_stopping") else ""
        groups[group].append(setting)
    groups[""].sort(key=_rank_in_run)
    groups["trainer"].sort(key=_rank_in_trainer)
    for group in ("model", "data"):
        groups[group].sort(key=_rank_in_use)
    width = max(40, min(100, shutil.get_terminal_size().columns))
    lines = [usage, "", *textwrap.wrap(description, width)]
    for group, title in GROUPS.items():
        if groups[group]:
            lines += ["", title]
        for setting in groups[group]:
            lines += _lines(setting, width)
    lines += ["", *textwrap.wrap(OF_CLASSES, width)]
    return "\n".join(lines) + "\n"


def _settings(actions: Iterable[Action]) -> Iterator[Setting]:
    """Lists the settings of a parser, also those inside groups that may be null."""
    for action in actions:
        option = action.option_strings[-1] if action.option_strings else ""
        # A link is no option, and a group (`--trainer FILE`) repeats its keys.
        is_group = option_type(action) is None and action.dest not in OF_THE_RUN
        if action.dest not in option or is_group:
            continue
        if action.dest.rpartition(".")[2] in HIDDEN or " --> " in action.option_strings[0]:
            continue
        if action.dest.removeprefix("trainer.") in (*REFUSED_OF_TRAINER, *WITHOUT_USE):
            continue
        yield _setting(action)
        yield from _fields(action)


def _setting(action: Action) -> Setting:
    kind = option_type(action)
    name = action.dest.removeprefix("trainer.")
    # A key that a later Lightning brings has its text.
    texts = OF_THE_RUN if name == action.dest else OF_TRAINER
    text = texts.get(name, action.help or "")
    if action.dest in ("config", "print_config"):
        return Setting(action.dest, "", "", text)
    return Setting(action.dest, _kind(kind), _default(action.default), text)


def _fields(action: Action) -> Iterator[Setting]:
    """Lists the settings inside a group that may be null."""
    for group in typing.get_args(option_type(action)):
        if not (isinstance(group, type) and dataclasses.is_dataclass(group)):
            continue
        kinds = typing.get_type_hints(group)
        chosen = action.default if isinstance(action.default, Mapping) else {}
        texts = docs_of_fields(group)
        for field in dataclasses.fields(group):
            default = chosen.get(field.name, _of_field(field))
            key = f"{action.dest}.{field.name}"
            yield Setting(key, _kind(kinds[field.name]), _default(default), texts[field.name])


def docs_of_fields(group: type) -> dict[str, str]:
    """Returns the documentation of a dataclass's fields, by name."""
    params = docstring_parser.parse_from_object(group).params
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


def _of_field(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _kind(kind: Any) -> str:
    """Describes a type in words; empty for classes, whose sentence says what they are."""
    if kind is None:
        return ""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    words = expected(" ".join(map(str, typing.get_args(kind))) if is_union else str(kind))
    if words.startswith("a class") or words.count(",") > MOST_CHOICES:
        return ""
    return words.replace("true or false or null", "true, false or null")


def _default(value: Any) -> str:
    """Formats a default as YAML in one line, cut where it is long."""
    if isinstance(value, str) and value == "==SUPPRESS==" or value is dataclasses.MISSING:
        return ""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = ", ".join(f"{key}: {item}" for key, item in value["init_args"].items())
        return f"{value['class_path']} with {arguments}"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    text = text.removesuffix("...\n").strip()
    return textwrap.shorten(text, MOST_OF_A_DEFAULT, placeholder=" ...")


def _rank_in_run(setting: Setting) -> int:
    """Ranks the keys of one command, which are not in `OF_THE_RUN`, before those of all."""
    order = list(OF_THE_RUN)
    return order.index(setting.key) if setting.key in order else -1


def _rank_in_use(setting: Setting) -> int:
    for rank, key in enumerate(MOST_USED):
        if setting.key == key or setting.key.startswith(f"{key}."):
            return rank
    return len(MOST_USED)


def _rank_in_trainer(setting: Setting) -> int:
    order = list(OF_TRAINER)
    name = setting.key.removeprefix("trainer.")
    return order.index(name) if name in order else len(order)


def _lines(setting: Setting, width: int) -> list[str]:
    """Formats a setting: key, kind and default in the first line, below it the sentence."""
    head = f"  --{setting.key}"
    if setting.kind:
        head += f"  {setting.kind}"
    if setting.default:
        head += f"  [{setting.default}]"
    text = " ".join(setting.text.split())
    indent = " " * 6
    first = textwrap.wrap(head, width, subsequent_indent=indent, break_on_hyphens=False)
    rest = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    return [*first, *rest]
