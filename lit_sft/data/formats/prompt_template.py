"""`data.prompt_template`: text with {column} fields that becomes the user turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from string import Formatter
from typing import Any

from lit_sft.data.formats.values import kind, required
from lit_sft.errors import UserError

_NO_COLUMN = re.compile(r"^\d*$|[.\[\]]")
"""Names that Python's formatting would read as a position, an attribute or an index."""


@lru_cache(maxsize=8)
def template_fields(template: str) -> tuple[str, ...]:
    """Lists the columns that a template fills in.

    Raises:
        UserError: The template is broken, or has no field.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"`data.prompt_template` is broken: {error}; write {{{{ and }}}} for plain braces"
        ) from None
    fields: dict[str, bool] = {}
    for _, name, spec, conversion in parts:
        if name is not None:
            fields[name] = not spec and not conversion and not _NO_COLUMN.search(name)
    if not fields or not all(fields.values()):
        raise UserError(
            "`data.prompt_template` needs plain {column} fields and nothing else in braces; {{ is a"
            " brace"
        )
    return tuple(fields)


def fill_in(template: str, row: Mapping[str, Any]) -> str:
    """Fills the values of a row into the template.

    Raises:
        UserError: A value is missing, or is neither text nor a number.
    """
    for name in template_fields(template):
        value = required(row, name, f"data.prompt_template {{{name}}}")
        if not isinstance(value, str | int | float):
            raise UserError(
                f"`{name}` is {kind(value)}, but `data.prompt_template` fills in strings and"
                " numbers"
            )
    return template.format_map(row)
