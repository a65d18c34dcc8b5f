"""Counts of kept, dropped and noted rows of a data set, and their log lines."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from lit_sft.types import Conversation

_PLACEHOLDERS = re.compile(r"\{\{\s*(\w+)\s*\}\}|(?<!\S)\{([a-z]\w+)\}(?![^\s.,;:!?])")
"""`{{name}}` anywhere; `{name}` only where it stands like a word, because code and LaTeX are full
of braces.
"""


@dataclass
class Counts:
    """Counts of rows, examples and tokens, stored in the cache and logged at each start."""

    rows_read: int = 0
    rows_kept: int = 0
    """Rows with an example. Kept and dropped rows together are all rows read."""
    duplicates: int = 0
    """Kept rows that are exact copies of an earlier one."""
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lost_trained_tokens: int = 0
    """Targets beyond `max_length`, truncated or dropped."""
    truncated: int = 0
    """Truncated examples."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows."""
    notes: Counter[str] = field(default_factory=Counter)
    """Note (see `NOTES`) -> rows."""
    placeholders: Counter[str] = field(default_factory=Counter)
    """Unfilled `{{name}}` or `{name}` -> rows."""
    blank: Counter[str] = field(default_factory=Counter)
    """Field of `data.prompt_template` -> rows where it is empty."""
    stop_ids: list[int] = field(default_factory=list)
    """Ids of the trained stop tokens."""
    longest: int = 0
    """Tokens of the longest example before truncation."""

    def add(self, other: Counts) -> None:
        """Adds the counts of further rows."""
        for name, value in vars(other).items():
            if name == "longest":
                self.longest = max(self.longest, value)
            elif name == "stop_ids":
                self.stop_ids = sorted({*self.stop_ids, *value})
            else:
                setattr(self, name, getattr(self, name) + value)

    def lines(self, data: str) -> list[str]:
        """Returns the log lines about a data set.

        Args:
            data: Name of the data set.
        """
        share = self.trained_tokens / max(1, self.tokens)
        text = [
            f"{self.rows_kept:,} of {self.rows_read:,} rows kept as {self.examples:,} examples, "
            f"{self.tokens:,} tokens, {share:.0%} of them trained, the longest {self.longest:,}"
        ]
        for reason, n in self.dropped.items():
            text.append(f"{n:,} rows dropped: {reason}")
        if self.duplicates:
            text.append(f"{self.duplicates:,} rows are exact copies of another")
        if self.lost_trained_tokens:
            cut = f"; {self.truncated:,} examples truncated" if self.truncated else ""
            text.append(f"{self.lost_trained_tokens:,} target tokens lost to data.max_length{cut}")
        for note, n in self.notes.items():
            text.append(f"{n:,} rows: {describe(note)}")
        for name, n in self.blank.items():
            text.append(f"{n:,} rows: {name} of data.prompt_template is empty")
        for key, n in self.placeholders.items():
            text.append(f"{n:,} rows with {key} as it stands: nothing fills it")
        return [f"{data}: {line}" for line in text]


NOTES = {
    "per_turn": "one example per assistant turn, because the template rewrites earlier turns",
    "server_prompt": (
        "trained behind the prompt of a server, because the template writes their history"
        " differently"
    ),
    "lenient": (
        "trained from where the text leaves the prompt, because the mask could not be proved"
    ),
    "moved:reasoning": (
        "reasoning moved from the content to reasoning_content, where the template expects it"
    ),
    "written:reasoning": (
        "reasoning that the template does not write, put into the thinking block that its prompt"
        " opens"
    ),
    "empty_thinking": (
        "without reasoning, trained behind the empty thinking block that the template writes; ask"
        " the model behind that block for answers without reasoning"
    ),
    "left_out:reasoning_content": (
        "reasoning that the template does not write, so it is not trained"
    ),
    "left_out:content": (
        "content beside a tool call that the template does not write, so it is not trained"
    ),
    "left_out:tools": "tools that the template does not write",
    "other_template": (
        "tools written by the tokenizer's template default, though it has one for them, tool_use;"
        " save that one to a file, and set data.chat_template to its path"
    ),
    **{
        f"left_out:{role}_turn": (
            f"a {role} turn that the template does not write, so the model does not see it"
        )
        for role in ("system", "developer", "user", "tool")
    },
    "neighbours": (
        "neighbouring assistant turns, between which the model learns to stop; if they are one"
        " answer, merge them"
    ),
    "unread:chat_template_kwargs": (
        "chat_template_kwargs of the row are not read; those of all rows are "
        "data.chat_template_kwargs"
    ),
    "unread:functions": (
        "functions are not read; to have them as tools, set data.column_mapping to {functions:"
        " tools}"
    ),
    "split_boundary": "tokenized in two parts, prompt and answer, as at inference",
    "partly_dropped": "some of the turns dropped: too long, or without a trained token",
}
"""Note -> its description in the log. A note is something that was done to a row, or left out."""


def describe(note: str) -> str:
    """Describes a note in words."""
    if not note.startswith("switch:"):
        return NOTES.get(note, note)
    name, _, value = note.removeprefix("switch:").partition("=")
    setting = f"{{{name}: {value}}}"
    return (
        f"rendered with the template's switch {setting}; serve the model with it"
        " (data.chat_template_kwargs)"
    )


def find_placeholders(conversation: Conversation) -> set[str]:
    """Finds `{{name}}` and `{name}` marks that were never filled in. They are trained as text."""
    contents = [message.content for message in conversation.messages]
    text = "\n".join([conversation.text or "", *contents])
    # Without this check the search would take a tenth of the time of the whole preparation.
    if "{" not in text:
        return set()
    found = set()
    for double, single in _PLACEHOLDERS.findall(text):
        found.add(f"{{{{{double}}}}}" if double else f"{{{single}}}")
    return found
