"""Columns of rows: the format that they show, and the columns that nothing reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lit_sft.data.formats.prompt_template import template_fields
from lit_sft.data.formats.values import listed
from lit_sft.errors import UserError

FIRST_COLUMNS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "prompt": "prompt_completion",
    "text": "text",
}
"""Column that shows the format -> the format."""
FORMATS = tuple(FIRST_COLUMNS.values())
"""Names of all formats."""
WITH_PROMPT_TEMPLATE = ("alpaca", "prompt_completion")
"""Formats whose columns a `data.prompt_template` may fill in."""

_READ = {
    "messages": ("messages", "system", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "history", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "text": ("text",),
}
"""Format -> the columns that it reads."""
_ANSWERS = ("completion", "output", "answer", "response")
"""Columns with the answer to a `data.prompt_template`."""
_COUNTED = ("chat_template_kwargs", "functions")
"""Columns that other programs use to render a conversation (SmolTalk2; OpenAI before `tools`)."""


def rename_columns(row: Mapping[str, Any], column_mapping: Mapping[str, str]) -> dict[str, Any]:
    """Applies `data.column_mapping` to a row.

    Raises:
        UserError: It names a missing column, or gives two columns the same name.
    """
    for column in column_mapping:
        if column not in row:
            raise UserError(
                f"`data.column_mapping` names `{column}`, but the columns are {listed(row)}"
            )
    renamed = {column_mapping.get(column, column): value for column, value in row.items()}
    if len(renamed) < len(row):
        raise UserError(
            f"`data.column_mapping` gives two of the columns {listed(row)} one name; choose other"
            " names"
        )
    return renamed


def detect_format(
    rows: Sequence[Mapping[str, Any]],
    column_mapping: Mapping[str, str] | None,
    prompt_template: str | None,
) -> tuple[str, str]:
    """Detects the format for `format: auto`.

    Args:
        rows: The first rows. Columns that are null in all of them do not count.
        column_mapping: `data.column_mapping`.
        prompt_template: `data.prompt_template`.

    Returns:
        The format, and the reason for the log.

    Raises:
        UserError: No known format has these columns.
    """
    if prompt_template is not None:
        return (
            "prompt_completion",
            "format prompt_completion, because `data.prompt_template` is set",
        )
    values: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None or name not in values:
                values[name] = value
    if column_mapping:
        values = rename_columns(values, column_mapping)
    columns = [name for name, value in values.items() if value is not None]
    for first, format in FIRST_COLUMNS.items():
        if first in columns:
            return format, f"format {format}, because the rows have the column `{first}`"
    raise UserError(
        f"no format fits the columns {_named(columns)}: {listed(FORMATS)} start from"
        f" {listed(FIRST_COLUMNS)}; see `data.column_mapping` (such as {{question: prompt, answer:"
        " completion}) and `data.format`"
    )


def _named(columns: Sequence[str]) -> str:
    if len(columns) != 1:
        return listed(columns)
    return f"{listed(columns)} (one; in a csv file, `,`, `;`, `|` or a tab separates columns)"


def report_unread(
    rows: Sequence[Mapping[str, Any]],
    format: str,
    column_mapping: Mapping[str, str] | None,
    prompt_template: str | None,
) -> list[str]:
    """Lists columns of the first rows that nothing reads, by their names in the file.

    Returns:
        One line for the log; none if all columns are read or empty.

    Raises:
        UserError: The template is broken.
    """
    mapping = column_mapping or {}
    own_names: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if value not in (None, "", [], {}):
                own_names[mapping.get(name, name)] = name
    read = _READ.get(format, ())
    if prompt_template is not None:
        fields = template_fields(prompt_template)
        read = ("system", "tools", *fields, *answer_column(own_names, fields))
    unread = [own for name, own in own_names.items() if name not in read]
    if not unread:
        return []
    return [f"columns that are not read: {listed(unread)}"]


def answer_column(columns: Collection[str], fields: Sequence[str]) -> list[str]:
    """Finds the column with the answer to a `data.prompt_template` with these fields.

    Returns:
        One name, or none.
    """
    for name in _ANSWERS:
        if name in columns and name not in fields:
            return [name]
    return []


def unread_notes(row: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    """Notes columns that another program would have used to render the row.

    Args:
        row: Column -> value.
        fields: Columns that `data.prompt_template` fills in.
    """
    notes = []
    for name in _COUNTED:
        if row.get(name) and name not in fields:
            notes.append(f"unread:{name}")
    return tuple(notes)
