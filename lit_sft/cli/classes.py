"""Classes that the user names in settings: whether they exist, and take the arguments they get."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from jsonargparse import Namespace

from lit_sft.cli.arguments import Written, with_moved_classes

CLASS_PATH = re.compile(r"(?:[A-Za-z_]\w*\.)+[A-Z]\w*")
"""A text that is written like the path of a class."""
PASSED_ON = {
    "lightning.pytorch.strategies.ddp.DDPStrategy": "torch.nn.parallel.DistributedDataParallel",
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger": (
        "torch.utils.tensorboard.SummaryWriter"
    ),
}
"""Classes that pass further arguments on, and the class that gets them."""


def problem_of_path(item: Written, takes_text: bool) -> str | None:
    """Explains which class of a setting does not exist; None if all do.

    Args:
        item: A key that the user wrote, with its value.
        takes_text: Whether the setting takes any text.
    """
    paths: list[str] = []
    if isinstance(item.value, list):
        # Keys below a mapping are items of their own.
        paths = [path for path, _ in _named(item.value)]
    is_path = item.key.endswith(".class_path") or not takes_text
    if is_path and isinstance(item.value, str) and CLASS_PATH.fullmatch(item.value):
        paths.append(item.value)
    for path in map(with_moved_classes, paths):
        # jsonargparse finds a name without a module among the subclasses.
        if "." in path and (problem := _not_imported(path)):
            return problem
    return None


def problem_of_arguments(config: Any) -> str | None:
    """Explains which entry of a `dict_kwargs` a class does not take; None if all are taken.

    jsonargparse checks `init_args`, and passes on `dict_kwargs` as they are.

    Args:
        config: Parsed settings.
    """
    for path, given in _named(config):
        for name in given:
            known = _arguments(path)
            if known is None or name in known:
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            return f"dict_kwargs.{name}: {path} takes no such argument{hint}"
    return None


def nearest_argument(name: str, given: list[Written]) -> str | None:
    """Returns the argument of a chosen class with the nearest name; None if none is near.

    Args:
        name: The unknown key, perhaps dotted.
        given: The keys that the user wrote.
    """
    word = name.rpartition(".")[2]
    for item in given:
        for path, _ in _named(item.value):
            if word not in str(item.value):
                continue
            near = difflib.get_close_matches(word, _arguments(path) or [], n=1)
            if near:
                return near[0]
    return None


def _named(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Lists the class paths in a setting, each with its `dict_kwargs`."""
    if isinstance(value, list):
        for item in value:
            yield from _named(item)
        return
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, Mapping):
        return
    path = value.get("class_path")
    if isinstance(path, str):
        yield path, value.get("dict_kwargs") or {}
    for item in value.values():
        yield from _named(item)


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


def _arguments(path: str) -> list[str] | None:
    """Returns the names that a class takes; None if it takes any."""
    module, _, name = path.rpartition(".")
    if not module:
        return None
    chosen = getattr(import_module(module), name)
    if not isinstance(chosen, type):
        return None
    kinds = inspect.signature(chosen).parameters
    names = [key for key, kind in kinds.items() if kind.kind != kind.VAR_KEYWORD]
    if len(names) == len(kinds):
        return names
    receiver = PASSED_ON.get(f"{chosen.__module__}.{chosen.__qualname__}")
    further = None if receiver is None else _arguments(receiver)
    return None if further is None else [*names, *further]
