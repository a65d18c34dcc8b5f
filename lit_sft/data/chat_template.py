"""Finding the chat template: the tokenizer's own, a file, inline text, or the plain fallback."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from lit_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW = "raw"
"""Value of `data.chat_template` for prompt and completion as they are."""

TODAY = "strftime_now"
"""What a template calls for the date of the day."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize + ':\\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\\n' if add_generation_prompt }}"
)
"""For tokenizers that have none: every turn under its speaker's name, the assistant's turns ended by eos.

The header ends with a newline and not with a space, which a tokenizer would merge with the first word of the answer.
"""


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    """Turn the setting `data.chat_template` into the text of a template that compiles.

    Args:
        tokenizer: Its own template is used where the setting is null; where it has none either, `PLAIN_TEMPLATE`.
        chat_template: None, `raw`, the text of a template (it has `{{` or `{%`), or the path of a file.

    Returns:
        The text, or None for `raw`.

    Raises:
        UserError: The file cannot be read, the template has a syntax error, or nothing would end an assistant turn.
    """
    if chat_template == RAW:
        if tokenizer.eos_token is None:
            raise UserError("data.chat_template is raw, but the tokenizer has no eos token to end an answer; set one")
        return None
    if chat_template is None:
        template, origin = _own_template(tokenizer), "the chat template of the tokenizer"
    elif "{{" in chat_template or "{%" in chat_template:
        template, origin = chat_template, "the inline data.chat_template"
    else:
        template, origin = _read(chat_template), f"data.chat_template {chat_template}"
    _check_syntax(template, origin)
    return template


def with_date(template: str, day: str) -> str:
    """The template, which gets this date (2026-11-30) in place of today's; nothing else in it changes.

    By a macro before it: as a variable, transformers would pass no function.
    """
    moment = datetime.fromisoformat(day)
    directives = sorted(set(re.findall(r"%-?[A-Za-z]", template)))
    written = "".join(f" | replace({json.dumps(d)}, {json.dumps(moment.strftime(d))})" for d in directives)
    return f"{{%- macro {TODAY}(format) -%}}{{{{ format{written} }}}}{{%- endmacro %}}\n{template}"


def kept_date(path: Path) -> str:
    """The date in a file; where there is no file, today's is put into it, by one of several ranks or jobs.

    Raises:
        UserError: It holds no date.
    """
    if not path.is_file():
        aside = path.with_name(f"{path.name}.{uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(f"{date.today()}\n")
        except OSError:  # questions need no cache
            return str(date.today())
        with suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
    try:
        return str(date.fromisoformat(path.read_text().strip()))
    except ValueError:
        raise UserError(f"{path} holds no date such as 2026-11-30: write one, or remove it for today's") from None


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            names = ", ".join(own) or "none"
            raise UserError(f"the tokenizer has no chat template named default, only {names}; set data.chat_template")
        own = own["default"]
    if own is not None:
        return str(own)
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has neither a chat template nor an eos token to end an answer; set data.chat_template to a "
            "template that ends assistant turns with a special token"
        )
    # rendered text is tokenized without additions, so a bos that the tokenizer would add by itself is written out
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + PLAIN_TEMPLATE if adds_bos else PLAIN_TEMPLATE


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template {path!r:.200} cannot be read as a file ({error}); give the path of a .jinja file, the "
            "text of a template, raw, or null"
        ) from None


def _check_syntax(template: str, origin: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=template)  # compiles, and renders no conversation
    except TemplateSyntaxError as error:
        raise UserError(f"{origin} has a syntax error in line {error.lineno}: {error.message}; mend it") from None
