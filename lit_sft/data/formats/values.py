"""A value out of a row: of the type that is expected, or an error that names its key and says how to mend it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from textwrap import shorten
from typing import Any

from lit_sft.types import UserError

_TYPE_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def required(row: Mapping[str, Any], name: str, key: str = "") -> Any:
    """What stands in a column; `key` is how an error calls it.

    Raises:
        UserError: It is missing (or null: readers take nulls out).
    """
    if name not in row:
        remedy = "repair the row" if "[" in key else "see `data.column_mapping`"
        raise UserError(f"`{key or name}` is missing or null (there is: {listed(row)}); {remedy}")
    return row[name]


def typed(value: Any, expected: type, key: str, *, single: bool = False) -> Any:
    """`value`, if it has the type expected; lists and objects may be JSON strings, `single` takes x for [x].

    Raises:
        UserError: It has another.
    """
    if isinstance(value, str) and expected is not str:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"`{key}` should be {_TYPE_NAMES[expected]}, but is a string, not JSON: {error}") from None
    if single and isinstance(value, dict):
        return [value]
    if not isinstance(value, expected):
        raise UserError(f"`{key}` is {kind(value)}, expected {_TYPE_NAMES[expected]}")
    return value


def as_object(value: object, key: str) -> dict[str, Any]:
    """An object without its nulls."""
    return {name: item for name, item in typed(value, dict, key).items() if item is not None}


def as_objects(value: object, key: str) -> list[dict[str, Any]]:
    """A list of objects, or one of them alone, without their nulls."""
    return [as_object(item, f"{key}[{i}]") for i, item in enumerate(typed(value, list, key, single=True))]


def check_text(value: object, key: str) -> None:
    """Refuses what cannot be written as UTF-8, which no tokenizer takes.

    Raises:
        UserError: There is a lone surrogate in it, at any depth.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"`{key}` has a lone surrogate {error.object[error.start]!a}, not text; remove it") from None


def listed(names: Iterable[str]) -> str:
    """Names in a row, for messages."""
    return shorten(", ".join(map(str, names)), 200) or "none"


def kind(value: object) -> str:
    """The type of a value with its article, for messages."""
    if isinstance(value, list) and value:
        return f"a list of {type(value[0]).__name__}"
    name = type(value).__name__
    return "null" if value is None else f"an {name}" if name[0] in "aeiou" else f"a {name}"
