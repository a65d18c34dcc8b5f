"""The command line before it is parsed: names of recipes, the config of a run, keys and origins.

Nothing here needs a parser.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader, set_loader

from lit_sft.checkpoint import find
from lit_sft.config_text import check_config
from lit_sft.errors import UsageError, UserError
from lit_sft.recipes import recipes
from lit_sft.run import folder as run_folder

log = logging.getLogger(__name__)

EVALUATING = ("validate", "test", "predict", "export")
"""Commands that always read the config of the run whose checkpoint they use; `fit` does if it
resumes one.
"""
CONFIG_FLAGS = ("--config", "-c")
HELP_FLAGS = ("--help", "-h")
YES_NO_FLAGS = ("--certify", "--dequantize", "--merge_lora", "--text_only")
"""Options of commands that mean yes if no value follows them."""
MOVED_CLASSES = {"lit_sft.strategies.FSDP2Strategy": "lit_sft.distributed.fsdp2.FSDP2Strategy"}
"""Old class path -> new one. Configs of users and of earlier runs still hold the old ones."""

# ------------------------------------------------------------------ what the user wrote


class Written(NamedTuple):
    """A key that the user wrote."""

    key: str
    """Dotted; `[0]` counts the elements of a list."""
    value: Any
    origin: str
    """A file, or `command line`."""


def written(args: list[str]) -> list[Written]:
    """Lists all keys in config files and on the command line, in order: later ones win."""
    items: list[Written] = []
    for arg, following in _with_following(args):
        flag, equals, value = arg.partition("=")
        if arg in CONFIG_FLAGS:
            items += _flatten(read_yaml(following), following)
        elif flag.startswith("--"):
            tree = {flag[2:]: _parse_yaml(value if equals else following)}
            items += _flatten(tree, "command line")
    return items


def flag_values(args: list[str]) -> Iterator[tuple[str, str]]:
    """Lists the flags of the command line, without `--config`, with their values as text."""
    for arg, following in _with_following(args):
        flag, equals, value = arg.partition("=")
        if flag.startswith("--") and flag not in CONFIG_FLAGS:
            yield flag[2:], value if equals else following


def included_files(item: Written) -> list[Path]:
    """Finds the file that is written in place of the keys of a group (`trainer: FILE`).

    A path in a config file is relative to that file.
    """
    path = Path(item.value).expanduser()
    places = (path, Path(item.origin).parent / path)
    return [place for place in places if place.is_file()][:1]


def config_files(args: list[str]) -> list[str]:
    """Lists the files that `--config` names."""
    return [
        following for arg, following in _with_following(args) if arg in CONFIG_FLAGS and following
    ]


def read_yaml(path: str) -> Any:
    """Reads a YAML file; None if it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError):
        return None


def _with_following(args: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs each argument with the next one, which may be its value; the last one with ''."""
    for position, arg in enumerate(args):
        yield arg, args[position + 1] if position + 1 < len(args) else ""


def _flatten(tree: Any, origin: str, prefix: str = "") -> Iterator[Written]:
    if isinstance(tree, list):
        for position, value in enumerate(tree):
            yield from _flatten(value, origin, f"{prefix.removesuffix('.')}[{position}].")
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield Written(f"{prefix}{key}", value, origin)
            yield from _flatten(value, origin, f"{prefix}{key}.")


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        # ValueError: a text that looks like a date.
        return text


# ------------------------------------------------------------------ what the parser gets


def expand_arguments(args: list[str]) -> list[str]:
    """Replaces names of recipes by files, and adds the config.yaml of the evaluated run.

    Commands that use a checkpoint read the config.yaml of its run first, so `--config` and the
    command line override it.

    Raises:
        UserError: A checkpoint or a file does not exist.
    """
    if any(arg in HELP_FLAGS for arg in args):
        # The help must not fail on a missing file or a wrong setting, so all else is dropped.
        return [*args[:1], "--help"]
    args = [with_moved_classes(arg) for arg in _split_flags(args)]
    args = _with_yes(_name_recipes(args))
    if args[:1] and args[0] in (*EVALUATING, "fit"):
        return _with_config_of_run(args)
    return args


def read_moved_classes() -> None:
    """Makes jsonargparse replace old class paths when it reads a config file."""
    set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


def with_moved_classes(text: str) -> str:
    """Replaces old class paths by new ones."""
    for old, new in MOVED_CLASSES.items():
        text = text.replace(old, new)
    return text


_plain_load = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    return _plain_load(with_moved_classes(text))


def _split_flags(args: list[str]) -> list[str]:
    """Splits `--config=FILE` and `--ckpt_path=FILE` into flag and value."""
    parts: list[str] = []
    for arg in args:
        if arg.startswith(("--config=", "--ckpt_path=")):
            parts += arg.split("=", 1)
        else:
            parts.append(arg)
    return parts


def _with_yes(args: list[str]) -> list[str]:
    """Writes `--certify` as `--certify=true`, unless a value follows."""
    completed = []
    for arg, following in _with_following(args):
        has_value = following != "" and not following.startswith("-")
        completed.append(f"{arg}=true" if arg in YES_NO_FLAGS and not has_value else arg)
    return completed


def _name_recipes(args: list[str]) -> list[str]:
    """Replaces the names of recipes by their files."""
    named: list[str] = []
    for arg in args:
        is_config = bool(named) and named[-1] in CONFIG_FLAGS
        named.append(_config_file(arg) if is_config else arg)
    return named


def _config_file(name: str) -> str:
    """Finds and checks the file of `--config`, which may be the name of a recipe.

    Raises:
        UsageError: There is no such file or recipe, or it is no config.
    """
    found = name if Path(name).is_file() else str(recipes().get(name, ""))
    if not found:
        raise UsageError(
            f"--config {name}: there is no such file, and no recipe of that name in the package"
            f"{_nearest_config(name)}"
        )
    check_config(read_config(found, f"--config {name}"), f"--config {name}")
    return found


def read_config(path: str, origin: str) -> str:
    """Returns the text of a config file.

    Args:
        path: The file.
        origin: The file, as an error names it.

    Raises:
        UsageError: The file is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{origin} is no UTF-8 text ({error.reason}): save it as UTF-8") from error


def _nearest_config(name: str) -> str:
    """Suggests the config file or recipe with the nearest name; empty if none is near."""
    path = Path(name)
    if path.is_dir():
        return ": it is a folder, give a file in it"
    beside = [str(file) for file in path.parent.glob("*.y*ml")]
    nearest = difflib.get_close_matches(name, [*recipes(), *beside], n=1)
    return f": did you mean {nearest[0]}?" if nearest else ""


def _with_config_of_run(args: list[str]) -> list[str]:
    """Resolves `--ckpt_path`, and puts the config.yaml of its run before all other configs."""
    command = args[0]
    if "--ckpt_path" not in args[:-1]:
        if command != "export":
            return args
        args = [*args, "--ckpt_path", "last"]
    place = args.index("--ckpt_path") + 1
    found = _checkpoint(args[place], args)
    if found is None:
        return args
    args = [*args[:place], found, *args[place + 1 :]]
    folder = run_folder.run_folder(found)
    if folder is None:
        return args
    config = str(folder / run_folder.CONFIG)
    check_config(read_config(config, config), config)
    if command == "fit":
        for line in _differences(config, args[1:]):
            log.info("%s", line)
    return [command, "--config", config, *args[1:]]


def _checkpoint(ckpt_path: str, args: list[str]) -> str | None:
    """Finds the checkpoint of `--ckpt_path`; None if the command can go on without its run.

    Raises:
        UserError: The checkpoint does not exist, and a command that evaluates needs it.
    """
    try:
        return str(find.find_checkpoint(ckpt_path, _logs(args), args[0]))
    except UserError as error:
        if args[0] == "fit":
            # Whether a run may start without a checkpoint is decided later, for all ranks alike.
            return None
        if not _prints_config(args):
            raise
        log.warning("the config of no run is read: %s", error)
        return None


def _differences(config: str, args: list[str]) -> Iterator[str]:
    """Describes the settings that the user gives another value than the run to resume has.

    Args:
        config: The config.yaml of the run.
        args: The command line.
    """
    tree = read_yaml(config) or {}
    of_run = {item.key: item.value for item in _flatten(tree, config)}
    given = {item.key: item for item in written(args) if not isinstance(item.value, Mapping)}
    for key, item in given.items():
        # `--ckpt_path` and its like are no settings of a run. A list is compared as a whole.
        if key.partition(".")[0] not in tree or "[" in key or config == item.origin:
            continue
        before = of_run.get(key)
        if isinstance(before, Mapping) and isinstance(item.value, str):
            before = before.get("class_path")
        if not _is_same(before, item.value):
            now = f"{_yaml_value(item.value)} ({item.origin})"
            yield f"{key}: {now} instead of {_yaml_value(before)} (the run to resume)"


def _yaml_value(value: Any) -> str:
    return "null" if value is None else str(value)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal; YAML reads `1e-4` as text."""
    if one == other:
        return True
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return False


def _prints_config(args: list[str]) -> bool:
    return any(arg.partition("=")[0] == "--print_config" for arg in args)


def _logs(args: list[str]) -> Path:
    """Returns `lightning_logs` below `trainer.default_root_dir`, as the user wrote it."""
    root = "."
    for item in written(args):
        if item.key == "trainer.default_root_dir" and item.value is not None:
            root = item.value
    return Path(root).expanduser() / run_folder.LOGS
