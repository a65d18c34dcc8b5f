r"""Turns behind a prompt that opens a thinking block, where the template writes history without it.

The model has to fill the block. Two kinds of turns do not show how:

- A turn with reasoning that the template never writes (DeepSeek R1). It is put into the block, as
  the model would generate it:

      prompt    <user>Hi<assistant><think>\n
      whole     <user>Hi<assistant>Hello<eos>
      trained                              Hm\n</think>\n\nHello<eos>

- A turn without reasoning, for which the template itself writes an empty block. To train the end of
  the block would teach the model to think nothing, so the answer is trained behind it:

      prompt    <user>Hi<assistant><think>\n
      whole     <user>Hi<assistant><think>\n\n</think>\n\nHello<eos>
      trained                                             Hello<eos>
"""

from __future__ import annotations

from dataclasses import replace

from lit_sft.data.chat_template import ChatTemplate, Switch, WrittenTurn
from lit_sft.data.reasoning import (
    END_OF_THINKING,
    closing_tag,
    opened_block,
    split_content,
    starts_thinking,
)
from lit_sft.data.server_prompt import tails_behind_history
from lit_sft.types import Conversation, Message


def with_reasoning(
    template: ChatTemplate, conversation: Conversation, index: int, switch: Switch
) -> tuple[WrittenTurn, str] | None:
    """Puts the reasoning of a turn into the thinking block that its prompt opens.

    Args:
        template: The chat template.
        conversation: Has the turn.
        index: Index of the turn.
        switch: Template variables of the texts.

    Returns:
        The turn with its reasoning, and the text without it, as the template writes it. None if
        the turn has no reasoning, the prompt opens no block, or the template writes reasoning.

    Raises:
        UserError: The template refuses the messages.
    """
    parts = _without_reasoning(conversation.messages[index])
    if parts is None:
        return None
    bare_message, reasoning = parts
    messages = list(conversation.messages)
    messages[index] = bare_message
    bare = replace(conversation, messages=tuple(messages))
    written = template.write_turn(bare, index, switch)
    opening = opened_block(template, written.prompt)
    closing = closing_tag(opening.rstrip()) if opening else ""
    if not closing or closing not in str(template.text):
        return None
    messages[index] = replace(bare_message, reasoning_content=reasoning)
    apart, _ = template.write(replace(conversation, messages=tuple(messages[: index + 1])), switch)
    if apart.count(reasoning) > written.whole.count(reasoning):
        return None
    start = _answer_behind_tag(template, bare, index, switch, written, opening)
    if start is None:
        return None
    filled = written.prompt + reasoning + _closing(written.whole[start:], opening, closing)
    shift = len(filled) - start
    marks = []
    for first, last in written.marks:
        # The reasoning belongs to the mark that the answer begins in.
        begin = len(written.prompt) if first <= start < last else first + shift
        marks.append((begin, last + shift))
    whole = filled + written.whole[start:]
    return WrittenTurn(written.prompt, whole, marks), written.whole


def _closing(answer: str, opening: str, closing: str) -> str:
    """Returns what stands between reasoning and answer, unless the answer begins with it."""
    # A tag on a line of its own has its text on other lines.
    line = "\n" if "\n" in opening else ""
    if END_OF_THINKING.match(answer):
        return line
    if END_OF_THINKING.match(answer.lstrip()):
        return ""
    return line + closing + line * 2


def _without_reasoning(turn: Message) -> tuple[Message, str] | None:
    """Splits a turn into the turn without reasoning, and its reasoning; None if it has none."""
    reasoning = (turn.reasoning_content or "").strip()
    if reasoning:
        return replace(turn, reasoning_content=None), reasoning
    block = split_content(turn.content)
    if block is None or not block[1]:
        return None
    _, reasoning, _, answer = block
    return replace(turn, content=answer, reasoning_content=None), reasoning


def _answer_behind_tag(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    switch: Switch,
    written: WrittenTurn,
    opening: str,
) -> int | None:
    """Finds what follows the opened block in a text whose template writes no reasoning."""
    start = len(written.prompt)
    if not written.whole.startswith(written.prompt):
        tails = tails_behind_history(template, conversation, index, switch, written)
        # Apart from the tag, the text has to continue the prompt.
        if tails is None or tails.prompt[tails.common :] != opening:
            return None
        start = len(written.whole) - len(tails.whole) + tails.common
    return None if starts_thinking(written.whole[start:]) else start


def behind_empty_block(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    switch: Switch,
    written: WrittenTurn,
) -> int | None:
    """Finds the answer behind an empty thinking block that its prompt opens.

    Args:
        template: The chat template.
        conversation: Has the turn.
        index: Index of the turn.
        switch: Template variables of the texts.
        written: Both texts of the turn.

    Returns:
        Where the answer starts in `written.whole`. None if the text has no such block.
    """
    prompt, whole, _ = written
    if not opened_block(template, prompt) or not whole.startswith(prompt):
        return None
    rest = whole[len(prompt) :]
    closing = END_OF_THINKING.match(rest.lstrip())
    if closing is None:
        return None
    answer = rest.lstrip()[closing.end() :].lstrip()
    start = len(whole) - len(answer)
    # White space at the start of the content belongs to the answer.
    tails = tails_behind_history(template, conversation, index, switch, written)
    if tails is None:
        return start
    return min(start, len(whole) - len(tails.whole) + len(tails.of_any_turn))
