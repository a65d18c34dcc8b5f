"""Checks of single values of a row. Errors name the key and the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from textwrap import shorten
from typing import Any

from lit_sft.data.formats.json_text import DoubleKeyError, parse_json
from lit_sft.data.formats.parts import spread_parts
from lit_sft.data.formats.turn_flags import FLAGS, train_flag
from lit_sft.errors import UserError
from lit_sft.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of rows, and keys of messages, with pictures, films and sound."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text: OpenAI's chat completions and responses."""
_READ = (
    *("role", "content", "name", "tool_call_id", "tool_calls", "function_call"),
    *_REASONING,
    *FLAGS,
)
"""Keys of a message that are read."""
_CALL = ("id", "type", "index", "function", "name", "description", "strict")
"""Keys of a tool call that hold no arguments."""
_OF_CALL = (*_CALL, "arguments")
_OF_PART = ("type", "text")
_TYPE_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def required(row: Mapping[str, Any], name: str, key: str = "") -> Any:
    """Returns the value in a column.

    Args:
        row: An object without nulls.
        name: The column.
        key: Name in errors; by default the column.

    Raises:
        UserError: It is missing or null.
    """
    if name in row:
        return row[name]
    remedy = "repair the row" if "[" in key else "see `data.column_mapping`"
    raise UserError(f"`{key or name}` is missing or null (there is: {listed(row)}); {remedy}")


def typed(value: Any, expected: type, key: str, *, wrap: bool = False) -> Any:
    """Returns a value of the expected type. A JSON string of a list or an object is parsed.

    Args:
        value: The value.
        expected: str, list or dict.
        key: Name in errors.
        wrap: Whether a single object becomes a list.

    Raises:
        UserError: The value has another type.
    """
    if isinstance(value, str) and expected is not str:
        try:
            value = parse_json(value)
        except DoubleKeyError as error:
            raise UserError(f"`{key}`: {error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"`{key}` should be {_TYPE_NAMES[expected]}, but is a string, not JSON: {error}"
            ) from None
    if wrap and isinstance(value, dict):
        value = [value]
    if not isinstance(value, expected):
        raise UserError(f"`{key}` is {kind(value)}, expected {_TYPE_NAMES[expected]}")
    return value


def as_object(value: object, key: str) -> dict[str, Any]:
    """Returns an object without its nulls."""
    return {name: item for name, item in typed(value, dict, key).items() if item is not None}


def as_objects(value: object, key: str) -> list[dict[str, Any]]:
    """Returns a list of objects without their nulls. A single object becomes a list."""
    items = typed(value, list, key, wrap=True)
    return [as_object(item, f"{key}[{i}]") for i, item in enumerate(items)]


def read_message(value: object, key: str, train: bool | None = None) -> Message:
    """Reads a message in OpenAI's shape.

    Args:
        value: The object.
        key: Name in errors.
        train: Default for an assistant turn without a flag.

    Raises:
        UserError: The object has another shape.
    """
    raw = spread_parts(as_object(value, key), key)
    role = required(raw, "role", f"{key}.role")
    if role not in ROLES:
        raise UserError(f"`{key}.role` is {role!r:.40}, expected one of {listed(ROLES)}")
    _check_media_keys(raw, key)
    calls = _read_calls(raw, role, key)
    train = train_flag(raw, role, key, train)
    if "function_call" in raw and not calls:
        _check_old_call(raw["function_call"], f"{key}.function_call")
    names = {}
    for name in ("name", "tool_call_id"):
        if name in raw:
            names[name] = typed(raw[name], str, f"{key}.{name}")
    if calls and "content" not in raw:
        content = ""
    else:
        content = _text_of(required(raw, "content", f"{key}.content"), f"{key}.content")
    return Message(role, content, _reasoning(raw, key), calls or None, train=train, **names)


def unread_keys(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Lists the keys of a message, its calls and its text parts with a value that is not read."""
    unread = _unread(raw, _READ, "")
    for call in as_objects(raw.get("tool_calls") or [], "tool_calls"):
        unread += _unread(call, _OF_CALL, "tool_calls.")
        if "function" in call:
            unread += _unread(as_object(call["function"], "function"), _OF_CALL, "tool_calls.")
    content = raw.get("content")
    for part in content if isinstance(content, list) else []:
        unread += _unread(part, _OF_PART, "content.")
    return tuple(unread)


def _unread(value: Mapping[str, Any], read: Iterable[str], prefix: str) -> list[str]:
    return [f"{prefix}{name}" for name in value if name not in read and has_value(value[name])]


def has_value(value: object) -> bool:
    """Whether a value is more than null or empty."""
    return value not in (None, "", [], {})


def _check_media_keys(raw: Mapping[str, Any], key: str) -> None:
    """Refuses a message with pictures, films or sound beside its text."""
    for name in MEDIA:
        if has_value(raw.get(name)):
            raise UserError(
                f"`{key}.{name}` is no text, but only text is trained; remove it, or the row"
            )


def _read_calls(raw: Mapping[str, Any], role: str, key: str) -> tuple[dict[str, Any], ...]:
    """Reads the tool calls of a message; none if it has no such key."""
    if "tool_calls" not in raw:
        return ()
    calls = _tool_calls(raw["tool_calls"], f"{key}.tool_calls")
    if calls and role != "assistant":
        raise UserError(
            f"`{key}.tool_calls` is in a {role} turn, but only the assistant calls tools"
        )
    return calls


def _check_old_call(call: object, key: str) -> None:
    """Refuses OpenAI's deprecated `function_call`, unless it is empty."""
    is_empty = not any(call.values()) if isinstance(call, dict) else not call
    if not is_empty:
        raise UserError(
            f"`{key}` is a call in an old form that is not read; write it as `tool_calls`"
        )


def _text_of(value: object, key: str) -> str:
    """Reads the content of a message: a string, or a list of text parts.

    Servers join text parts with a newline for templates that take text.
    """
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return str(typed(value, str, key))
    texts = []
    for i, part in enumerate(value):
        if part.get("type") not in _TEXT_PARTS:
            raise UserError(
                f"`{key}[{i}].type` is {part.get('type')!r:.40}, but only text is trained; remove"
                " the part, or the row"
            )
        texts.append(typed(part.get("text"), str, f"{key}[{i}].text"))
    return "\n".join(texts)


def _reasoning(message: Mapping[str, Any], key: str) -> str | None:
    """Reads the reasoning under any of its names. A blank text beside another one is ignored."""
    given = [name for name in _REASONING if name in message]
    if not given:
        return None
    thoughts: dict[str, str] = {}
    for name in given:
        text = typed(message[name], str, f"{key}.{name}")
        thoughts[text.strip()] = text
    if len(thoughts) > 1:
        thoughts.pop("", None)
    if len(thoughts) > 1:
        raise UserError(f"`{key}` has different texts in {listed(given)}; keep one of them")
    return next(iter(thoughts.values()))


def _tool_calls(value: object, key: str) -> tuple[dict[str, Any], ...]:
    """Converts tool calls into OpenAI's shape."""
    calls = []
    for i, call in enumerate(as_objects(value, key)):
        function = as_object(call.get("function", call), f"{key}[{i}].function")
        name = typed(required(function, "name", f"{key}[{i}].name"), str, f"{key}[{i}].name")
        _check_arguments(call, function, f"{key}[{i}]")
        arguments = typed(function.get("arguments", {}), dict, f"{key}[{i}].arguments")
        identity = {"id": call["id"]} if "id" in call else {}
        calls.append(
            {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return tuple(calls)


def _check_arguments(call: Mapping[str, Any], function: Mapping[str, Any], key: str) -> None:
    """Refuses a call whose arguments seem to have another name or place."""
    if "arguments" in function:
        return
    others = [name for name in {**function, **call} if name not in _CALL]
    if others:
        raise UserError(
            f"`{key}` has no `arguments` beside its `name`, but {listed(others)}; rename it to"
            " `arguments`, or remove it"
        )


def read_tools(value: object) -> tuple[dict[str, Any], ...] | None:
    """Reads tool schemas; None if there is none.

    Flat schemas are put into OpenAI's envelope `{"type": "function", "function": ...}`. Inference
    servers do the same before they render the template.
    """
    tools = as_objects(value, "tools")
    check_text(tools, "tools")
    enveloped = []
    for tool in tools:
        enveloped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(enveloped) or None


def parsed_messages(value: Any, key: str) -> list[Any] | None:
    """Parses messages in a JSON string, as csv and parquet hold them; None for any other value.

    Args:
        value: The value.
        key: Name in errors.

    Raises:
        UserError: A message has a key twice.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return None
    if items and all(isinstance(item, dict) and item.get("role") in ROLES for item in items):
        return list(typed(value, list, key))
    return None


def check_text(value: object, key: str) -> None:
    """Refuses text that is not valid Unicode: no tokenizer accepts it.

    Raises:
        UserError: The value contains a lone surrogate, at any depth.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"`{key}` has a lone surrogate {error.object[error.start]!a}, not text; remove it"
        ) from None


def listed(names: Iterable[object]) -> str:
    """Joins names for a message."""
    return shorten(", ".join(str(name) for name in names), 200) or "none"


def kind(value: object) -> str:
    """Names the type of a value with its article, for messages."""
    if value is None:
        return "null"
    if isinstance(value, list) and value:
        return f"a list of {type(value[0]).__name__}"
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"
