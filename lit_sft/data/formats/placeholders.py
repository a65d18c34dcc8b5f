"""Marks that a data set's author meant to be filled in. They are trained as they stand, so they are counted."""

from __future__ import annotations

import re

from lit_sft.types import Conversation

_MARKS = re.compile(r"\{\{\s*(\w+)\s*\}\}|(?<!\S)\{([a-z]\w+)\}(?![^\s.,;:!?])")
"""`{{name}}` anywhere; `{name}` only where it stands like a word, because code and LaTeX are full of braces."""


def find_placeholders(conversation: Conversation) -> set[str]:
    """The `{{name}}` and `{name}` marks that nobody filled in."""
    text = "\n".join((conversation.text or "", *(message.content for message in conversation.messages)))
    if "{" not in text:  # the search below takes a tenth of the whole preparation
        return set()
    return {f"{{{{{double}}}}}" if double else f"{{{single}}}" for double, single in _MARKS.findall(text)}
