"""jsonargparse's parser with one-line errors, and with checks that jsonargparse does not make."""

from __future__ import annotations

import collections.abc
import dataclasses
import sys
import types
import typing
from argparse import Action, HelpFormatter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lit_sft import errors
from lit_sft.cli import classes
from lit_sft.cli.arguments import Written, flag_values, included_files, read_config, written
from lit_sft.cli.command_help import command_help
from lit_sft.cli.errors import expected, one_line, shown
from lit_sft.config_text import check_config, check_value
from lit_sft.lightning_internals import option_type, parser_actions


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, with the origin of a wrong key and a suggestion."""

    commands: ClassVar[Mapping[str, LightningArgumentParser]] = {}
    """Command -> its parser. Errors may come from a sub-parser that knows only some of the keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation may be the misspelling of another key.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parses, and refuses values that jsonargparse accepts but cannot use."""
        self._refuse_double_keys()
        self._refuse_wrong_classes()
        self._refuse_unknown_keys_of_classes()
        config = super().parse_args(*args, **kwargs)
        command = config.get("subcommand")
        if command is None:
            return config
        unknown = classes.problem_of_arguments(config[command], written(sys.argv[1:]))
        if unknown is not None:
            self.error(unknown)
        values = {item.key: item for item in written(sys.argv[1:])}
        for action in parser_actions(self.commands[command]):
            item = values.get(action.dest)
            problem = None if item is None else _problem(action, item, config[command])
            if item is not None and problem is not None:
                self.error(f"{action.dest} ({item.origin}): {problem}")
            for key, kind in _kinds_of_group(action):
                if key in values and values[key].value is None and not _takes_null(kind):
                    self.error(f"{key} ({values[key].origin}): {_no_null(kind)}")
        return config

    def _refuse_double_keys(self) -> None:
        """Refuses a key that is written twice in a value of the command line or in a file of keys.

        The files of `--config` are checked before.

        Raises:
            UsageError: A key is written twice.
        """
        args = sys.argv[1:]
        command = self.commands.get(args[0]) if args else None
        if command is None:
            return
        kinds = {action.dest: option_type(action) for action in parser_actions(command)}
        for key, text in flag_values(args):
            # A text such as a template may look like YAML, but not like `{...}`.
            if not _takes_text(kinds.get(key, str)) or text.startswith(("{", "[")):
                check_value(text, f"--{key}")
        for item in written(args):
            is_group = item.key in kinds and not _takes_text(kinds[item.key])
            if is_group and isinstance(item.value, str):
                for file in included_files(item):
                    check_config(read_config(str(file), str(file)), str(file))

    def _refuse_wrong_classes(self) -> None:
        """Refuses a class that does not exist; jsonargparse would list all types of the setting."""
        args = sys.argv[1:]
        command = self.commands.get(args[0]) if args else None
        if command is None:
            return
        kinds = {action.dest: option_type(action) for action in parser_actions(command)}
        for item in written(args):
            problem = classes.problem_of_path(item, _takes_text(kinds.get(item.key, str)))
            if problem is not None:
                self.error(f"{item.key.removesuffix('.class_path')} ({item.origin}): {problem}")

    def _refuse_unknown_keys_of_classes(self) -> None:
        """Refuses misspelled keys of classes; see `classes.unknown_key`."""
        args = sys.argv[1:]
        command = self.commands.get(args[0]) if args else None
        if command is None:
            return
        given = written(args)
        takes_class = _keys_of_classes(command)
        chosen = classes.chosen_classes(given, _default_classes(command), takes_class)
        unknown = classes.unknown_key(given, chosen, takes_class)
        if unknown is None:
            unknown = _unknown_empty_group(given, set(known_keys(command, given)))
        if unknown is not None:
            # In the words of jsonargparse, which `MESSAGES` rewrites.
            self.error(f"Option '{unknown.key}' is not accepted")

    @override
    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Returns the help of a command; jsonargparse's own lists settings that are refused."""
        usage = f"usage: {self.prog} [--config FILE] [--KEY VALUE ...]"
        return command_help(usage, self.description or "", parser_actions(self))

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        args = sys.argv[1:]
        parser = self.commands.get(args[0], self) if args else self
        known = set(known_keys(parser, written(args)))
        rank_zero_only(print)(
            errors.redact(f"error: {one_line(message, args, known)}"), file=sys.stderr
        )
        sys.exit(2)


def known_keys(parser: LightningArgumentParser, given: Iterable[Written] = ()) -> Iterator[str]:
    """Lists the keys of a parser, including optional groups (`model.lora.r`) and chosen classes.

    Args:
        parser: The parser of a command.
        given: The keys that the user wrote, which may choose classes.
    """
    options = []
    for action in parser_actions(parser):
        if f"--{action.dest}" not in action.option_strings or action.dest.endswith(".help"):
            continue
        options.append(action.dest)
        options += _keys_of_groups(action)
    yield from options
    given = list(given)
    takes_class = _keys_of_classes(parser)
    chosen = classes.chosen_classes(given, _default_classes(parser), takes_class)
    yield from classes.right_keys(options, given, chosen, takes_class)


def _unknown_empty_group(given: Iterable[Written], known: set[str]) -> Written | None:
    """Returns an unknown key with `{}` as its value, which jsonargparse drops without a word."""
    groups = {key.rpartition(".")[0] for key in known}
    for item in given:
        is_empty = isinstance(item.value, Mapping) and not item.value
        # Below other keys, such as variables of a template, any name may stand.
        if is_empty and item.key not in known and item.key.rpartition(".")[0] in groups:
            return item
    return None


def _keys_of_classes(parser: LightningArgumentParser) -> list[str]:
    """Returns the options whose keys, if they have any, choose a class."""
    return [action.dest for action in parser_actions(parser) if _takes_class(option_type(action))]


def _default_classes(parser: LightningArgumentParser) -> dict[str, str]:
    """Returns the settings whose default is a class -> its path."""
    found = {}
    for action in parser_actions(parser):
        if isinstance(action.default, Mapping) and "class_path" in action.default:
            found[action.dest] = str(action.default["class_path"])
    return found


def _keys_of_groups(action: Action) -> Iterator[str]:
    """Lists the keys of a group that may be null."""
    for kind in typing.get_args(option_type(action)):
        if dataclasses.is_dataclass(kind):
            yield from (f"{action.dest}.{field.name}" for field in dataclasses.fields(kind))


def _problem(action: Action, item: Written, config: Any) -> str | None:
    """Explains what is wrong with a value that jsonargparse accepted; None if nothing is."""
    source, is_link, _ = action.option_strings[0].partition(" -->")
    if is_link:
        if item.value == config.get(item.key):
            return None
        return f"follows from {source}: leave it out"
    kind = option_type(action)
    # Only groups of keys have no type. A text instead of keys is the path of a file with them.
    if kind is None:
        if isinstance(item.value, Mapping | str):
            return None
        return f"got {shown(item.value)}, expected keys with values: leave it out for the defaults"
    if item.value is None and not _takes_null(kind):
        return _no_null(kind)
    return None


def _takes_null(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _no_null(kind: Any) -> str:
    return f"got null, expected {expected(' '.join(map(str, _alternatives(kind))))}"


def _kinds_of_group(action: Action) -> Iterator[tuple[str, Any]]:
    """Lists the keys of a group that may be null, with their types."""
    for group in typing.get_args(option_type(action)):
        if dataclasses.is_dataclass(group):
            for name, kind in typing.get_type_hints(group).items():
                yield f"{action.dest}.{name}", kind


def _takes_text(kind: Any) -> bool:
    """Whether an option takes any text; a group of keys does not, it has no type."""
    return str in _alternatives(kind)


def _takes_class(kind: Any) -> bool:
    """Whether the keys of an option, if it has any, choose a class."""
    alternatives = _alternatives(kind)
    origins = [typing.get_origin(each) or each for each in alternatives]
    if dict in origins:
        return False
    if collections.abc.Callable in origins:
        return True
    for each in (*alternatives, *_elements(alternatives)):
        if isinstance(each, type) and each.__module__.partition(".")[0] in ("lightning", "torch"):
            return True
    return False


def _elements(kinds: Iterable[Any]) -> Iterator[Any]:
    """Lists the types of the elements of those types that are lists."""
    for kind in kinds:
        yield from typing.get_args(kind)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the types of a union; a tuple of one for any other type."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)
