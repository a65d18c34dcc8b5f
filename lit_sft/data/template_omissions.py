"""Notes on parts of a row that the chat template does not write, so that the model never sees them.

The notes of all rows are counted and logged (see `stats`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

from lit_sft.data.chat_template import ChatTemplate, without_date
from lit_sft.data.reasoning import END_OF_THINKING, split_content
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

_COMMANDS = re.compile(r"/(?:no_?think|think|system_override)\b")
"""Commands in a message that a template obeys and removes (SmolLM3, Nemotron)."""
_ESCAPES = re.compile(r"""\\+[nrtfb]?|["']""")
"""Characters that JSON and Python escape, at any depth of nesting."""


def of_answer(message: Message, answer: str, number: int) -> tuple[str, ...]:
    """Notes the reasoning and the content of an assistant turn that its text lacks.

    Args:
        message: The turn.
        answer: The text that the template writes for it.
        number: Number of the turn, for messages.

    Raises:
        UserError: A tool call or the whole content is missing. Without it, the model would learn
            an empty answer.
    """
    for call in message.tool_calls or ():
        name = call["function"]["name"]
        if name not in answer:
            raise UserError(
                f"turn {number} (assistant) calls {name!r}, which the chat template does not write;"
                " set data.chat_template to a template with tool calls, or remove the row"
            )
    notes = []
    if not _writes_reasoning(message, answer):
        notes.append("left_out:reasoning_content")
    # A template may take reasoning out of the content and write it in its own way.
    content = message.content.strip()
    if content and not answer.strip():
        raise UserError(
            f"turn {number} (assistant) has a content that the chat template does not write; set"
            " data.chat_template to one that writes it, or remove the row"
        )
    if content not in answer and END_OF_THINKING.split(content)[-1].strip() not in answer:
        notes.append("left_out:content")
    return tuple(notes)


def _writes_reasoning(message: Message, answer: str) -> bool:
    """Whether the text of an answer has all reasoning of its message."""
    if (message.reasoning_content or "").strip() not in answer:
        return False
    block = split_content(message.content)
    return block is None or block[1] in answer


def of_conversation(
    template: ChatTemplate, conversation: Conversation, texts: Sequence[str]
) -> tuple[str, ...]:
    """Notes the tools and the turns of other roles than assistant that no text contains.

    Args:
        template: Wrote the texts.
        conversation: The row.
        texts: Several if the template rewrites history: each lacks some turns by design.
    """
    notes = []
    for message in conversation.messages:
        if message.role != "assistant" and not _is_written(message.content, texts):
            notes.append(f"left_out:{message.role}_turn")
    if conversation.tools:
        if not _writes_tools(template, conversation):
            notes.append("left_out:tools")
        if _has_other_template_for_tools(template):
            notes.append("other_template")
    return tuple(dict.fromkeys(notes))


def _is_written(content: str, texts: Sequence[str]) -> bool:
    """Whether a text contains this content, perhaps with the changes that templates make."""
    content = content.strip()
    if any(content in text for text in texts):
        return True
    # Templates write the results of tools as JSON.
    escaped = [json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1]]
    if any(form in text for form in escaped for text in texts):
        return True
    parts = [_plain(part) for part in _COMMANDS.split(content)]
    return any(all(part in _plain(text) for part in parts) for text in texts)


@lru_cache(maxsize=8)
def _plain(text: str) -> str:
    """Removes what templates change in a text: white space, case and escapes."""
    return " ".join(_ESCAPES.sub(" ", html.unescape(text).casefold()).split())


def _writes_tools(template: ChatTemplate, conversation: Conversation) -> bool:
    """Whether the prompt of the first answer names a tool.

    Later prompts do not count: calls and their results name tools, too.
    """
    functions = [tool["function"] for tool in conversation.tools or ()]
    names = [str(function.get("name", "")) for function in functions if isinstance(function, dict)]
    messages = tuple(takewhile(lambda message: message.role != "assistant", conversation.messages))
    prompt, _ = template.write(Conversation(messages, conversation.tools), generation_prompt=True)
    found = [name for name in names if name in prompt]
    if any(name in message.content for name in found for message in messages):
        # The name may be the user's word, so the tools must make a difference.
        without_tools, _ = template.write(Conversation(messages), generation_prompt=True)
        return prompt != without_tools
    return bool(found)


def _has_other_template_for_tools(template: ChatTemplate) -> bool:
    """Whether transformers would take another template of the tokenizer for rows with tools."""
    own = template.tokenizer.chat_template
    if not isinstance(own, dict) or template.text is None or "tool_use" not in own:
        return False
    default = own.get("default")
    return own["tool_use"] != default and without_date(template.text) == default
