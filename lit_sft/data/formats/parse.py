"""Row of any known format -> `Conversation`, in pure functions without file, tokenizer or template.

Errors say what is wrong with the row and how to mend it. The caller knows file and line, and adds
them. A key that is null counts as absent, because Arrow fills missing fields with null.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from lit_sft.data.formats.columns import answer_column, rename_columns, unread_notes
from lit_sft.data.formats.prompt_template import fill_in, template_fields
from lit_sft.data.formats.values import (
    MEDIA,
    as_object,
    check_text,
    has_value,
    kind,
    listed,
    parsed_messages,
    read_message,
    read_tools,
    required,
    typed,
    unread_keys,
)
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

_PLACEHOLDER = re.compile(r"<\|?(image|video|audio)\|?>")
"""Stands in a text for a picture, a film or a sound."""
_MEDIA_KEYS = frozenset({"bytes", "path"})
"""Keys of a picture, film or sound in a file of `datasets`."""
_SYSTEM_ROLES = ("system", "developer")
_FUNCTION_CALL = "function_call"
_SPEAKER_ROLES = {
    "system": "system",
    "developer": "developer",
    "function_call": _FUNCTION_CALL,
    "tool_call": _FUNCTION_CALL,
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool"),
}
"""Speaker in ShareGPT -> our role.

A function call becomes an assistant turn that only calls tools.
"""

_SWIFT_ROLES = ("tool_call", "tool_response")
"""Roles in messages of ms-swift. Each call of a turn is a message of its own."""


class _Turn(NamedTuple):
    key: str
    """The key of the turn in the row, for messages."""
    message: Message
    unread: tuple[str, ...] = ()
    """Keys of the turn that have a value and are not read."""


def to_conversation(
    row: Mapping[str, Any],
    *,
    format: str,
    column_mapping: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    need_answer: bool = True,
) -> Conversation:
    """Reads one row.

    Args:
        row: Column -> value, as JSON or Arrow gives it.
        format: One of `FORMATS`.
        column_mapping: {column of the row: column of the format}, applied first.
        prompt_template: Text with {column} fields that becomes the user turn. The answer is the
            first of the columns completion, output, answer, response that is not a field.
        system_prompt: Becomes the first turn if the conversation has no system turn.
        need_answer: False for prediction: a row may end with a question, and an empty last answer
            is dropped.

    Raises:
        UserError: The row does not fit; the message names neither file nor row number.
    """
    if column_mapping:
        row = rename_columns(row, column_mapping)
    row = as_object(row, "row")
    if format == "text":
        return _read_text(row)
    fields: tuple[str, ...] = ()
    if prompt_template is None:
        turns = _READERS[format](row)
    else:
        fields = template_fields(prompt_template)
        turns = _read_template(row, prompt_template)
    turns = _with_system_turn(turns, row, system_prompt)
    if not need_answer and turns and turns[-1].message == Message("assistant", ""):
        turns = turns[:-1]
    _check_turns(turns, need_answer)
    _check_contents(turns)
    for turn in turns:
        _check_media(turn.key, turn.message.content, row)
    return Conversation(
        messages=tuple(turn.message for turn in turns),
        tools=read_tools(row["tools"]) if row.get("tools") else None,
        blank=tuple(name for name in fields if row[name] == ""),
        notes=(*unread_notes(row, fields), *_turn_notes(turns)),
    )


def conversation_to_prompt(conversation: Conversation) -> tuple[Conversation, str | None]:
    """Splits a conversation into the question and the expected answer.

    Returns:
        The conversation without a last assistant turn, and the content of this turn. The content
        is None if there is no such turn or its own flag excludes it from training; it is empty if
        the turn only calls tools.
    """
    if not conversation.messages or conversation.messages[-1].role != "assistant":
        return conversation, None
    last = conversation.messages[-1]
    asked = Conversation(conversation.messages[:-1], conversation.tools)
    return asked, None if last.train is False else last.content


def _read_text(row: Mapping[str, Any]) -> Conversation:
    text = typed(required(row, "text"), str, "text")
    if not text.strip():
        raise UserError("`text` is blank; remove the row")
    check_text(text, "text")
    _check_media("text", text, row)
    return Conversation(messages=(), text=text)


def _read_messages(
    row: Mapping[str, Any], column: str = "messages", train: bool | None = None
) -> list[_Turn]:
    """Reads the messages in a column; see `read_message` for `train`."""
    turns: list[_Turn] = []
    for i, item in enumerate(typed(required(row, column), list, column)):
        key = f"{column}[{i}]"
        raw = as_object(item, key)
        if raw.get("role") not in _SWIFT_ROLES:
            turns.append(_message_turn(raw, key, train))
            continue
        _append(turns, _message_turn(_from_sharegpt(raw, key), key, train))
    return turns


def _append(turns: list[_Turn], turn: _Turn) -> None:
    """Appends a turn, or joins its calls to the assistant turn that they belong to."""
    if turns and _continues(turns[-1].message, turn.message):
        turns[-1] = _joined(turns[-1], turn)
    else:
        turns.append(turn)


def _message_turn(raw: Mapping[str, Any], key: str, train: bool | None = None) -> _Turn:
    return _Turn(key, read_message(raw, key, train), unread_keys(raw))


def _read_sharegpt(row: Mapping[str, Any]) -> list[_Turn]:
    turns: list[_Turn] = []
    for i, value in enumerate(typed(required(row, "conversations"), list, "conversations")):
        key = f"conversations[{i}]"
        for raw in _split_pair(as_object(value, key)):
            _append(turns, _message_turn(_from_sharegpt(raw, key), key))
    return turns


def _split_pair(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a question and its answer in one object, {human, assistant}, into two turns."""
    if item.keys() != {"human", "assistant"}:
        return [item]
    return [{"from": speaker, "value": item[speaker]} for speaker in ("human", "assistant")]


def _from_sharegpt(turn: dict[str, Any], key: str) -> dict[str, Any]:
    """Converts {from, value}, or {role, content} with ShareGPT's roles, into OpenAI's shape."""
    name = "from" if "from" in turn else "role"
    speaker = required(turn, name, f"{key}.from")
    role = _SPEAKER_ROLES.get(str(speaker))
    if role is None:
        raise UserError(
            f"`{key}.{name}` is {speaker!r:.40}, expected one of {listed(_SPEAKER_ROLES)}"
        )
    del turn[name]
    other_role = _SPEAKER_ROLES.get(str(turn.pop("role", speaker)))
    if "value" in turn:
        value = typed(turn.pop("value"), str, f"{key}.value")
        _refuse_second(turn.get("content", value), value, f"`{key}.value` and `{key}.content`")
        turn["content"] = value
    if role == _FUNCTION_CALL and "content" in turn:
        value = turn.pop("content")
        _refuse_second(turn.get("tool_calls", value), value, f"the call and `{key}.tool_calls`")
        turn["tool_calls"] = value
    _refuse_second(other_role, role, f"`{key}.from` and `{key}.role`")
    return {**turn, "role": "assistant" if role == _FUNCTION_CALL else role}


def _refuse_second(second: object, first: object, names: str) -> None:
    """Refuses a value that would be ignored beside another one."""
    if second != first and has_value(second):
        raise UserError(f"{names} differ; keep one of them")


def _continues(first: Message, second: Message) -> bool:
    """Whether a call belongs to the assistant turn before it.

    ShareGPT has no turn with both text and calls, or with several calls, so such a turn stands
    there in pieces.
    """
    only_calls = bool(second.tool_calls) and not second.content and not second.reasoning_content
    return first.role == second.role == "assistant" and only_calls


def _joined(first: _Turn, second: _Turn) -> _Turn:
    """Joins an assistant turn and the calls behind it."""
    if first.message.train is not second.message.train:
        raise UserError(
            f"`{first.key}` and `{second.key}` are one assistant turn, but only one is trained;"
            " give both the same flag"
        )
    calls = (*(first.message.tool_calls or ()), *(second.message.tool_calls or ()))
    message = replace(first.message, tool_calls=calls)
    return _Turn(first.key, message, first.unread + second.unread)


def _read_alpaca(row: Mapping[str, Any]) -> list[_Turn]:
    turns: list[_Turn] = []
    for i, pair in enumerate(typed(row.get("history") or [], list, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"`history[{i}]` is {kind(pair)}, expected a pair [question, answer]")
        turns.append(_text_turn("user", pair[0], f"history[{i}][0]"))
        turns.append(_text_turn("assistant", pair[1], f"history[{i}][1]"))
    instruction = typed(required(row, "instruction"), str, "instruction")
    context = typed(row.get("input", ""), str, "input")
    question = "\n".join(part for part in (instruction, context) if part)
    turns.append(_text_turn("user", question, "instruction"))
    if "output" in row:
        turns.append(_text_turn("assistant", row["output"], "output"))
    return turns


def _read_prompt_completion(row: Mapping[str, Any]) -> list[_Turn]:
    """Reads prompt and completion. Assistant turns of the prompt are not trained by default."""
    row = _with_parsed_messages(row)
    turns = _read_text_or_messages(row, "prompt", "user", train=False)
    if "completion" not in row:
        return turns
    answer = _read_text_or_messages(row, "completion", "assistant")
    if any(turn.message.role not in ("assistant", "tool") for turn in answer):
        raise UserError(
            "`completion` has turns of other roles than assistant and tool; move them to `prompt`"
        )
    return turns + answer


def _with_parsed_messages(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parses messages that csv and parquet hold as JSON strings.

    A completion is parsed only if the prompt is such a string: the answer to a question may be
    JSON itself.
    """
    prompt = parsed_messages(required(row, "prompt"), "prompt")
    if prompt is None:
        return row
    completion = parsed_messages(row.get("completion"), "completion")
    if completion is None:
        return {**row, "prompt": prompt}
    return {**row, "prompt": prompt, "completion": completion}


def _read_text_or_messages(
    row: Mapping[str, Any], column: str, role: str, train: bool | None = None
) -> list[_Turn]:
    """Reads the messages in a column, or its text as one turn."""
    if isinstance(required(row, column), list):
        return _read_messages(row, column, train)
    return [_text_turn(role, row[column], column)]


def _read_template(row: Mapping[str, Any], template: str) -> list[_Turn]:
    turns = [_text_turn("user", fill_in(template, row), "data.prompt_template")]
    for name in answer_column(row, template_fields(template)):
        turns.append(_text_turn("assistant", row[name], name))
    return turns


_READERS: dict[str, Callable[[Mapping[str, Any]], list[_Turn]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def _text_turn(role: str, text: object, key: str) -> _Turn:
    return _Turn(key, Message(role, typed(text, str, key)))


def _with_system_turn(
    turns: list[_Turn], row: Mapping[str, Any], system_prompt: str | None
) -> list[_Turn]:
    """Puts the column `system` or the system prompt first, if there is no system turn."""
    column = row.get("system")
    if any(turn.message.role in _SYSTEM_ROLES for turn in turns):
        if column:
            raise UserError(
                f"the column `system` and the turn `{turns[0].key}` are both system prompts;"
                " keep one"
            )
        return turns
    system = column or system_prompt
    if system is None:
        return turns
    return [_text_turn("system", system, "system"), *turns]


def _check_turns(turns: Sequence[_Turn], need_answer: bool) -> None:
    spoken = [turn for turn in turns if turn.message.role not in _SYSTEM_ROLES]
    if not spoken:
        raise UserError(
            f"the conversation has {'only a system turn' if turns else 'no turns'}; remove the row"
        )
    first = spoken[0]
    if first.message.role != "user":
        role = first.message.role
        raise UserError(
            f"`{first.key}` has the role {role}, but a user turn must come first; remove that turn"
        )
    if need_answer and all(turn.message.role != "assistant" for turn in spoken):
        raise UserError(
            "a row without an answer: no assistant turn; see `data.column_mapping`, or remove"
            " the row"
        )


def _check_contents(turns: Sequence[_Turn]) -> None:
    for key, message, _ in turns:
        check_text(message.to_dict(), key)
        is_blank = not message.content.strip() and not message.tool_calls
        if is_blank and message.role in ("user", "assistant"):
            raise UserError(
                f"the {message.role} turn `{key}` is blank; fill it in or remove the row"
            )


def _check_media(key: str, text: str, row: Mapping[str, Any]) -> None:
    """Refuses text with a placeholder for something that another column holds."""
    found = _PLACEHOLDER.search(text)
    if found is None:
        return
    for column, value in row.items():
        if has_value(value) and (column in MEDIA or _is_media(value)):
            raise UserError(
                f"`{key}` has {found.group()}, which stands for the column `{column}`, but only"
                " text is trained; remove the row"
            )


def _is_media(value: object) -> bool:
    """Whether a value is a picture, film or sound of `datasets`, or a list of them."""
    if isinstance(value, list):
        return bool(value) and _is_media(value[0])
    return isinstance(value, dict) and bool(value) and value.keys() <= _MEDIA_KEYS


def _turn_notes(turns: Sequence[_Turn]) -> tuple[str, ...]:
    """Notes neighbouring assistant turns, and keys of turns that are not read."""
    notes: dict[str, None] = {}
    for first, second in pairwise(turns):
        if first.message.role == second.message.role == "assistant":
            notes["neighbours"] = None
    for turn in turns:
        for name in turn.unread:
            notes[f"the key {name!r:.60} of a turn is not read"] = None
    return tuple(notes)
