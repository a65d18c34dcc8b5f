"""Parts of a row that the chat template does not write. They are counted, because the model does
not see them.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from itertools import takewhile

from lit_sft.data.chat_template import ChatTemplate, without_date
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

_END_OF_THINKING = re.compile(r"[<\[]/[\w:|]*think[\w:|]*[>\]]", re.IGNORECASE)

_COMMANDS = re.compile(r"/(?:no_?think|think|system_override)\b")
"""Commands in a message that a template obeys and removes (SmolLM3, Nemotron)."""
_ESCAPES = re.compile(r"""\\+[nrtfb]?|["']""")
"""Characters that JSON and Python escape, at any depth of nesting."""


def has_reasoning(message: Message) -> bool:
    """Whether a message has reasoning, in its own field or in the content."""
    return (
        bool((message.reasoning_content or "").strip())
        or _END_OF_THINKING.search(message.content) is not None
    )


def of_answer(message: Message, answer: str, number: int) -> tuple[str, ...]:
    """Notes on parts of an assistant turn that are missing in its text.

    Args:
        message: The turn.
        answer: What the template writes of it.
        number: Of the turn, for messages.

    Raises:
        UserError: A tool call is missing. Without it, the model would learn an empty answer.
    """
    for call in message.tool_calls or ():
        name = call["function"]["name"]
        if name not in answer:
            raise UserError(
                f"turn {number} (assistant) calls {name!r}, which the chat template does not write;"
                " set data.chat_template to a template with tool calls, or remove the row"
            )
    notes = []
    if (message.reasoning_content or "").strip() not in answer:
        notes.append("left_out:reasoning_content")
    # A template may take reasoning out of the content and write it in its own way.
    content = message.content.strip()
    if content not in answer and _END_OF_THINKING.split(content)[-1].strip() not in answer:
        notes.append("left_out:content")
    return tuple(notes)


def of_conversation(
    template: ChatTemplate, conversation: Conversation, texts: Sequence[str]
) -> tuple[str, ...]:
    """Notes on tools, and on messages that are not the assistant's, which are in none of the texts.

    Args:
        template: Wrote the texts.
        conversation: Was written.
        texts: Several if the template rewrites history, which removes messages by design.
    """
    notes = _of_messages(conversation.messages, texts)
    if conversation.tools:
        notes += _of_tools(template, conversation)
        notes += _of_other_template(template)
    return notes


def _of_messages(messages: Sequence[Message], texts: Sequence[str]) -> tuple[str, ...]:
    missing = [m for m in messages if m.role != "assistant" and not _is_written(m.content, texts)]
    if not missing:
        return ()
    # This comparison is slow, but rarely needed.
    plain_texts = [_plain(text) for text in texts]
    notes = []
    for message in missing:
        if not _is_nearly_written(message.content, plain_texts):
            notes.append(f"left_out:{message.role}_turn")
    return tuple(dict.fromkeys(notes))


def _of_tools(template: ChatTemplate, conversation: Conversation) -> tuple[str, ...]:
    """A note if the template writes none of the tools.

    They are searched in the prompt of the first answer: later, a call has the name of its tool,
    too.
    """
    functions = [tool["function"] for tool in conversation.tools or ()]
    names = [str(function.get("name", "")) for function in functions if isinstance(function, dict)]
    if not names:
        return ("left_out:tools",)
    messages = tuple(takewhile(lambda message: message.role != "assistant", conversation.messages))
    prompt, _ = template.write(Conversation(messages, conversation.tools), generation_prompt=True)
    found = [name for name in names if name in prompt]
    if not found:
        return ("left_out:tools",)
    if any(name in message.content for name in found for message in messages):
        # The user may have written the name, so the tools must make a difference.
        without_tools, _ = template.write(Conversation(messages), generation_prompt=True)
        if without_tools == prompt:
            return ("left_out:tools",)
    return ()


def _of_other_template(template: ChatTemplate) -> tuple[str, ...]:
    """A note if transformers would use another template of the tokenizer for rows with tools."""
    own = template.tokenizer.chat_template
    if not isinstance(own, dict) or template.text is None or "tool_use" not in own:
        return ()
    default = own.get("default")
    if own["tool_use"] == default or without_date(template.text) != default:
        return ()
    return ("other_template",)


def _is_written(content: str, texts: Sequence[str]) -> bool:
    """Whether a content is in one of the texts, as it is or as JSON."""
    stripped = content.strip()
    if any(stripped in text for text in texts):
        return True
    # Templates write the results of tools as JSON.
    for ensure_ascii in (False, True):
        escaped = json.dumps(stripped, ensure_ascii=ensure_ascii)[1:-1]
        if any(escaped in text for text in texts):
            return True
    return False


def _is_nearly_written(content: str, plain_texts: Sequence[str]) -> bool:
    """Whether a content is in one of the texts with the changes that templates make."""
    parts = [_plain(part) for part in _COMMANDS.split(content)]
    for text in plain_texts:
        if all(part in text for part in parts):
            return True
    return False


def _plain(text: str) -> str:
    """The text without what templates change: white space, case, escapes."""
    return " ".join(_ESCAPES.sub(" ", html.unescape(text).casefold()).split())
