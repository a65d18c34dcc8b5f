"""Command lines that run no command: help, version, and unknown commands.

Only the standard library is imported here, so that these answers take no time.
"""

from __future__ import annotations

import difflib
import sys

import lit_sft

PROGRAM = "lit-sft"
COMMANDS = {
    "fit": "Train a model, validate it meanwhile, and export it at the end.",
    "validate": "Measure a checkpoint on the validation set.",
    "test": "Measure a checkpoint on the test set.",
    "predict": "Write the answers of a checkpoint to a file.",
    "preview": "Show rows of the training set as the model will see them.",
    "doctor": "Check data, memory, disk before a run, with two real steps; exit code 1 on error.",
    "export": "Turn a checkpoint into a Hugging Face directory.",
}
"""Command -> its line of help."""
CACHE = "cache"
RECIPES = "recipes"
_WITHOUT_SETTINGS = {
    CACHE: "List or clean the cache of tokenized data.",
    RECIPES: "List, show or copy the config files that come with the package.",
}
"""Commands without settings of a run, which Lightning's command line does not know."""
_ALL = {**COMMANDS, **_WITHOUT_SETTINGS}


def answer(args: list[str]) -> int | None:
    """Answers a command line that runs no command.

    Args:
        args: The command line without the name of the program.

    Returns:
        The exit code; None if the first argument is a command.
    """
    first = args[0] if args else ""
    if first == CACHE:
        from lit_sft.commands import cache

        return cache.run(PROGRAM, args[1:])
    if first == RECIPES:
        from lit_sft.commands import recipes

        return recipes.run(PROGRAM, args[1:])
    if first in COMMANDS:
        return None
    if first in ("--help", "-h", "help"):
        print(overview())
        return 0
    if first in ("--version", "-V", "version"):
        print(f"{PROGRAM} {lit_sft.__version__}")
        return 0
    if args:
        print(f"error: {_problem(args)}", file=sys.stderr)
    else:
        print(overview(), file=sys.stderr)
    return 2


def overview() -> str:
    """Returns the help of the program."""
    width = max(map(len, _ALL))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in _ALL.items())
    return f"""\
usage: {PROGRAM} COMMAND [--config FILE] [--KEY VALUE ...]

Supervised fine-tuning of Hugging Face causal language models.

commands:
{commands}

options:
  --help     Show this.
  --version  Show the version.

`{PROGRAM} COMMAND --help` explains all keys of a command.
`{PROGRAM} COMMAND --print_config` prints their values."""


def _problem(args: list[str]) -> str:
    """Explains why the first argument is no command."""
    if args[0].startswith("-"):
        return f"the command comes first, before {args[0]}: one of {', '.join(_ALL)}"
    nearest = difflib.get_close_matches(args[0], _ALL, n=1)
    remedy = f"the commands are {', '.join(_ALL)}"
    if nearest:
        remedy = f"did you mean {nearest[0]}?"
    return f"there is no command `{args[0]}`: {remedy}"
