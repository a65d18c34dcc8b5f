r"""Finds the token that ends an assistant turn: what the model has to emit, and a server stops at.

Most templates end each turn with a special token. Some leave the last turn open, because a turn
ends where the next role begins (GLM), or because the end is written only when another message
follows (Apertus). What the model has to emit is then read from the conversation with a next
message:

    last          <|user|>\nHi<|assistant|>\nHello
    with a next   <|user|>\nHi<|assistant|>\nHello<|user|>\n.
                                                  ^ stop

A turn that calls tools is followed by their results, any other turn by the user.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import NamedTuple

from lit_sft.data.chat_template import ChatTemplate, Switch
from lit_sft.data.reasoning import END_OF_THINKING
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

_LONGEST_CLOSING = 300
"""Longest run of special tokens and white space at the end of a text, in characters."""
_NEXT = "Zq7vXk"
"""Content of a next message: no template strips or escapes it."""


class TurnEnd(NamedTuple):
    """Where a turn ends."""

    text: str
    """The rendered text. It ends with the stop token if the template leaves the turn open."""
    at: int
    """Position of the stop token."""
    stop: str
    """The stop token."""


def find_end(
    template: ChatTemplate,
    text: str,
    conversation: Conversation,
    index: int,
    switch: Switch = (),
    start: int = 0,
) -> TurnEnd:
    """Finds the stop token of the turn `messages[index]`.

    Args:
        template: The chat template.
        text: The rendered conversation up to this turn.
        conversation: The conversation; it may continue after the turn.
        index: Index of the turn.
        switch: Template variables of the text.
        start: Where the answer starts in the text.

    Raises:
        UserError: The template writes no stop token, not even before a next message.
    """
    closing = template.closing.search(text, max(start, len(text) - _LONGEST_CLOSING))
    if closing is None:
        end = end_before_next(template, text, conversation, index, switch, start)
        if end is None:
            raise UserError(
                f"the chat template leaves turn {index + 1} (assistant) open: {text[-20:]!r} does"
                " not end with a special token of the tokenizer, and none begins the next message,"
                " so the model would not learn to stop; set data.chat_template to a template that"
                " ends turns with one the tokenizer has as a special token"
            )
        return end
    found = list(template.special.finditer(text, closing.start()))
    stop = found[0]
    if len(found) > 1:
        stop = _last_of_turn(template, text, found, conversation, index, switch)
    return TurnEnd(text, stop.start(), stop.group())


def end_before_next(
    template: ChatTemplate,
    text: str,
    conversation: Conversation,
    index: int,
    switch: Switch = (),
    start: int = 0,
) -> TurnEnd | None:
    """Finds the special token between a turn and a next message; see `find_end` for the arguments.

    The template may write the turn differently when a message follows (GLM drops its reasoning),
    so the token is searched for behind the longest end that both texts of the turn share.

    Returns:
        None if there is no such token directly behind the turn.
    """
    body = text[:start] + text[start:].rstrip()
    history = _with_next(template, conversation, index, switch)
    if history is None or len(body) == start:
        return None
    best = 0
    end = None
    for token in template.special.finditer(history, max(0, len(history) - _LONGEST_CLOSING)):
        before = history[: token.start()]
        shared = _common_suffix(before.rstrip(), body)
        # Of equal ones, the last belongs to the turn, and the others to earlier turns.
        if shared and shared >= best:
            best = shared
            gap = before[len(before.rstrip()) :]
            end = TurnEnd(body + gap + token.group(), len(body + gap), token.group())
    # A shorter match is a coincidence: `.` ends other messages, too.
    content = END_OF_THINKING.split(conversation.messages[index].content)[-1].strip()
    return end if best >= min(len(content), len(body) - start) else None


def _with_next(
    template: ChatTemplate, conversation: Conversation, index: int, switch: Switch
) -> str | None:
    """Renders a turn with the next message that it asks for, up to the content of that message."""
    turn = conversation.messages[index]
    following = conversation.messages[index + 1 : index + 2]
    followed_by_tool = bool(following) and following[0].role == "tool"
    if turn.tool_calls or followed_by_tool:
        next_messages = _results(turn)
    else:
        next_messages = [Message("user", _NEXT)]
    messages = (*conversation.messages[: index + 1], *next_messages)
    try:
        history, _ = template.write(replace(conversation, messages=messages), switch)
    except UserError:
        return None
    before, marker, _ = history.partition(_NEXT)
    return before if marker else None


def _results(turn: Message) -> list[Message]:
    """Makes a result for each call of a turn; one if its calls stand in the content."""
    results = []
    for call in turn.tool_calls or ():
        name = call["function"]["name"]
        results.append(Message("tool", _NEXT, name=name, tool_call_id=call.get("id")))
    return results or [Message("tool", _NEXT)]


def _common_suffix(first: str, second: str) -> int:
    """Returns the length of what both texts end with."""
    return len(commonprefix([first[::-1], second[::-1]]))


def _last_of_turn(
    template: ChatTemplate,
    text: str,
    found: list[re.Match[str]],
    conversation: Conversation,
    index: int,
    switch: Switch,
) -> re.Match[str]:
    """Chooses the stop token among the special tokens at the end of `text`.

    Some templates end a turn with several special tokens (DeepSeek's tool calls), others add eos
    after the whole text (Phi-3). So the conversation is rendered once more with a following
    message. A token that is still there belongs to the turn. The last such token is the stop token.
    """
    message = conversation.messages[index]
    if not message.content.strip() and not message.tool_calls:
        raise UserError(f"turn {index + 1} (assistant) is blank; fill it in or remove the row")
    if not message.tool_calls:
        found = _without_own(template, message, found)
    found = _up_to_eos(template, found)
    following = _following(conversation.messages, index)
    history, _ = template.write(
        replace(conversation, messages=(*conversation.messages[: index + 1], *following)), switch
    )
    before = max(0, found[0].start() - 100)
    for match in reversed(found):
        if text[before : match.end()] in history:
            return match
    return found[0]


def _without_own(
    template: ChatTemplate, message: Message, found: list[re.Match[str]]
) -> list[re.Match[str]]:
    """Drops the special tokens that come from the content of the message itself."""
    own = template.closing.search(message.content)
    if own is None:
        return found
    tokens = template.special.findall(own.group())
    if [match.group() for match in found[: len(tokens)]] != tokens:
        return found
    return found[len(tokens) :] or found


def _up_to_eos(template: ChatTemplate, found: list[re.Match[str]]) -> list[re.Match[str]]:
    """Drops the special tokens behind eos: Cohere's templates always write another header."""
    for i, match in enumerate(found):
        if match.group() == template.tokenizer.eos_token:
            return found[: i + 1]
    return found


def _following(messages: Sequence[Message], index: int) -> Sequence[Message]:
    """Returns the next message; after the last turn, messages that could follow."""
    if index + 1 < len(messages):
        return messages[index + 1 : index + 2]
    calls = messages[index].tool_calls
    if not calls:
        return [Message("user", ".")]
    return [
        Message("tool", ".", name=call["function"]["name"], tool_call_id=call.get("id"))
        for call in calls
    ]
