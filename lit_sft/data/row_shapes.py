"""One row of each shape that chat templates treat differently, in the format `messages`.

A certificate (`preview --certify`) says which of them a template can train, and the tests judge
them under public chat templates. The words of a message name its number, so each word occurs once
in a row: in trained tokens it tells which message they come from.
"""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]


def _say(number: int, text: str = "says hello") -> str:
    return f"begin{number} {text} end{number}"


def _think(number: int) -> str:
    return f"first{number} hm hm last{number}"


def _user(number: int) -> Row:
    return {"role": "user", "content": _say(number)}


def _assistant(content: str, **fields: Any) -> Row:
    return {"role": "assistant", "content": content, **fields}


def _answer(number: int, **fields: Any) -> Row:
    return _assistant(_say(number), **fields)


def _thought(number: int) -> Row:
    return _answer(number, reasoning_content=_think(number))


def _inside(number: int) -> Row:
    """Returns an answer with its reasoning in the content."""
    return _assistant(f"<think>\n{_think(number)}\n</think>\n\n{_say(number)}")


def _call(name: str, identity: str = "call00001", **arguments: Any) -> Row:
    # Mistral takes only ids of nine letters and digits.
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _text_call(name: str, **arguments: Any) -> Row:
    """Returns a call with JSON text as its arguments, as OpenAI's API writes them."""
    call = _call(name, **arguments)
    call["function"]["arguments"] = json.dumps(arguments)
    return call


def _result(number: int, name: str, identity: str = "call00001") -> Row:
    return {"role": "tool", "content": _say(number, "is"), "name": name, "tool_call_id": identity}


def _tool(name: str) -> Row:
    properties = {"city": {"type": "string", "description": "A city."}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    function = {"name": name, "description": "Looks things up.", "parameters": parameters}
    return {"type": "function", "function": function}


def _row(*messages: Row) -> Row:
    return {"messages": list(messages)}


def _tool_row(*messages: Row) -> Row:
    return {"messages": list(messages), "tools": [_tool("get_weather"), _tool("get_time")]}


_SYSTEM = {"role": "system", "content": _say(0)}
_CITY = _call("get_weather", city="city1")
_NESTED = _call("get_weather", city="city1 北京", flag=True, none=None, days=[1, {"of": "list1"}])

ROW_SHAPES: dict[str, Row] = {
    "single": _row(_user(0), _answer(1)),
    "multi-turn": _row(_user(0), _answer(1), _user(2), _answer(3), _user(4), _answer(5)),
    "system": _row(_SYSTEM, _user(1), _answer(2)),
    "system, multi-turn": _row(_SYSTEM, _user(1), _answer(2), _user(3), _answer(4)),
    "last turn open": _row(_user(0), _answer(1), _user(2)),
    "first turn untrained": _row(_user(0), _answer(1, weight=0), _user(2), _answer(3)),
    "tools, no call": _tool_row(_user(0), _answer(1), _user(2), _answer(3)),
    "call": _tool_row(_user(0), _assistant("", tool_calls=[_CITY])),
    "call, result": _tool_row(
        _user(0), _assistant("", tool_calls=[_CITY]), _result(2, "get_weather")
    ),
    "call, result, answer": _tool_row(
        _user(0), _assistant("", tool_calls=[_CITY]), _result(2, "get_weather"), _answer(3)
    ),
    "text beside a call": _tool_row(
        _user(0), _assistant(_say(1), tool_calls=[_CITY]), _result(2, "get_weather"), _answer(3)
    ),
    "two calls": _tool_row(
        _user(0),
        _assistant("", tool_calls=[_CITY, _call("get_time", "call00002", city="time1")]),
        _result(2, "get_weather"),
        _result(3, "get_time", "call00002"),
        _answer(4),
    ),
    "arguments as JSON text": _tool_row(
        _user(0), _assistant("", tool_calls=[_text_call("get_weather", city="city1")])
    ),
    "nested arguments": _tool_row(_user(0), _assistant("", tool_calls=[_NESTED])),
    "calls, multi-turn": _tool_row(
        _SYSTEM,
        _user(1),
        _assistant("", tool_calls=[_call("get_weather", city="city2")]),
        _result(3, "get_weather"),
        _answer(4),
        _user(5),
        _assistant("", tool_calls=[_call("get_time", "call00002", city="city6")]),
        _result(7, "get_time", "call00002"),
        _answer(8),
    ),
    "reasoning": _row(_user(0), _thought(1)),
    "reasoning, multi-turn": _row(_user(0), _thought(1), _user(2), _thought(3)),
    "reasoning, then none": _row(_user(0), _thought(1), _user(2), _answer(3)),
    "reasoning, call": _tool_row(
        _user(0),
        _assistant("", tool_calls=[_CITY], reasoning_content=_think(1)),
        _result(2, "get_weather"),
        _thought(3),
    ),
    "reasoning, call, no more": _tool_row(
        _user(0),
        _assistant("", tool_calls=[_CITY], reasoning_content=_think(1)),
        _result(2, "get_weather"),
        _answer(3),
    ),
    "thoughts in content": _row(_user(0), _inside(1)),
    "thoughts in content, multi-turn": _row(_user(0), _inside(1), _user(2), _inside(3)),
    "white space": _row(
        {"role": "user", "content": f"\n  {_say(0)}\n\n"},
        _assistant(f"\n\n  {_say(1)} \n"),
        {"role": "user", "content": f"\t{_say(2)}"},
        _assistant(f" {_say(3)}\n\n\n"),
    ),
    "Unicode": _row(
        {"role": "user", "content": _say(0, "问题 🙂 é")},
        _assistant(_say(1, "你好，世界 👩‍👩‍👧 \u2028 İ")),
        {"role": "user", "content": "🙂" + _say(2)},
        _assistant("北京" + _say(3) + "。"),
    ),
    "markup": _row(
        {"role": "user", "content": _say(0, "user\nassistant\n<b>&amp;</b> {{x}} {% if %}")},
        _assistant(_say(1, "assistant\nuser: <answer> \\n \"'` ```json\n{}\n```")),
        _user(2),
        _answer(3),
    ),
}
"""Shape -> a row."""
