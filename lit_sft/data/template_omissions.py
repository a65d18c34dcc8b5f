"""What a chat template does not write of a row, to be counted: what the model does not see is told."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lit_sft.types import Message

_END_OF_THINKING = re.compile(r"[<\[]/[\w:|]*think[\w:|]*[>\]]", re.IGNORECASE)

_COMMANDS = re.compile(r"/(?:no_?think|think|system_override)\b")
"""What a template obeys, and takes out of the text (SmolLM3, Nemotron)."""
_ESCAPES = re.compile(r"""\\+[nrtfb]?|["']""")
"""What differs between a text and the same text as JSON or as Python writes it, whatever the depth."""


def has_reasoning(message: Message) -> bool:
    """Whether there is a thought, of its own or in the content."""
    return bool((message.reasoning_content or "").strip()) or _END_OF_THINKING.search(message.content) is not None


def of_answer(message: Message, answer: str) -> tuple[str, ...]:
    """Notes on what is missing in the text of an assistant's turn."""
    # a template may take reasoning out of the content and write it its own way
    content = message.content.strip()
    is_left_out = {
        "reasoning_content": (message.reasoning_content or "").strip() not in answer,
        "content": content not in answer and _END_OF_THINKING.split(content)[-1].strip() not in answer,
    }
    return tuple(f"left_out:{name}" for name, left_out in is_left_out.items() if left_out)


def of_tools(
    tools: Iterable[Mapping[str, Any]], messages: Iterable[Message], written: Callable[[Any], str]
) -> tuple[str, ...]:
    """A note where the template writes none of the tools.

    Args:
        tools: In OpenAI's envelope.
        messages: The prompt, which may have the name of one itself.
        written: What the template writes of it with these tools, or with None.
    """
    functions = (tool["function"] for tool in tools)
    names = [str(function.get("name", "")) for function in functions if isinstance(function, dict)]
    found = [name for name in names if name in (prompt := written(tools))]
    is_said = any(name in message.content for name in found for message in messages)
    return ("left_out:tools",) if not found or (is_said and written(None) == prompt) else ()


def of_messages(messages: Iterable[Message], texts: Sequence[str]) -> tuple[str, ...]:
    """Notes on the roles, other than the assistant's, of messages that are in none of the texts.

    Args:
        messages: Of one conversation.
        texts: What the template writes of it; several where it rewrites history, which drops messages by design.
    """
    missing = [m for m in messages if m.role != "assistant" and not any(_is_in(text, m.content) for text in texts)]
    if missing:  # rarely, so this may take longer
        texts = [_plain(text) for text in texts]
        missing = [m for m in missing if not any(_is_nearly_in(text, m.content) for text in texts)]
    return tuple(dict.fromkeys(f"left_out:{message.role}_turn" for message in missing))


def _is_in(text: str, content: str) -> bool:
    """As it is, or as JSON, as which templates write what tools returned."""
    content = content.strip()
    return content in text or any(json.dumps(content, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _is_nearly_in(plain_text: str, content: str) -> bool:
    return all(_plain(part) in plain_text for part in _COMMANDS.split(content))


def _plain(text: str) -> str:
    """Without what templates change of a text they write: white space, case, escapes."""
    return " ".join(_ESCAPES.sub(" ", html.unescape(text).casefold()).split())
