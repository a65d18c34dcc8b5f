"""A value out of a row: of the type that is expected, or an error that names its key and says how to mend it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from textwrap import shorten
from typing import Any

from lit_sft.errors import UserError

_REASONING = ("reasoning_content", "reasoning", "thinking")
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


def parsed_messages(value: Any, roles: Collection[str]) -> list[Any] | None:
    """The messages that csv or parquet holds as a JSON string; None for anything else."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return items if items and all(isinstance(item, dict) and item.get("role") in roles for item in items) else None


def text_of(value: object, key: str) -> str:
    """The content of a message: a string, or a list of text parts."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return str(typed(value, str, key))
    for i, part in enumerate(value):
        if part.get("type") != "text":
            raise UserError(f"`{key}[{i}].type` is {part.get('type')!r:.40}, but only text is trained; remove the part")
    return "".join(typed(part.get("text"), str, f"{key}[{i}].text") for i, part in enumerate(value))


def reasoning(message: Mapping[str, Any], key: str) -> str | None:
    """What was thought, under whichever name; a blank text beside another says nothing."""
    given = {name: typed(message[name], str, f"{key}.{name}") for name in _REASONING if name in message}
    thoughts = {text.strip(): text for text in given.values()}
    if len(thoughts) > 1:
        thoughts.pop("", None)
    if len(thoughts) > 1:
        raise UserError(f"`{key}` has different texts in {listed(given)}; keep one of them")
    return next(iter(thoughts.values()), None)


def tool_calls(value: object, key: str) -> tuple[dict[str, Any], ...]:
    """Calls in OpenAI's shape."""
    calls = []
    for i, call in enumerate(as_objects(value, key)):
        function = as_object(call.get("function", call), f"{key}[{i}].function")
        name = typed(required(function, "name", f"{key}[{i}].name"), str, f"{key}[{i}].name")
        arguments = typed(function.get("arguments", {}), dict, f"{key}[{i}].arguments")
        identity = {"id": call["id"]} if "id" in call else {}
        calls.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return tuple(calls)


def tool_schemas(value: object) -> tuple[dict[str, Any], ...] | None:
    """Flat schemas are put into OpenAI's envelope, as inference servers do before they render the same template."""
    tools = as_objects(value, "tools")
    check_text(tools, "tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools) or None


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
