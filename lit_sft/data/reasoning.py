"""Reasoning of an assistant turn: in a field of its own, or inside the content.

Some templates take a `<think>` block out of the content and write it as they write
`reasoning_content` (Qwen3). Others leave it in the content, behind a thinking block of their own
(Kimi K2, DeepSeek V3.2): the model would learn to think nothing, and to answer with thoughts. For
these the block is moved to `reasoning_content` before the conversation is rendered.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from lit_sft.data.chat_template import ChatTemplate
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

END_OF_THINKING = re.compile(r"[<\[]\|?(?:/|end)[\w:|]*think[\w:|]*[>\]]", re.IGNORECASE)
"""Closing tag of a thinking block: `</think>`, `[/THINK]`, `</thinking>`, `<|END_THINKING|>`."""
_START_OF_THINKING = re.compile(r"[<\[](?!\|?end)[\w:|]*think[\w:|]*[>\]]", re.IGNORECASE)
"""Opening tag of a thinking block: `<think>`, `[THINK]`, `<|think|>`, `<|START_THINKING|>`."""
MOVED = "moved:reasoning"
"""Note on a row whose reasoning was moved out of the content."""
_REASON = "Zq7 reason"
_ANSWER = "Zq7 answer"


def has_reasoning(message: Message) -> bool:
    """Whether a message has reasoning, in its own field or in the content."""
    return (
        bool((message.reasoning_content or "").strip())
        or END_OF_THINKING.search(message.content) is not None
    )


def opens_thinking(template: ChatTemplate, prompt: str) -> bool:
    """Whether a prompt ends with the opening tag of a thinking block."""
    return bool(opened_block(template, prompt))


def opened_block(template: ChatTemplate, prompt: str) -> str:
    r"""Returns the end of a prompt from the tag on that opens a thinking block: `<think>\n`.

    It is empty if the prompt does not end with such a tag.
    """
    if template.is_raw:
        return ""
    tags = list(_START_OF_THINKING.finditer(prompt, max(0, len(prompt) - 50)))
    if not tags or prompt[tags[-1].end() :].strip():
        return ""
    return prompt[tags[-1].start() :]


def closing_tag(opening: str) -> str:
    """Returns the closing tag of a thinking block: `</think>` for `<think>`.

    Args:
        opening: `<think>`, `[THINK]`, `<|START_THINKING|>`, ...
    """
    if "START" in opening:
        return opening.replace("START", "END")
    return f"{opening[0]}/{opening[1:]}"


def starts_thinking(answer: str) -> bool:
    """Whether an answer begins with the opening tag of a thinking block."""
    return _START_OF_THINKING.match(answer.lstrip()) is not None


def split_content(content: str) -> tuple[str, str, str, str] | None:
    """Splits a content that begins with reasoning.

    Returns:
        The opening tag, the reasoning, the closing tag, and the answer. The opening tag may be
        empty: the prompts of some models end with it. None if there is no such block.
    """
    closing = END_OF_THINKING.search(content)
    if closing is None:
        return None
    reasoning = content[: closing.start()]
    opening = _START_OF_THINKING.search(reasoning)
    open_tag = ""
    if opening is not None:
        if reasoning[: opening.start()].strip():
            return None
        open_tag = opening.group()
        reasoning = reasoning[opening.end() :]
    return open_tag, reasoning.strip(), closing.group(), content[closing.end() :].lstrip()


def move_reasoning(template: ChatTemplate, conversation: Conversation) -> Conversation:
    """Moves leading reasoning from the content to `reasoning_content` where the template needs it.

    Args:
        template: The chat template.
        conversation: The row.

    Returns:
        The conversation itself if nothing is to be moved.
    """
    messages = tuple(_moved(template, message) for message in conversation.messages)
    if messages == conversation.messages:
        return conversation
    return replace(conversation, messages=messages)


def _moved(template: ChatTemplate, message: Message) -> Message:
    if message.role != "assistant" or (message.reasoning_content or "").strip():
        return message
    block = split_content(message.content)
    if block is None:
        return message
    open_tag, reasoning, close_tag, answer = block
    if not _leaves_it_in_content(template, open_tag, close_tag):
        return message
    return replace(message, content=answer, reasoning_content=reasoning or None)


@lru_cache(maxsize=64)
def _leaves_it_in_content(template: ChatTemplate, open_tag: str, close_tag: str) -> bool:
    """Whether a template writes reasoning, but not in the same way if it is in the content."""
    question = Message("user", ".")
    if not open_tag and not _opens_every_prompt(template, question):
        # A closing tag alone is part of the answer, unless the prompt holds the opening one.
        return False
    apart = Message("assistant", _ANSWER, reasoning_content=_REASON)
    inside = Message("assistant", f"{open_tag}\n{_REASON}\n{close_tag}\n\n{_ANSWER}")
    for switch in template.switches:
        try:
            text_apart, _ = template.write(Conversation((question, apart)), switch)
            text_inside, _ = template.write(Conversation((question, inside)), switch)
        except UserError:
            continue
        if _REASON in text_apart and text_apart != text_inside:
            return True
    return False


def _opens_every_prompt(template: ChatTemplate, question: Message) -> bool:
    try:
        prompt, _ = template.write(Conversation((question,)), generation_prompt=True)
    except UserError:
        return False
    return opens_thinking(template, prompt)
