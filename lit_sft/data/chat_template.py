"""The chat template: `resolve_chat_template` finds it, `ChatTemplate` renders it.

It is the tokenizer's own, a file, inline text, the plain fallback, or `raw`: prompt and completion
without any change.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

from lit_sft.errors import UserError
from lit_sft.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW = "raw"
"""Value of `data.chat_template` for prompt and completion without any change."""

TODAY = "strftime_now"
"""The function that a template calls for today's date."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize + ':\\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\\n' if add_generation_prompt }}"
)
"""For tokenizers without a template: the name of the speaker, then the turn.

Assistant turns end with eos. The header ends with a newline: a tokenizer would merge a space with
the first word of the answer.
"""

RAW_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{{ eos_token if not (add_generation_prompt or messages[-1].content.endswith(eos_token)) }}"
)
"""For `raw`: prompt, completion and eos."""

Switch = tuple[tuple[str, bool], ...]
"""Template variables for one turn: (name, value) of each."""
Span = tuple[int, int]
"""A range of positions: begin (inclusive) and end (exclusive)."""

_SWITCHES = ("enable_thinking", "thinking")
"""Template variables that switch thinking off or on."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_OWN_VARIABLES = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "raise_exception",
    TODAY,
}
"""Variables that transformers sets. They are not offered to the user."""
_PROBED_ARGUMENTS = {"key": "value"}
_PROBED_CONTENT = "Zq7 content"
_REMEDIES = {
    "system": "remove the system turn, and set data.system_prompt to null",
    "alternat": "merge neighbouring turns of one role, or remove the row",
}
"""Word in the error message of a template -> remedy."""


def resolve_chat_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> str | None:
    """Finds the chat template and checks its syntax.

    Args:
        tokenizer: Has the template that None stands for; without one, `PLAIN_TEMPLATE` is used.
        chat_template: The setting: None, `raw`, a text with `{{` or `{%`, or the path of a file.

    Returns:
        The text of the template, or None for `raw`.

    Raises:
        UserError: The file cannot be read, the template has a syntax error, or nothing would end an
            assistant turn.
    """
    if chat_template == RAW:
        if tokenizer.eos_token is None:
            raise UserError(
                "data.chat_template is raw, but the tokenizer has no eos token to end an answer;"
                " set one"
            )
        return None
    if chat_template is None:
        template = _own_template(tokenizer)
        origin = "the chat template of the tokenizer"
    elif "{{" in chat_template or "{%" in chat_template:
        template = chat_template
        origin = "the inline data.chat_template"
    else:
        template = _read(chat_template)
        origin = f"data.chat_template {chat_template}"
    _check_syntax(template, origin)
    return template


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the default template of the tokenizer; `PLAIN_TEMPLATE` if it has none."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            names = ", ".join(own) or "none"
            raise UserError(
                f"the tokenizer has no chat template named default, only {names}; set"
                " data.chat_template"
            )
        return str(own["default"])
    if own is not None:
        return str(own)
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has neither a chat template nor an eos token to end an answer; set"
            " data.chat_template to a template that ends assistant turns with a special token"
        )
    # Rendered text is tokenized without special tokens, so the template writes the bos that the
    # tokenizer would add.
    if tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return "{{ bos_token }}" + PLAIN_TEMPLATE
    return PLAIN_TEMPLATE


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template {path!r:.200} cannot be read as a file ({error}); give the path of"
            " a .jinja file, the text of a template, raw, or null"
        ) from None


def _check_syntax(template: str, origin: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # Without conversations, this only compiles the template.
        render_jinja_template([], chat_template=template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{origin} has a syntax error in line {error.lineno}: {error.message}; mend it"
        ) from None


def with_date(template: str, day: str) -> str:
    """Freezes the date in a template that calls `strftime_now`.

    A macro before the template replaces the function, because transformers refuses functions as
    template variables.

    Args:
        template: The text of the template.
        day: ISO date, such as 2026-11-30.
    """
    moment = datetime.fromisoformat(day)
    filters = ""
    for directive in sorted(set(re.findall(r"%-?[A-Za-z]", template))):
        filters += f" | replace({json.dumps(directive)}, {json.dumps(moment.strftime(directive))})"
    return f"{{%- macro {TODAY}(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}\n{template}"


def without_date(template: str) -> str:
    """Undoes `with_date`."""
    return re.sub(rf"\A\{{%- macro {TODAY}.*\n", "", template)


def kept_date(path: Path) -> str:
    """Reads the date in a file, after writing today's date there if the file does not exist.

    Raises:
        UserError: The file holds no date.
    """
    if not path.is_file():
        aside = path.with_name(f"{path.name}.{uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(f"{date.today()}\n")
        except OSError:
            # `preview` needs no cache, so a folder that cannot be written is no error here.
            return str(date.today())
        # A link never replaces a file: of several processes, the first one wins.
        with suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
    try:
        return str(date.fromisoformat(path.read_text().strip()))
    except ValueError:
        raise UserError(
            f"{path} holds no date such as 2026-11-30: write one, or remove it for today's"
        ) from None


class WrittenTurn(NamedTuple):
    """The two texts that locate an assistant turn."""

    prompt: str
    """The messages before the turn with the generation prompt: the input of a server."""
    whole: str
    """The messages up to this turn."""
    marks: list[Span]
    """Ranges of `whole` between `{% generation %}` and `{% endgeneration %}`."""


class ChatTemplate:
    """Renders conversations as servers do, in the sandbox of transformers.

    Attributes:
        closing: Matches special tokens at the end of a text, with white space around them.
        has_marks: Whether the template has `{% generation %}` marks.
        special: Matches one special token of the tokenizer.
        switches: Variables to try in this order until a turn fits its prompt; the first is empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        unproved: Literal["error", "lenient"] = "error",
    ) -> None:
        """Finds special tokens and switches.

        Args:
            tokenizer: Its special tokens are template variables, and one of them ends a turn.
            text: The template; None for `raw`.
            chat_template_kwargs: More template variables.
            unproved: `lenient` accepts a turn that does not fit its prompt, and trains it from
                where its text leaves the prompt.

        Raises:
            UserError: The template does not read a variable.
        """
        self.tokenizer = tokenizer
        self.text = text
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.unproved = unproved
        self.is_raw = text is None
        _check_variables(text, self.chat_template_kwargs)
        self._variables = {**tokenizer.special_tokens_map, **self.chat_template_kwargs}
        self.has_marks = text is not None and _GENERATION.search(text) is not None
        self.special = _special_tokens(tokenizer)
        self.closing = re.compile(rf"(?:(?:{self.special.pattern})\s*)+\Z")
        self.switches: list[Switch] = [()]
        for name in _SWITCHES:
            if text is not None and re.search(rf"\b{name}\b", text):
                self.switches += [((name, False),), ((name, True),)]

    def fingerprint(self) -> dict[str, Any]:
        """Returns everything but the tokenizer that decides the result, as plain JSON values."""
        return {
            "chat_template": self.text,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "unproved": self.unproved,
        }

    def write_turn(
        self, conversation: Conversation, index: int, switch: Switch = ()
    ) -> WrittenTurn:
        """Renders the turn `messages[index]` twice: its prompt alone, and the prompt with the turn.

        Raises:
            UserError: The template refuses the messages.
        """
        before = replace(conversation, messages=conversation.messages[:index])
        with_turn = replace(conversation, messages=conversation.messages[: index + 1])
        prompt, _ = self.write(before, switch, generation_prompt=True)
        whole, marks = self.write(with_turn, switch)
        return WrittenTurn(prompt, whole, marks)

    def write(
        self, conversation: Conversation, switch: Switch = (), *, generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Renders a conversation.

        Args:
            conversation: Messages and tools.
            switch: More template variables.
            generation_prompt: Whether the text ends with the header of an assistant turn.

        Returns:
            The text, and the ranges that the template marks with `{% generation %}`.

        Raises:
            UserError: The template refuses these messages, or fails on them.
        """
        messages = []
        for message in conversation.messages:
            variables = message.to_dict()
            if message.reasoning_content:
                # gpt-oss reads reasoning under this name. transformers adds it only since 5.23.
                variables["thinking"] = message.reasoning_content
            if message.tool_calls and self.takes_arguments_as_text:
                variables["tool_calls"] = [_with_text_arguments(c) for c in message.tool_calls]
            if self.takes_content_as_parts:
                variables["content"] = _as_parts(message.content)
            messages.append(variables)
        return self._render(messages, conversation.tools, switch, generation_prompt)

    @cached_property
    def variables(self) -> list[str]:
        """The variables that `data.chat_template_kwargs` may set."""
        return _readable(self.text)

    @cached_property
    def takes_arguments_as_text(self) -> bool:
        """Whether the template expects the arguments of a call as JSON text, not as an object.

        Most templates take an object. Some join it to other text, which fails, or print it as
        Python does.
        """
        question = {"role": "user", "content": "."}
        function = {"name": "f", "arguments": _PROBED_ARGUMENTS}
        # Mistral takes only ids of nine letters and digits.
        call = {"id": "abcdefghi", "type": "function", "function": function}
        texts = []
        for item in (call, _with_text_arguments(call)):
            turn = {"role": "assistant", "content": "", "tool_calls": [item]}
            try:
                text, _ = self._render([question, turn], None, (), False)
            except UserError:
                text = ""
            texts.append(text)
        as_object, as_text = texts
        is_right = json.dumps(_PROBED_ARGUMENTS) in as_text
        return is_right and (not as_object or str(_PROBED_ARGUMENTS) in as_object)

    @cached_property
    def takes_content_as_parts(self) -> bool:
        """Whether the template expects a content as a list of parts, not as a text.

        Templates of models that read images loop over parts. Some fail on a text, others write
        nothing.
        """
        texts = []
        for content in (_PROBED_CONTENT, _as_parts(_PROBED_CONTENT)):
            try:
                text, _ = self._render([{"role": "user", "content": content}], None, (), False)
            except UserError:
                text = ""
            texts.append(text)
        as_text, as_parts = texts
        return _PROBED_CONTENT not in as_text and _PROBED_CONTENT in as_parts

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        switch: Switch,
        generation_prompt: bool,
    ) -> tuple[str, list[Span]]:
        """Renders messages as the template reads them; see `write`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        result: Any
        try:
            result = render_jinja_template(
                [messages],
                tools=None if tools is None else list(tools),
                chat_template=RAW_TEMPLATE if self.text is None else self.text,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=self.has_marks,
                **self._variables | dict(switch),
            )
        # A template is a program, which may raise anything.
        except Exception as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"the chat template does not take the row: {said}; {_remedy(said)}"
            ) from error
        (text,), marks = result
        if not marks:
            return text, []
        return text, marks[0]


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the arguments of a tool call as JSON text."""
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _as_parts(content: str) -> list[dict[str, str]]:
    """Writes a content as templates of models that read images take it."""
    return [{"type": "text", "text": content}]


def _check_variables(text: str | None, chat_template_kwargs: Mapping[str, Any]) -> None:
    """Refuses template variables that the template does not read.

    Raises:
        UserError: It does not read one of them.
    """
    unknown = set(chat_template_kwargs) - _variables_of(text or "")
    for name in sorted(unknown):
        readable = _readable(text)
        near = get_close_matches(name, readable, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else "remove it"
        raise UserError(
            f"`data.chat_template_kwargs` sets `{name}`, which the chat template does not read (it"
            f" reads {', '.join(readable) or 'none'}); {remedy}"
        )


def _readable(text: str | None) -> list[str]:
    """Returns the variables that a template reads and a user may set."""
    return sorted(_variables_of(text or "") - _OWN_VARIABLES)


def _variables_of(text: str) -> set[str]:
    """Returns the variables that a template reads and does not set itself."""
    from jinja2 import Environment, meta

    # Jinja knows no generation tags: they are an extension of transformers.
    without_marks = _GENERATION_TAGS.sub("", text)
    # Nothing is rendered here, so the environment needs no sandbox.
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701
    return meta.find_undeclared_variables(environment.parse(without_marks))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    tokens = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            tokens.add(str(token))
    # A regex takes the first alternative that matches, so longer tokens come before their prefixes.
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    nothing = "(?!)"
    return re.compile("|".join(re.escape(token) for token in ordered) or nothing)


def _remedy(said: str) -> str:
    for word, remedy in _REMEDIES.items():
        if word in said.lower():
            return remedy
    return "mend the row, or set another data.chat_template"
