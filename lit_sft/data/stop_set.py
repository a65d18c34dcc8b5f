"""The tokens at which a server has to stop for a chat template, whatever the training data has.

They are found by rendering short conversations: an answer that nothing follows, one that the user
follows, and one that calls a tool.
"""

from __future__ import annotations

from typing import NamedTuple

from lit_sft.data.chat_template import ChatTemplate
from lit_sft.data.stops import end_before_next
from lit_sft.data.tokenize import Renderer
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

_QUESTION = Message("user", "Hello")
_ANSWER = Message("assistant", "Hi")
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "Does it.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}


class StopSet(NamedTuple):
    """Ids of stop tokens."""

    turn_ends: frozenset[int]
    """What ends a plain answer. If it is one token, it may become the eos token of an export."""
    all: frozenset[int]
    """The same, and what ends a turn with calls, or an answer in the history."""


def stop_set(renderer: Renderer) -> StopSet:
    """Finds the stop tokens of a chat template; none where the template cannot write a probe."""
    plain = Conversation((_QUESTION, _ANSWER))
    calling = Conversation((_QUESTION, Message("assistant", "", tool_calls=(_CALL,))), (_TOOL,))
    turn_ends = _stop_ids(renderer, plain)
    role = _ids(renderer, _begin_of_user(renderer.template))
    if turn_ends & role:
        # GLM: an eos token that begins messages would be wrong for every other use of the export.
        turn_ends |= _ids(renderer, {str(renderer.tokenizer.eos_token)})
    in_history = _ids(renderer, _end_in_history(renderer.template, plain))
    return StopSet(turn_ends, turn_ends | _stop_ids(renderer, calling) | in_history)


def _stop_ids(renderer: Renderer, conversation: Conversation) -> frozenset[int]:
    """Returns the stop tokens of the turns of a conversation."""
    [result] = renderer.render([conversation], [0])
    if isinstance(result, UserError):
        return frozenset()
    return frozenset(token for example in result for token in example.stop_ids)


def _ids(renderer: Renderer, tokens: set[str]) -> frozenset[int]:
    vocabulary = renderer.tokenizer.get_vocab()
    return frozenset(vocabulary[token] for token in tokens if token in vocabulary)


def _begin_of_user(template: ChatTemplate) -> set[str]:
    """Returns the special token directly before the content of a user's message."""
    try:
        text, _ = template.write(Conversation((_QUESTION,)))
    except UserError:
        return set()
    before, _, _ = text.partition(_QUESTION.content)
    _, token = _without_closing(template, before)
    return set(template.special.findall(token)[-1:])


def _end_in_history(template: ChatTemplate, conversation: Conversation) -> set[str]:
    """Returns the token that ends an answer only where the user has replied.

    Olmo 3 ends the last answer with eos, and earlier ones with another token. A model that was
    trained on whole conversations emits either. A token that also stands inside of answers
    (`<|end|>` of gpt-oss) is no stop token.
    """
    try:
        text, _ = template.write(conversation)
    except UserError:
        return set()
    body, at_end = _without_closing(template, text)
    end = end_before_next(template, body, conversation, len(conversation.messages) - 1)
    if end is None or end.stop in at_end or _stands_inside(template, end.stop):
        return set()
    return {end.stop}


def _without_closing(template: ChatTemplate, text: str) -> tuple[str, str]:
    """Splits a text before the special tokens at its end."""
    closing = template.closing.search(text)
    if closing is None:
        return text, ""
    return text[: closing.start()], closing.group()


def _stands_inside(template: ChatTemplate, token: str) -> bool:
    """Whether a template writes a token between the parts of one answer."""
    thought = Message("assistant", "Hi", reasoning_content="Hm")
    try:
        prompt, whole, _ = template.write_turn(Conversation((_QUESTION, thought)), 1)
    except UserError:
        return False
    answer, _ = _without_closing(template, whole[len(prompt) :])
    return token in answer
