r"""Conversation -> text, and where in it each assistant turn lies. Text only: `render` does the same proof for tokens.

A turn is located by rendering twice: the messages before it with the generation prompt, as a server does to have it
generated, and the messages up to it. The second text must begin with the first. What follows, up to and with the stop
token, is what the model has to generate:

    prompt   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    whole    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                                    ^ start ^ stop
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from lit_sft.data.generation_markers import marked
from lit_sft.data.template_omissions import has_reasoning, of_answer, of_messages, of_tools
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message, RenderedTurn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{{ eos_token if not (add_generation_prompt or messages[-1].content.endswith(eos_token)) }}"
)
"""Prompt and completion as they are, and eos."""

_SWITCHES = ("enable_thinking", "thinking")
"""Template variables that turn the thinking block of a generation prompt off or on."""
_OPEN_THINKING = re.compile(r"[<\[][\w:|]*think[\w:|]*[>\]]\s*\Z", re.IGNORECASE)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDIES = {
    "system": "remove the system turn, and set data.system_prompt to null",
    "alternat": "merge neighbouring turns of one role, or remove the row",
}
"""A word of a template's own error -> what to do."""

_Switch = tuple[tuple[str, bool], ...]
_Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """Writes conversations as servers do: in the sandbox of transformers and with its variables.

    Args:
        tokenizer: Its special tokens are variables of the template, and one of them ends a turn.
        text: The template; None for prompt and completion as they are (`raw`).
        chat_template_kwargs: More variables.
        unproved: `lenient` accepts a turn that does not fit its prompt, from what they have in common.
    """

    tokenizer: PreTrainedTokenizerBase
    text: str | None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    unproved: Literal["error", "lenient"] = "error"

    def write(
        self, conversation: Conversation, switch: _Switch = (), *, generation_prompt: bool = False
    ) -> tuple[str, list[_Span]]:
        """The text of a conversation, and the ranges in it that the template marks with `{% generation %}`.

        Raises:
            UserError: The template refuses these messages, or fails on them.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        # gpt-oss reads reasoning under another name, which transformers adds by itself only since 5.23
        messages = [
            message.to_dict() | ({"thinking": message.reasoning_content} if message.reasoning_content else {})
            for message in conversation.messages
        ]
        result: Any
        try:
            result = render_jinja_template(
                [messages],
                tools=None if conversation.tools is None else list(conversation.tools),
                chat_template=RAW_TEMPLATE if self.text is None else self.text,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=self._has_marks,
                **self._variables | dict(switch),
            )
        except Exception as error:  # a template is somebody's program: it may raise anything
            said = " ".join(str(error).split())
            remedies = (remedy for word, remedy in _REMEDIES.items() if word in said.lower())
            remedy = next(remedies, "mend the row, or set another data.chat_template")
            raise UserError(f"the chat template does not take the row: {said}; {remedy}") from error
        (text,), marks = result
        return text, marks[0] if marks else []

    def prompt(self, conversation: Conversation) -> str:
        """What a server feeds to have a conversation continued.

        A last assistant turn is what is asked for, so it is not shown: the prompt is the one that this turn is trained
        behind, if it can be proved.
        """
        messages = conversation.messages
        if messages and messages[-1].role == "assistant":
            try:
                return self.prove(conversation, len(messages) - 1).prompt
            except UserError:
                conversation = replace(conversation, messages=messages[:-1])
        return self.write(conversation, generation_prompt=True)[0]

    def prove(self, conversation: Conversation, index: int) -> RenderedTurn:
        """Locate the assistant turn `messages[index]`; what comes after it is not looked at.

        Where it does not fit its prompt, or its reasoning is not written, the template's own switches are tried.

        Raises:
            UserError: No switch makes it fit, or the template leaves the turn open or does not write its calls.
        """
        second_best, refusal = None, None
        for switch in self._switches:
            try:
                turn = self._locate(conversation, index, switch)
            except UserError as error:
                refusal = refusal or error
                continue
            if "left_out:reasoning_content" not in turn.notes:
                return turn
            second_best = second_best or turn
        if second_best is not None:
            return second_best
        if self.unproved == "lenient":
            return self._locate(conversation, index, (), lenient=True)
        assert refusal is not None
        raise refusal

    def find_stop(
        self, text: str, conversation: Conversation, index: int, switch: _Switch = (), start: int = 0
    ) -> tuple[int, str]:
        """The special token that ends the turn `messages[index]`, and its position.

        Args:
            text: The conversation rendered up to and with this turn.
            conversation: With or without what follows the turn.
            index: Of the turn.
            switch: With which the text was rendered.
            start: Where in the text the answer begins.

        Raises:
            UserError: The template writes none.
        """
        # special tokens at the end, with only white space between them; no template writes 300 characters of them
        closing = self._closing.search(text, max(start, len(text) - 300))
        if closing is None:
            raise UserError(
                f"the chat template leaves turn {index + 1} (assistant) open: {text[-20:]!r} does not end with a "
                "special token of the tokenizer, so the model would not learn to stop; set data.chat_template to a "
                "template that ends turns with one the tokenizer has as a special token"
            )
        found = list(self._special.finditer(text, closing.start()))
        stop = found[0] if len(found) == 1 else self._last_of_turn(text, found, conversation, index, switch)
        return stop.start(), stop.group()

    def left_out(self, conversation: Conversation, texts: Sequence[str]) -> tuple[str, ...]:
        """Notes on tools, and on messages, the assistant's aside, that are in none of the texts of a conversation.

        Tools are looked for in the prompt of the first answer: later a call has the name of its tool, too.
        """
        notes = of_messages(conversation.messages, texts)
        if conversation.tools:
            messages = tuple(takewhile(lambda message: message.role != "assistant", conversation.messages))

            def written(tools: Any) -> str:
                return self.write(Conversation(messages, tools), generation_prompt=True)[0]

            notes += of_tools(conversation.tools, messages, written) + self._other_template
        return notes

    @property
    def is_raw(self) -> bool:
        """Whether prompt and completion are taken as they are."""
        return self.text is None

    def fingerprint(self) -> dict[str, Any]:
        """Everything besides the tokenizer that decides what is written and proved, as plain JSON values."""
        kwargs = dict(self.chat_template_kwargs)
        return {"chat_template": self.text, "chat_template_kwargs": kwargs, "unproved": self.unproved}

    @cached_property
    def _has_marks(self) -> bool:
        return self.text is not None and _GENERATION.search(self.text) is not None

    @cached_property
    def _variables(self) -> dict[str, Any]:
        return {**self.tokenizer.special_tokens_map, **self.chat_template_kwargs}

    @cached_property
    def _other_template(self) -> tuple[str, ...]:
        """A note for rows with tools, for which transformers takes another one of the tokenizer's templates."""
        own = self.tokenizer.chat_template
        if not isinstance(own, dict) or self.text is None or own.get("default") == own.get("tool_use"):
            return ()
        text = re.sub(r"\A\{%- macro strftime_now.*\n", "", self.text)  # the date that it was given
        return ("other_template",) if "tool_use" in own and text == own.get("default") else ()

    @cached_property
    def _switches(self) -> list[_Switch]:
        known = [name for name in _SWITCHES if re.search(rf"\b{name}\b", self.text or "")]
        return [(), *(((name, value),) for name in known for value in (False, True))]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(added.union(self.tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    @cached_property
    def _closing(self) -> re.Pattern[str]:
        return re.compile(rf"(?:(?:{self._special.pattern})\s*)+\Z")

    def _locate(
        self, conversation: Conversation, index: int, switch: _Switch, *, lenient: bool = False
    ) -> RenderedTurn:
        messages, number = conversation.messages, index + 1
        prompt, _ = self.write(replace(conversation, messages=messages[:index]), switch, generation_prompt=True)
        whole, marks = self.write(replace(conversation, messages=messages[:number]), switch)
        fits = whole.startswith(prompt)
        start = len(prompt) if fits else len(os.path.commonprefix([prompt, whole]))
        stop_at, stop = self.find_stop(whole, conversation, index, switch, start if fits else 0)
        answer, end = whole[start:stop_at], stop_at + len(stop)
        for token in {stop, self.tokenizer.eos_token or stop}:
            if token in (answer if fits else messages[index].content):
                where = f"turn {number} (assistant) holds {token!r} before its end, where a server would stop"
                raise UserError(f"{where}; remove it from the row")
        left_out = self._left_out(conversation, index, answer)
        thoughtless = self._opens_thinking(prompt) and not has_reasoning(messages[index])
        if not lenient and (thoughtless or not fits):
            raise _does_not_fit(number, start, prompt, whole, thoughtless)
        notes = tuple(f"switch:{name}={str(value).lower()}" for name, value in switch)
        notes += ("lenient",) * lenient + left_out
        parts = marked(marks, start, stop_at, end, number) if self._has_marks else ((start, end),)
        return RenderedTurn(number, prompt, whole[:end], stop, start, self._anchor(prompt), parts, whole, switch, notes)

    def _opens_thinking(self, prompt: str) -> bool:
        return self.text is not None and _OPEN_THINKING.search(prompt, max(0, len(prompt) - 50)) is not None

    def _anchor(self, prompt: str) -> int:
        for start in (max(0, len(prompt) - 200), 0):  # most prompts end with a header of a few characters
            if found := list(self._special.finditer(prompt, start)):
                return found[-1].start()
        return 0

    def _last_of_turn(
        self, text: str, found: list[re.Match[str]], conversation: Conversation, index: int, switch: _Switch
    ) -> re.Match[str]:
        """Which of the special tokens at the end of `text` is the stop token.

        Some templates end a turn with several (DeepSeek's tool calls), others write eos once more behind the whole text
        (Phi-3). What is still there when the conversation goes on belongs to the turn, and the last of it stops.
        """
        messages, message = conversation.messages, conversation.messages[index]
        if not message.content.strip() and not message.tool_calls:
            raise UserError(f"turn {index + 1} (assistant) is blank; fill it in or remove the row")
        if not message.tool_calls and (own := self._closing.search(message.content)):
            written = self._special.findall(own.group())  # these are text of the answer
            if [match.group() for match in found[: len(written)]] == written:
                found = found[len(written) :] or found
        calls = message.tool_calls or ()
        replies = tuple(Message("tool", ".", name=c["function"]["name"], tool_call_id=c.get("id")) for c in calls)
        following = messages[index + 1 : index + 2] or replies or (Message("user", "."),)
        history, _ = self.write(replace(conversation, messages=messages[: index + 1] + following), switch)
        before = max(0, found[0].start() - 100)
        return next((match for match in reversed(found) if text[before : match.end()] in history), found[0])

    def _left_out(self, conversation: Conversation, index: int, answer: str) -> tuple[str, ...]:
        """Notes on what the template does not write. A call that is not written must not become an empty answer."""
        message = conversation.messages[index]
        for name in (call["function"]["name"] for call in message.tool_calls or ()):
            if name not in answer:
                raise UserError(
                    f"turn {index + 1} (assistant) calls {name!r}, which the chat template does not write; set "
                    "data.chat_template to a template with tool calls, or remove the row"
                )
        return of_answer(message, answer)


def _does_not_fit(number: int, at: int, prompt: str, whole: str, thoughtless: bool) -> UserError:
    row = f"the row is written {whole[at : at + 40]!r}"
    if thoughtless:
        return UserError(
            f"turn {number} (assistant) has no reasoning, but the template's prompt opens a thinking block: after "
            f"{prompt[-30:]!r} {row}; add reasoning_content, set data.chat_template to one without that block, or "
            "data.unproved to lenient"
        )
    there = f"after {prompt[max(0, at - 20) : at]!r} a server feeds {prompt[at : at + 40]!r}, but {row}"
    return UserError(
        f"turn {number} (assistant) does not continue the prompt of a server: {there}; set data.chat_template to a "
        "template whose turns begin as its generation prompt does, or data.unproved to lenient"
    )
