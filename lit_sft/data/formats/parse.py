"""A row of any known format -> `Conversation`. Pure functions: no file, no tokenizer, no chat template.

Errors say what is wrong with the row and how to mend it; the caller, who knows file and line, puts the place in front.
A key that is null counts as absent, because Arrow fills the fields that a row does not have with null.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from string import Formatter
from typing import Any

from lit_sft.data.formats.columns import FIRST_COLUMNS, FORMATS, answer_column, counted, unread
from lit_sft.data.formats.values import (
    as_object,
    check_text,
    kind,
    listed,
    parsed_messages,
    reasoning,
    required,
    text_of,
    tool_calls,
    tool_schemas,
    typed,
)
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

ROLES = ("system", "developer", "user", "assistant", "tool")

_SPEAKER_ROLES = (
    {"system": "system", "developer": "developer", "function_call": "function_call", "tool_call": "function_call"}
    | dict.fromkeys(("human", "user"), "user")
    | dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "model", "bot"), "assistant")
    | dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool")
)

_Turn = tuple[str, Message]  # the key that the turn was read from, for error messages, and the turn


def detect_format(
    rows: Sequence[Mapping[str, Any]], column_mapping: Mapping[str, str] | None, prompt_template: str | None
) -> tuple[str, str]:
    """Decide `format: auto` from the columns that the first rows fill: (format, a sentence for the log that says why).

    Raises:
        UserError: No known format has these columns.
    """
    if prompt_template is not None:
        return "prompt_completion", "format prompt_completion, because `data.prompt_template` is set"
    columns = {name: None for row in rows for name in row}
    columns |= {name: value for row in rows for name, value in row.items() if value is not None}
    columns = as_object(_rename(columns, column_mapping), "rows")
    first = next((name for name in FIRST_COLUMNS if name in columns), None)
    if first is None:
        raise UserError(
            f"no format fits the columns {listed(columns)}: {listed(FORMATS)} start from {listed(FIRST_COLUMNS)}; see "
            "`data.column_mapping` (such as {question: prompt, answer: completion}) and `data.format`"
        )
    return FIRST_COLUMNS[first], f"format {FIRST_COLUMNS[first]}, because the rows have the column `{first}`"


def report_unread(
    rows: Sequence[Mapping[str, Any]],
    format: str,
    column_mapping: Mapping[str, str] | None,
    prompt_template: str | None,
) -> list[str]:
    """A line for the log about columns of the first rows that nothing reads; none if all are read or empty.

    Raises:
        UserError: The template is broken.
    """
    fields = () if prompt_template is None else template_fields(prompt_template)
    names = unread(rows, format, column_mapping or {}, fields)
    return [f"columns that are not read: {listed(names)}"] if names else []


def to_conversation(
    row: Mapping[str, Any],
    *,
    format: str,
    column_mapping: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    need_answer: bool = True,
) -> Conversation:
    """Read one row.

    Args:
        row: Column -> value, as JSON or Arrow gives it.
        format: One of `FORMATS`.
        column_mapping: {column of the row: column of the format}, applied before anything else.
        prompt_template: Text with {column} fields that becomes the user turn. The answer is the first of the columns
            completion, output, answer, response that the template does not use itself.
        system_prompt: Put first where the conversation has no system turn.
        need_answer: False for prediction: a row may end with the question, and an empty last answer counts as none.

    Raises:
        UserError: The row does not fit; the message names neither file nor row number.
    """
    if format not in FORMATS:
        raise UserError(f"`data.format` is {format!r}, expected one of auto, {listed(FORMATS)}")
    if prompt_template is not None and format not in ("alpaca", "prompt_completion"):
        raise UserError(f"`data.prompt_template` fills in columns, but `data.format` is {format}; unset one of them")
    row = as_object(_rename(row, column_mapping), "row")
    if format == "text":
        if not (text := typed(required(row, "text"), str, "text")).strip():
            raise UserError("`text` is blank; remove the row")
        check_text(text, "text")
        return Conversation(messages=(), text=text)
    turns = _READERS[format](row) if prompt_template is None else _read_template(row, prompt_template)
    has_system = any(message.role in ("system", "developer") for _, message in turns)
    if has_system and row.get("system"):
        raise UserError(f"the column `system` and the turn `{turns[0][0]}` are both system prompts; keep one")
    if not has_system and (system := row.get("system") or system_prompt) is not None:
        turns = [_turn("system", system, "system"), *turns]
    if not need_answer and turns and turns[-1][1] == Message("assistant", ""):
        turns = turns[:-1]
    _check_turns(turns, need_answer)
    fields = () if prompt_template is None else template_fields(prompt_template)
    blank = tuple(name for name in fields if row[name] == "")
    messages = tuple(message for _, message in turns)
    return Conversation(messages, tool_schemas(row.get("tools") or []), blank=blank, notes=counted(row, fields))


def conversation_to_prompt(conversation: Conversation) -> tuple[Conversation, str | None]:
    """Take off the last turn where it is the assistant's: (what is asked, the expected answer or None).

    A turn that its own flag keeps out of training is no expected answer. That of one that only calls tools is empty.
    """
    if conversation.messages and (last := conversation.messages[-1]).role == "assistant":
        asked = Conversation(conversation.messages[:-1], conversation.tools)
        return asked, None if last.train is False else last.content
    return conversation, None


def _rename(row: Mapping[str, Any], column_mapping: Mapping[str, str] | None) -> dict[str, Any]:
    mapping = column_mapping or {}
    if missing := [column for column in mapping if column not in row]:
        raise UserError(f"`data.column_mapping` names `{missing[0]}`, but the columns are {listed(row)}")
    renamed = {mapping.get(column, column): value for column, value in row.items()}
    if len(renamed) < len(row):
        raise UserError(f"`data.column_mapping` gives two of the columns {listed(row)} one name; choose other names")
    return renamed


def _read_turns(row: Mapping[str, Any], column: str, role: str = "", train: bool | None = None) -> list[_Turn]:
    """The list of turns in a column; with `role` a plain string is one turn of that role."""
    value = required(row, column)
    if role and not isinstance(value, list):
        return [_turn(role, value, column)]
    turns = enumerate(typed(value, list, column))
    return [(key := f"{column}[{i}]", _message(turn, key, train)) for i, turn in turns]


def _read_sharegpt(row: Mapping[str, Any]) -> list[_Turn]:
    turns = []
    for i, value in enumerate(typed(required(row, "conversations"), list, "conversations")):
        turn = as_object(value, key := f"conversations[{i}]")
        speaker = required(turn, name := "from" if "from" in turn else "role", f"{key}.from")
        if (role := _SPEAKER_ROLES.get(str(speaker))) is None:
            raise UserError(f"`{key}.{name}` is {speaker!r:.40}, expected one of {listed(_SPEAKER_ROLES)}")
        if "value" in turn:
            turn["content"] = typed(turn["value"], str, f"{key}.value")
        if role == "function_call":
            role, turn["tool_calls"] = "assistant", turn.pop("content", None)
        turns.append((key, _message({**turn, "role": role}, key)))
    return turns


def _read_alpaca(row: Mapping[str, Any]) -> list[_Turn]:
    turns: list[_Turn] = []
    for i, pair in enumerate(typed(row.get("history") or [], list, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"`history[{i}]` is {kind(pair)}, expected a pair [question, answer]")
        turns += [_turn("user", pair[0], f"history[{i}][0]"), _turn("assistant", pair[1], f"history[{i}][1]")]
    parts = typed(required(row, "instruction"), str, "instruction"), typed(row.get("input", ""), str, "input")
    turns.append(_turn("user", "\n".join(filter(None, parts)), "instruction"))
    return [*turns, _turn("assistant", row["output"], "output")] if "output" in row else turns


def _read_prompt_completion(row: Mapping[str, Any]) -> list[_Turn]:
    """Only the completion is trained: an assistant turn inside the prompt is not, unless its own flag says so."""
    if (messages := parsed_messages(required(row, "prompt"), ROLES)) is not None:
        answer = parsed_messages(row.get("completion"), ROLES)
        row = {**row, "prompt": messages} | ({} if answer is None else {"completion": answer})
    prompt = _read_turns(row, "prompt", "user", train=False)
    completion = _read_turns(row, "completion", "assistant") if "completion" in row else []
    if any(message.role not in ("assistant", "tool") for _, message in completion):
        raise UserError("`completion` has turns of other roles than assistant and tool; move them to `prompt`")
    return prompt + completion


def _read_template(row: Mapping[str, Any], template: str) -> list[_Turn]:
    fields = template_fields(template)
    for name in fields:
        if not isinstance(value := required(row, name, f"data.prompt_template {{{name}}}"), str | int | float):
            raise UserError(f"`{name}` is {kind(value)}, but `data.prompt_template` fills in strings and numbers")
    prompt = _turn("user", template.format_map(row), "data.prompt_template")
    return [prompt, *(_turn("assistant", row[name], name) for name in answer_column(row, fields))]


@lru_cache(maxsize=8)
def template_fields(template: str) -> tuple[str, ...]:
    """Columns that a template fills in.

    Raises:
        UserError: It is broken, or has none.
    """
    try:
        fields = {name: bool(spec or cast) for _, name, spec, cast in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UserError(f"`data.prompt_template` is broken: {error}; write {{{{ and }}}} for plain braces") from None
    if not fields or any(formatted or re.search(r"^\d*$|[.\[\]]", name) for name, formatted in fields.items()):
        raise UserError("`data.prompt_template` needs plain {column} fields and nothing else in braces; {{ is a brace")
    return tuple(fields)


_READERS: dict[str, Callable[[dict[str, Any]], list[_Turn]]] = {
    "messages": partial(_read_turns, column="messages"),
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def _message(value: object, key: str, train: bool | None = None) -> Message:
    """One turn in OpenAI's shape; `train` is what an assistant turn gets that has no `weight` or `train` of its own."""
    raw = as_object(value, key)
    if (role := required(raw, "role", f"{key}.role")) not in ROLES:
        raise UserError(f"`{key}.role` is {role!r:.40}, expected one of {listed(ROLES)}")
    calls = tool_calls(raw.get("tool_calls", []), f"{key}.tool_calls")
    if calls and role != "assistant":
        raise UserError(f"`{key}.tool_calls` is in a {role} turn, but only the assistant calls tools")
    flag = raw.get("weight", raw.get("train"))
    if flag not in (None, 0, 1) or (flag and role != "assistant"):
        raise UserError(f"`{key}` ({role}) has the weight {flag!r:.40}, expected 0 or 1, and 1 only in assistant turns")
    train = None if role != "assistant" else train if flag is None else bool(flag)
    old_call = raw.get("function_call")
    if not calls and (any(old_call.values()) if isinstance(old_call, dict) else old_call):
        raise UserError(f"`{key}.function_call` is a call in an old form that is not read; write it as `tool_calls`")
    texts = {name: typed(raw[name], str, f"{key}.{name}") for name in ("name", "tool_call_id") if name in raw}
    content = raw.get("content", "") if calls else required(raw, "content", f"{key}.content")
    content = text_of(content, f"{key}.content")
    return Message(role, content, reasoning(raw, key), tool_calls=calls or None, train=train, **texts)


def _turn(role: str, text: object, key: str) -> _Turn:
    return key, Message(role, typed(text, str, key))


def _check_turns(turns: list[_Turn], need_answer: bool) -> None:
    spoken = [(key, message) for key, message in turns if message.role not in ("system", "developer")]
    if not spoken:
        raise UserError(f"the conversation has {'only a system turn' if turns else 'no turns'}; remove the row")
    if (role := spoken[0][1].role) != "user":
        raise UserError(f"`{spoken[0][0]}` has the role {role}, but a user turn must come first; remove that turn")
    if need_answer and all(message.role != "assistant" for _, message in spoken):
        raise UserError("a row without an answer: no assistant turn; see `data.column_mapping`, or remove the row")
    for key, message in turns:
        check_text(message.to_dict(), key)
        if message.role in ("user", "assistant") and not message.content.strip() and not message.tool_calls:
            raise UserError(f"the {message.role} turn `{key}` is blank; fill it in or remove the row")
