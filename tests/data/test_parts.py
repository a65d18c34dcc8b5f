"""Rows of LLaMA-Factory's v1 format and of ms-swift become the same conversation as OpenAI's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lit_sft.data.formats.parse import to_conversation
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _parts(**values: Any) -> list[dict[str, Any]]:
    return [{"type": kind, "value": value} for kind, value in values.items()]


ADD = json.dumps({"name": "add", "arguments": {"a": 1}})
SUB = json.dumps({"name": "sub", "arguments": {}})
ASKED = (
    Message("user", "1+1?"),
    Message("assistant", "", "must add", tool_calls=(_call("add", a=1), _call("sub")), train=False),
    Message("tool", "2"),
    Message("assistant", "It is 2."),
)
V1 = {
    "messages": [
        {"role": "user", "content": _parts(text="1+1?")},
        {
            "role": "assistant",
            "content": [
                *_parts(reasoning="must add", tool_call=ADD),
                *_parts(tool_call=SUB),
            ],
            "loss_weight": 0.0,
        },
        {"role": "tool", "content": _parts(text="2")},
        {"role": "assistant", "content": [*_parts(text="It is "), *_parts(text="2.")]},
    ]
}


def test_v1_rows_of_llama_factory() -> None:
    assert to_conversation(V1, format="messages") == Conversation(ASKED)


def test_one_part_may_hold_several_calls() -> None:
    calls = f"[{ADD}, {SUB}]"
    turn = {"role": "assistant", "content": _parts(tool_calls=calls)}
    row = {"messages": [{"role": "user", "content": "1+1?"}, turn]}
    assert to_conversation(row, format="messages").messages[1].tool_calls == (
        _call("add", a=1),
        _call("sub"),
    )


def test_parts_of_parquet_have_all_keys() -> None:
    parts = [{"type": "text", "value": "1+1?", "text": None}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "2"}]}
    assert to_conversation(row, format="messages").messages[0].content == "1+1?"


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"content": _parts(image="a.png")}, r"messages\[1\]\.content\[0\].* 'image'.*remove"),
        ({"content": [*_parts(text="a"), "b"]}, r"content\[1\].* 'b'"),
        ({"content": [{"type": "text", "value": 1}]}, r"content\[0\]\.value` is no string"),
        ({"content": _parts(tool_call="add(1)")}, r"messages\[1\]` has a tool call .* not JSON"),
        (
            {"content": _parts(reasoning="hm", text="2"), "reasoning_content": "other"},
            r"reasoning_content beside a part of that type; keep one",
        ),
    ],
)
def test_parts_that_cannot_be_read(turn: dict[str, Any], said: str) -> None:
    row = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", **turn}]}
    with pytest.raises(UserError, match=said):
        to_conversation(row, format="messages")


def test_agent_rows_of_ms_swift() -> None:
    """Each call is a message of its own, and belongs to the assistant turn before it."""
    row = {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "Let me see."},
            {"role": "tool_call", "content": ADD},
            {"role": "tool_call", "content": SUB},
            {"role": "tool_response", "content": "2"},
            {"role": "tool_response", "content": "0"},
            {"role": "assistant", "content": "It is 2."},
        ]
    }
    assert to_conversation(row, format="messages").messages == (
        Message("user", "1+1?"),
        Message("assistant", "Let me see.", tool_calls=(_call("add", a=1), _call("sub"))),
        Message("tool", "2"),
        Message("tool", "0"),
        Message("assistant", "It is 2."),
    )


def test_neighbouring_answers_stay_apart_where_no_role_says_that_they_are_calls() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [json.loads(ADD)]}
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Well."}, call]
    assert len(to_conversation({"messages": turns}, format="messages").messages) == 3


def test_pairs_of_question_and_answer() -> None:
    row = {"conversations": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]}
    messages = to_conversation(row, format="sharegpt").messages
    assert [message.content for message in messages] == ["a", "b", "c", "d"]


def test_query_and_response_with_history() -> None:
    row = {"query": "c", "response": "d", "history": [["a", "b"]], "system": "s"}
    mapping = {"query": "instruction", "response": "output"}
    conversation = to_conversation(row, format="alpaca", column_mapping=mapping)
    assert [message.content for message in conversation.messages] == ["s", "a", "b", "c", "d"]
