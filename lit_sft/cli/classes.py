"""Classes that the user names in settings: whether they exist, and take the arguments they get."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

from jsonargparse import Namespace

from lit_sft.cli.arguments import Written, with_moved_classes
from lit_sft.lightning_internals import class_arguments

CLASS_PATH = re.compile(r"(?:[A-Za-z_]\w*\.)+[A-Z]\w*")
"""A text that is written like the path of a class."""
SPECIFICATION = ("class_path", "init_args", "dict_kwargs")
"""The keys that choose a class and its arguments."""
MODULES = (
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
"""Where jsonargparse finds a class that is written without a module."""
PASSED_ON: Mapping[str, tuple[str, ...]] = {
    "lightning.pytorch.callbacks.model_summary.ModelSummary": (),
    "lightning.pytorch.callbacks.rich_model_summary.RichModelSummary": ("header_style",),
    "lightning.pytorch.callbacks.throughput_monitor.ThroughputMonitor": (
        "lightning.fabric.utilities.throughput.Throughput",
    ),
    "lightning.pytorch.callbacks.weight_averaging.EMAWeightAveraging": (
        "lightning.pytorch.callbacks.WeightAveraging",
    ),
    "lightning.pytorch.callbacks.weight_averaging.WeightAveraging": (
        "torch.optim.swa_utils.AveragedModel",
    ),
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger": (
        "torch.utils.tensorboard.SummaryWriter",
    ),
    "lightning.pytorch.loggers.wandb.WandbLogger": ("wandb.init",),
    # It drops without a word what none of them takes.
    "lightning.pytorch.profilers.pytorch.PyTorchProfiler": (
        "torch.profiler.profile",
        "torch.autograd.profiler.profile",
        "torch.autograd.profiler.emit_nvtx",
        "export_to_flame_graph",
        "metric",
    ),
    "lightning.pytorch.strategies.ddp.DDPStrategy": ("torch.nn.parallel.DistributedDataParallel",),
}
"""Classes that pass further arguments on -> what gets them; a word without a dot is an argument."""


def problem_of_path(item: Written, takes_text: bool) -> str | None:
    """Explains which class of a setting does not exist; None if all do.

    Args:
        item: A key that the user wrote, with its value.
        takes_text: Whether the setting takes any text.
    """
    paths: list[str] = []
    if isinstance(item.value, list):
        # Keys below a mapping are items of their own.
        paths = [path for _, path, _ in _named(item.value)]
    is_path = item.key.endswith(".class_path") or not takes_text
    if is_path and isinstance(item.value, str) and CLASS_PATH.fullmatch(item.value):
        paths.append(item.value)
    for path in map(with_moved_classes, paths):
        # jsonargparse finds a name without a module among the subclasses.
        if "." in path and (problem := _not_imported(path)):
            return problem
    return None


def chosen_classes(
    given: Iterable[Written], defaults: Mapping[str, str], takes_class: Collection[str]
) -> dict[str, list[str]]:
    """Returns the setting of each class -> the paths that are written for it, the last one last.

    Args:
        given: The keys that the user wrote.
        defaults: Setting -> path of its default.
        takes_class: Settings whose value may be the path itself.
    """
    chosen = {key: [path] for key, path in defaults.items()}
    for item in given:
        is_path = item.key.endswith(".class_path") or item.key in takes_class
        if is_path and isinstance(item.value, str):
            setting = item.key.removesuffix(".class_path")
            chosen.setdefault(setting, []).append(with_moved_classes(item.value))
    return chosen


def unknown_key(
    given: list[Written], chosen: Mapping[str, list[str]], takes_class: Collection[str]
) -> Written | None:
    """Returns a key beside `class_path` or below `init_args` that is not known; None if all are.

    jsonargparse refuses such keys, too, but names neither the place in a list nor the key itself.

    Args:
        given: The keys that the user wrote.
        chosen: Result of `chosen_classes`.
        takes_class: Settings whose keys, if they have any, choose a class.
    """
    settings = _settings(given, takes_class)
    for item in given:
        parent, _, name = item.key.rpartition(".")
        setting, _, part = parent.rpartition(".")
        if parent in settings:
            # `--model.optimizer.lr` is short for `--model.optimizer.init_args.lr`.
            paths = chosen.get(parent, [])
            others: tuple[str, ...] = SPECIFICATION
        elif part == "init_args" and setting in chosen:
            paths = chosen[setting]
            others = ()
        else:
            continue
        arguments = _taken_by_any(paths)
        # A class that is not found takes no arguments, and is refused by jsonargparse.
        is_checked = bool(arguments) or not paths
        if is_checked and name not in (*others, *arguments):
            return item
    return None


def right_keys(
    options: Iterable[str],
    given: list[Written],
    chosen: Mapping[str, list[str]],
    takes_class: Collection[str],
) -> Iterator[str]:
    """Lists the keys that choose classes, and those of the arguments of the chosen ones.

    Args:
        options: The keys of a command.
        given: The keys that the user wrote.
        chosen: Result of `chosen_classes`.
        takes_class: Settings whose keys, if they have any, choose a class.
    """
    known = set(options)
    for setting in dict.fromkeys([*chosen, *_settings(given, takes_class)]):
        # The name of a setting may be misspelled itself.
        if _without_index(setting) not in known:
            continue
        keys = [f"{setting}.{name}" for name in SPECIFICATION]
        # The last class replaces the others.
        for path in chosen.get(setting, [])[-1:]:
            keys += [f"{setting}.init_args.{name}" for name in _init_arguments(path)]
        known.update(keys)
        yield from keys


def _settings(given: list[Written], takes_class: Collection[str]) -> dict[str, None]:
    """Returns the settings for which keys are written that choose a class, in order."""
    found: dict[str, None] = {}
    for item in given:
        parent, _, name = item.key.rpartition(".")
        if name in SPECIFICATION or _without_index(parent) in takes_class:
            found[parent] = None
    return found


def _without_index(key: str) -> str:
    """Returns the key of a list for that of an element."""
    return re.sub(r"\[\d+\]$", "", key)


def problem_of_arguments(config: Any, given: list[Written]) -> str | None:
    """Explains which entry of a `dict_kwargs` a class does not take; None if all are taken.

    jsonargparse checks `init_args`, and passes on `dict_kwargs` as they are.

    Args:
        config: Parsed settings.
        given: The keys that the user wrote.
    """
    origins = {item.key: item.origin for item in given}
    for setting, path, arguments in _named(config):
        for name in arguments:
            known = _arguments(path)
            if known is None or name in known:
                continue
            key = f"{setting}.dict_kwargs.{name}"
            origin = f" ({origins[key]})" if key in origins else ""
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {setting}.dict_kwargs.{near[0]}?" if near else ""
            return f"unknown key {key}{origin}: {path} takes no such argument{hint}"
    return None


def _named(value: Any, key: str = "") -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Lists the classes in a setting: dotted key, path and `dict_kwargs`."""
    if isinstance(value, list):
        for position, item in enumerate(value):
            yield from _named(item, f"{key}[{position}]")
        return
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, Mapping):
        return
    path = value.get("class_path")
    if isinstance(path, str):
        yield key, path, value.get("dict_kwargs") or {}
    for name, item in value.items():
        yield from _named(item, f"{key}.{name}" if key else str(name))


def _not_imported(path: str) -> str | None:
    """Explains why a class cannot be imported; None if it can."""
    module, _, name = path.rpartition(".")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == module.partition(".")[0] and error.name == package:
            return (
                f"cannot import {path}: No module named '{package}': `pip install {package}`, or"
                " choose another class"
            )
        return f"cannot import {path}: there is no module {error.name}"
    except Exception as error:
        return f"cannot import {path}: {type(error).__name__}: {' '.join(str(error).split())}"
    if name in vars(found) or name in dir(found):
        return None
    near = difflib.get_close_matches(name, dir(found), n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    return f"cannot import {path}: module '{module}' has no attribute '{name}'{hint}"


def _taken_by_any(paths: Iterable[str]) -> list[str]:
    """Returns the `init_args` that at least one of some classes takes."""
    return [name for path in paths for name in _init_arguments(path)]


@lru_cache
def _init_arguments(path: str) -> list[str]:
    """Returns the names that may stand in the `init_args` of a class; none if it is not found."""
    chosen = _found(path)
    return class_arguments(chosen) if isinstance(chosen, type) else []


def _arguments(path: str) -> list[str] | None:
    """Returns the names that a class or function takes; None if it takes any, or is not there."""
    chosen = _found(path)
    if chosen is None:
        return None
    kinds = inspect.signature(chosen).parameters
    names = [key for key, kind in kinds.items() if kind.kind != kind.VAR_KEYWORD]
    if len(names) == len(kinds):
        return names
    receivers = PASSED_ON.get(f"{chosen.__module__}.{chosen.__qualname__}")
    if receivers is None:
        return None
    for receiver in receivers:
        further = _arguments(receiver) if "." in receiver else [receiver]
        if further is None:
            return None
        names += further
    return names


def _found(path: str) -> Any:
    """Returns a class or function, which may be written without its module; None if none is."""
    module, _, name = path.rpartition(".")
    for place in (module,) if module else MODULES:
        try:
            found = getattr(import_module(place), name, None)
        except ImportError:
            continue
        if found is not None:
            return found
    return None
