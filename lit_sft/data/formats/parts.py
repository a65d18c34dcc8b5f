"""Parts of a message with a `value`, as LLaMA-Factory's v1 format has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lit_sft.errors import UserError

_KEYS = {
    "text": "content",
    "reasoning": "reasoning_content",
    "tool_call": "tool_calls",
    "tool_calls": "tool_calls",
}
"""Type of a part -> the key of a message in OpenAI's shape that holds it."""


def spread_parts(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Moves the parts of a content into keys of the message.

    Texts and reasoning are joined as they are, and tool calls become a list.

    Args:
        raw: The message, without nulls.
        key: Name in errors.

    Returns:
        The message. It is unchanged if its content has no parts with a `value`.

    Raises:
        UserError: A part has an unknown type or another shape, or the message has its key, too.
    """
    content = raw.get("content")
    if not isinstance(content, list) or not any(_has_value(part) for part in content):
        return dict(raw)
    found: dict[str, list[str]] = {}
    for i, part in enumerate(content):
        name = f"{key}.content[{i}]"
        if not _has_value(part) or part.get("type") not in _KEYS:
            kind = part.get("type") if isinstance(part, dict) else part
            raise UserError(
                f"`{name}` is {kind!r:.40}, expected a part with a `value` and the type text,"
                " reasoning or tool_call; repair the row, or remove it"
            )
        if not isinstance(part["value"], str):
            raise UserError(f"`{name}.value` is no string; repair the row, or remove it")
        found.setdefault(_KEYS[part["type"]], []).append(part["value"])
    message = {name: value for name, value in raw.items() if name != "content"}
    for name, values in found.items():
        if message.get(name):
            raise UserError(f"`{key}` has {name} beside a part of that type; keep one of them")
        message[name] = _calls(values, key) if name == "tool_calls" else "".join(values)
    message.setdefault("content", "")
    return message


def _calls(values: list[str], key: str) -> list[Any]:
    """Parses tool calls in JSON: each value holds one call, or a list of them."""
    calls: list[Any] = []
    for value in values:
        try:
            call = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"`{key}` has a tool call that is not JSON: {error}") from None
        calls += call if isinstance(call, list) else [call]
    return calls


def _has_value(part: object) -> bool:
    """Whether a part holds its text under `value`."""
    if not isinstance(part, dict):
        return False
    return part.get("value") is not None and part.get("text") is None
