"""Which columns of a row are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

FIRST_COLUMNS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "prompt": "prompt_completion",
    "text": "text",
}
"""The column that a format starts from -> the format."""
FORMATS = tuple(FIRST_COLUMNS.values())
_READ = {
    "messages": ("messages", "system", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "history", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "text": ("text",),
}
_ANSWERS = ("completion", "output", "answer", "response")
_COUNTED = ("chat_template_kwargs", "functions")
"""What decides elsewhere how a conversation is written (SmolTalk2, OpenAI before it had `tools`)."""


def answer_column(columns: Collection[str], fields: Sequence[str]) -> list[str]:
    """The column with the answer to a `data.prompt_template` with these fields, if there is one."""
    return [name for name in _ANSWERS if name in columns and name not in fields][:1]


def unread(
    rows: Sequence[Mapping[str, Any]], format: str, column_mapping: Mapping[str, str], fields: Sequence[str]
) -> list[str]:
    """Columns with something in them that are not read, under the names that they have in the file.

    Args:
        rows: Some rows of a source.
        format: What reads them.
        column_mapping: {column of the row: column of the format}.
        fields: Of the `data.prompt_template`, or none.
    """
    filled = {name: None for row in rows for name, value in row.items() if value not in (None, "", [], {})}
    names = {column_mapping.get(name, name): name for name in filled}
    read = ("system", "tools", *fields, *answer_column(names, fields)) if fields else _READ.get(format, ())
    return [own for name, own in names.items() if name not in read]


def counted(row: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    """Notes on columns that would have changed how the row is written, and are no field of a `data.prompt_template`."""
    return tuple(f"unread:{name}" for name in _COUNTED if row.get(name) and name not in fields)
