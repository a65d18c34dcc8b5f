"""`recipes list`, `show` and `copy`: the config files that come with the package."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import textwrap
from pathlib import Path

from lit_sft.recipes import description, recipes


def run(program: str, args: list[str]) -> int:
    """Runs the command.

    Args:
        program: Name of the program, for the help.
        args: What follows `recipes` on the command line.

    Returns:
        The exit code.
    """
    options = _parser(program).parse_args(args)
    if options.action in (None, "list"):
        _list(program)
        return 0
    path = recipes().get(options.name)
    if path is None:
        return _unknown(options.name)
    text = path.read_text(encoding="utf-8")
    if options.action == "show":
        print(text, end="")
        return 0
    return _copy(text, Path(options.file), program)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program} recipes",
        description="List, show or copy the config files that come with the package.",
    )
    actions = parser.add_subparsers(dest="action", metavar="{list,show,copy}")
    actions.add_parser("list", help="list the recipes (also without an action)")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", help="name of the recipe")
    copy = actions.add_parser("copy", help="write a recipe to a file of your own, to change it")
    copy.add_argument("name", help="name of the recipe")
    copy.add_argument("file", help="file to write, which must not exist")
    return parser


def _list(program: str) -> None:
    columns = max(40, min(100, shutil.get_terminal_size().columns))
    for name, path in recipes().items():
        print(name)
        print(
            textwrap.fill(description(path), columns, initial_indent="  ", subsequent_indent="  ")
        )
    print(f"\nUse one: {program} fit --config NAME")


def _unknown(name: str) -> int:
    nearest = difflib.get_close_matches(name, recipes(), n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(recipes())}"
    print(f"error: there is no recipe {name}: {remedy}", file=sys.stderr)
    return 2


def _copy(text: str, file: Path, program: str) -> int:
    try:
        # Mode "x" never replaces a file.
        with file.open("x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        print(f"error: {file} exists; give another name", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {file} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{file} is written. Change it, then: {program} fit --config {file}")
    return 0
