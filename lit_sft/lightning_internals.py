"""Private attributes of other libraries, each with the reason why no public way does."""

from __future__ import annotations

from argparse import Action
from typing import Any

from jsonargparse import ArgumentParser

# ------------------------------------------------------------------ jsonargparse


def parser_actions(parser: ArgumentParser) -> list[Action]:
    """The options of a parser.

    Neither argparse nor jsonargparse lists them publicly. `get_defaults()` gives keys and defaults, without the types
    that a key may take and without the keys of a group that is null.
    """
    return parser._actions


def option_type(action: Action) -> Any:
    """The type that an option was added with; None for a group or a link.

    jsonargparse replaces `action.type` and keeps the type hint in a private attribute, which groups do not have.
    """
    return getattr(action, "_typehint", None)
