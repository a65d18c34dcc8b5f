"""The parser: jsonargparse's, with errors in one line and without values that it takes and does not
use.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from argparse import Action
from collections.abc import Iterable, Iterator, Mapping
from pydoc import locate
from typing import Any, ClassVar, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lit_sft import errors
from lit_sft.cli.arguments import Written, written
from lit_sft.cli.errors import expected, one_line, shown
from lit_sft.lightning_internals import option_type, parser_actions


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, with the file and the nearest right key for a wrong
    one.
    """

    commands: ClassVar[Mapping[str, LightningArgumentParser]] = {}
    """The parsers of all commands; an error may come from one that only knows a part of the
    keys.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # No abbreviations: one may be the misspelling of another key.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parses, and refuses what jsonargparse takes without a word: a null, a value in place of
        keys.
        """
        config = super().parse_args(*args, **kwargs)
        command = config.get("subcommand")
        if command is None:
            return config
        values = {item.key: item for item in written(sys.argv[1:])}
        for action in parser_actions(self.commands[command]):
            item = values.get(action.dest)
            problem = None if item is None else _problem(action, item, config[command])
            if item is not None and problem is not None:
                self.error(f"{action.dest} ({item.origin}): {problem}")
        return config

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
    """Lists all keys of a parser, with those of optional groups (`model.lora.r`) and of the chosen
    classes.

    Args:
        parser: Of one command.
        given: What the user wrote: it chooses the classes.
    """
    classes = {
        item.key.removesuffix(".class_path"): item.value
        for item in given
        if isinstance(item.value, str)
    }
    for action in parser_actions(parser):
        if f"--{action.dest}" not in action.option_strings or action.dest.endswith(".help"):
            continue
        yield action.dest
        yield from _keys_of_groups(action)
        if isinstance(action.default, Mapping) and "class_path" in action.default:
            yield from _keys_of_class(
                action.dest, str(classes.get(action.dest, action.default["class_path"]))
            )


def _keys_of_groups(action: Action) -> Iterator[str]:
    """Keys of a group that may be null."""
    for kind in typing.get_args(option_type(action)):
        if dataclasses.is_dataclass(kind):
            yield from (f"{action.dest}.{field.name}" for field in dataclasses.fields(kind))


def _keys_of_class(key: str, class_path: str) -> Iterator[str]:
    """Keys below an option that takes a class."""
    yield f"{key}.class_path"
    yield f"{key}.init_args"
    chosen = locate(class_path) or locate(f"torch.optim.{class_path}")
    if isinstance(chosen, type):
        yield from (f"{key}.init_args.{name}" for name in inspect.signature(chosen).parameters)


def _problem(action: Action, item: Written, config: Any) -> str | None:
    """What is wrong with a written value that jsonargparse has let pass."""
    if "-->" in action.option_strings[0]:
        # A link.
        source = action.option_strings[0].split(" -->")[0]
        return (
            None if item.value == config.get(item.key) else f"follows from {source}: leave it out"
        )
    kind = option_type(action)
    if kind is None:
        # A group.
        # A text is a file with its keys.
        is_group = isinstance(item.value, Mapping | str)
        return None if is_group else f"got {shown(item.value)}, expected keys with values"
    if item.value is None and type(None) not in typing.get_args(kind):
        return f"got null, expected {expected(' '.join(map(str, _alternatives(kind))))}"
    return None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)
