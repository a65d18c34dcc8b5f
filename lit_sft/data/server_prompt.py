r"""Finds an answer in a text whose history differs from the prompt of a server.

A template may write a message differently once an answer follows. gpt-oss drops the reasoning
behind earlier tool calls, Mistral moves the system prompt to the last user turn, and Gemma 4 adds
an empty thinking block to its generation prompt only:

    prompt   <user>Hi</user><assistant><quiet></quiet>
    whole    <user>Hi</user><assistant>Hello</assistant>

At inference the model answers behind the prompt, so the prompt is what it has to be trained behind.
To find where the answer starts in `whole`, the conversation is rendered again with a marker at the
end of the message before the turn. What follows the marker in both texts, its tail, is the end of
that message, the header of the turn, and in `whole` the answer. The header ends where the tails
part, and before the first character that depends on the turn.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from lit_sft.data.chat_template import ChatTemplate, Switch, WrittenTurn
from lit_sft.data.reasoning import END_OF_THINKING, has_reasoning, opens_thinking
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

_MARKER = "Zq7vXk"
"""Letters and a digit: no template strips or escapes them."""
_TAG = re.compile(r"[<\[][^<>\[\]\s]*[>\]]")


@dataclass(frozen=True, slots=True)
class Tails:
    """The texts behind the message before a turn."""

    prompt: str
    """In the prompt: the end of that message, and the header of the turn."""
    whole: str
    """In the text with the turn: the same, then the answer."""
    common: int
    """Length of what both begin with. It ends before the text that depends on the turn."""
    of_any_turn: str
    """What `whole` begins with, whatever the turn says."""


def answer_start(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    switch: Switch,
    written: WrittenTurn,
) -> int | None:
    """Finds where an answer starts that may follow the prompt of a server.

    Args:
        template: The chat template.
        conversation: Has the turn.
        index: Index of the turn.
        switch: Template variables of the texts.
        written: Both texts of the turn.

    Returns:
        The position in `written.whole`. None if it cannot be found, or if what only the prompt has
        does not fit the answer.
    """
    tails = tails_behind_history(template, conversation, index, switch, written)
    if tails is None:
        return None
    turn = conversation.messages[index]
    start: int | None = tails.common
    if not _answer_follows(template, tails, turn):
        if has_reasoning(turn) and END_OF_THINKING.search(tails.prompt, tails.common):
            # The prompt allows no reasoning.
            return None
        header = _header_of(template, conversation, index, switch, written.prompt)
        start = _end_of_header(template, tails, header)
    if start is None:
        return None
    if not has_reasoning(turn) and _waits_for_reasoning(
        template, conversation, index, switch, written.prompt
    ):
        return None
    return len(written.whole) - len(tails.whole) + start


def _answer_follows(template: ChatTemplate, tails: Tails, turn: Message) -> bool:
    """Whether the answer may follow the prompt directly where both texts part."""
    only_in_prompt = tails.prompt[tails.common :]
    if not only_in_prompt.strip():
        return True
    if not has_reasoning(turn):
        return _is_closed(template, only_in_prompt, tails)
    # Apriel leads in to the reasoning with words, which history lacks.
    is_text = not re.search(_markup(template), only_in_prompt)
    reasoning = (turn.reasoning_content or "").strip()
    return is_text and bool(reasoning) and tails.whole[tails.common :].startswith(reasoning)


def _header_of(
    template: ChatTemplate, conversation: Conversation, index: int, switch: Switch, prompt: str
) -> str:
    """Returns what the generation prompt adds to the messages before a turn; "" if unknown."""
    before = replace(conversation, messages=conversation.messages[:index])
    try:
        text, _ = template.write(before, switch)
    except UserError:
        # Hermes refuses messages that end with the result of a tool.
        return ""
    return prompt[len(text) :] if prompt.startswith(text) else ""


def tails_behind_history(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    switch: Switch,
    written: WrittenTurn,
) -> Tails | None:
    """Finds the texts behind the message before a turn; see `answer_start` for the arguments.

    Returns:
        None if the template does not write that message, or writes it in another form with the
        marker.
    """
    if index == 0:
        return None
    messages = list(conversation.messages)
    before = messages[index - 1]
    messages[index - 1] = replace(before, content=before.content + _MARKER)
    marked = _tails_of(template, replace(conversation, messages=tuple(messages)), index, switch)
    messages[index] = _changed(messages[index])
    changed = _tails_of(template, replace(conversation, messages=tuple(messages)), index, switch)
    if marked is None or changed is None:
        return None
    prompt, whole = marked
    if not written.prompt.endswith(prompt) or not written.whole.endswith(whole):
        return None
    of_any_turn = os.path.commonprefix([whole, changed[1]])
    common = len(os.path.commonprefix([prompt, of_any_turn]))
    return Tails(prompt, whole, _back_to_tag(prompt, of_any_turn, common), of_any_turn)


def _tails_of(
    template: ChatTemplate, marked: Conversation, index: int, switch: Switch
) -> tuple[str, str] | None:
    """Renders a marked conversation, and returns what follows the marker in prompt and whole."""
    try:
        prompt, whole, _ = template.write_turn(marked, index, switch)
    except UserError:
        return None
    # A template may write a message several times. The turn may hold the marker, too, so the
    # markers are counted from the start.
    count = prompt.count(_MARKER)
    if count == 0 or whole.count(_MARKER) < count:
        return None
    return prompt.split(_MARKER, count)[count], whole.split(_MARKER, count)[count]


def _changed(turn: Message) -> Message:
    """Puts the marker before all that a template may write of a turn."""
    calls = turn.tool_calls
    if calls:
        function = {**calls[0]["function"], "name": _MARKER + calls[0]["function"]["name"]}
        calls = ({**calls[0], "function": function}, *calls[1:])
    reasoning = turn.reasoning_content
    return replace(
        turn,
        content=_MARKER + turn.content if turn.content else "",
        reasoning_content=_MARKER + reasoning if reasoning else reasoning,
        tool_calls=calls,
    )


def _back_to_tag(prompt: str, whole: str, common: int) -> int:
    """Moves the end of a common start out of a tag: `<quiet>` and `<answer>` share only `<`."""
    for text in (prompt, whole):
        for tag in _TAG.finditer(text):
            if tag.start() < common < tag.end():
                common = tag.start()
    return common


def _end_of_header(template: ChatTemplate, tails: Tails, header: str) -> int | None:
    """Finds the end of the prompt, from its last tag or special token on, before an answer.

    Both texts may close the message before the turn in different ways, and then write the same
    header. Or history has no header behind the result of a tool, and the answer follows directly
    (Apertus).

    Args:
        template: The chat template.
        tails: The texts behind the message before the turn.
        header: What the generation prompt adds.
    """
    if tails.prompt[tails.common :] == header and _is_special(template, header):
        # What the texts with and without the marker share by chance is its first letters.
        rest = tails.of_any_turn[tails.common :]
        return tails.common if _MARKER.startswith(rest) else None
    markup = re.compile(_markup(template))
    tags = list(markup.finditer(tails.prompt))
    # Other text than markup is no end of a message.
    if not tags or markup.sub("", tails.prompt[: tags[-1].start()]).strip():
        return None
    end = tails.prompt[tags[-1].start() :]
    found = tails.of_any_turn.find(end)
    return None if found < 0 else found + len(end)


def _is_special(template: ChatTemplate, text: str) -> bool:
    """Whether a text has nothing but special tokens."""
    return bool(text) and not template.special.sub("", text).strip()


def _markup(template: ChatTemplate) -> str:
    """Matches special tokens and tags."""
    return rf"{template.special.pattern}|{_TAG.pattern}"


def _is_closed(template: ChatTemplate, block: str, tails: Tails) -> bool:
    """Whether a block has an opening and a closing tag, and the answer does not repeat it.

    A block whose tags delimit turns, too, is no block, but a turn that only the prompt has.
    """
    tags = _TAG.findall(block)
    tags_of_turns = _TAG.findall(tails.prompt[: tails.common])
    if len(tags) < 2 or not set(tags).isdisjoint(tags_of_turns):
        return False
    answer = tails.whole[tails.common :]
    # Some templates write the next prompt behind every text (Command R7B).
    closing = template.closing.search(answer)
    return tags[-1] not in (answer if closing is None else answer[: closing.start()])


def _waits_for_reasoning(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    switch: Switch,
    prompt: str,
) -> bool:
    """Whether the template would write reasoning directly behind the prompt."""
    if opens_thinking(template, prompt):
        return True
    messages = list(conversation.messages)
    messages[index] = replace(messages[index], reasoning_content=_MARKER)
    try:
        _, whole, _ = template.write_turn(
            replace(conversation, messages=tuple(messages)), index, switch
        )
    except UserError:
        return False
    return whole.startswith(prompt) and whole[len(prompt) :].lstrip().startswith(_MARKER)
