r"""Conversation -> drafts: texts to tokenize, with the position of each assistant turn.

To locate a turn, the conversation is rendered twice: the messages before the turn with the
generation prompt, as a server does, and the messages up to the turn. The second text must begin
with the first one. The rest, up to and with the stop token, is what the model has to generate:

    prompt   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    whole    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                                    ^    ^
                                                               start     stop

A turn is proved if its text begins with its prompt, and if it fills the thinking block that the
prompt opens. A switch is a set of template variables, such as `enable_thinking=False`.

This module works on texts. `tokenize` proves the same for token ids.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lit_sft.data.chat_template import ChatTemplate, Span, Switch, WrittenTurn
from lit_sft.data.generation_markers import marked_parts
from lit_sft.data.open_thinking import behind_empty_block, with_reasoning
from lit_sft.data.reasoning import (
    END_OF_THINKING,
    MOVED,
    has_reasoning,
    move_reasoning,
    opens_thinking,
    starts_thinking,
)
from lit_sft.data.server_prompt import answer_start, tails_behind_history
from lit_sft.data.stops import find_end
from lit_sft.data.template_omissions import of_answer, of_conversation
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message, RenderedTurn

TrainOn = Literal["completions", "last_completion", "all"]
"""Every assistant turn, the last one, or every token. An assistant turn's own `train` wins."""


_Way = Callable[[ChatTemplate, Conversation, int, Switch], RenderedTurn]
"""Locates a turn with a switch; raises a UserError if it does not fit."""


class _PromptMismatch(UserError):
    """A turn does not continue its prompt."""


@dataclass(frozen=True, slots=True)
class Draft:
    """The text of an example."""

    text: str
    turns: tuple[RenderedTurn, ...] = ()
    """Turns whose parts get the opposite of `default_mask`. `text` begins with the text of each."""
    default_mask: int = 0
    """Loss mask of the text outside `turns`: 1 = trained."""
    stops: tuple[str, ...] = ()
    """Stop tokens of the trained turns."""
    notes: tuple[str, ...] = ()
    """As in `Example`."""
    needs_bos: bool = False
    """No template wrote this text, so the tokenizer adds its bos."""


def make_drafts(
    template: ChatTemplate, conversation: Conversation, train_on: TrainOn
) -> list[Draft]:
    """Renders a conversation and locates its trained turns.

    Args:
        template: The chat template.
        conversation: Turns or plain text.
        train_on: Which turns are trained.

    Returns:
        One draft, or one per trained turn if the template rewrites earlier turns.

    Raises:
        UserError: The template cannot write the conversation, or a turn does not fit its prompt.
    """
    if conversation.text is not None:
        return [text_draft(conversation.text, template.tokenizer.eos_token)]
    moved = move_reasoning(template, conversation)
    drafts = _turn_drafts(template, moved, train_on)
    if moved is conversation:
        return drafts
    return [replace(draft, notes=(*draft.notes, MOVED)) for draft in drafts]


def _turn_drafts(
    template: ChatTemplate, conversation: Conversation, train_on: TrainOn
) -> list[Draft]:
    """Makes the drafts of a conversation that has turns; see `make_drafts`."""
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    if template.is_raw and answers:
        # Without a template, everything before the last answer is its prompt.
        answers = answers[-1:]
        conversation = replace(conversation, messages=conversation.messages[: answers[0] + 1])
    if train_on == "all":
        return [full_draft(template, conversation, answers)]
    if train_on == "last_completion":
        return completion_drafts(template, conversation, answers, answers[-1:])
    return completion_drafts(template, conversation, answers, answers)


def text_draft(text: str, eos_token: str | None) -> Draft:
    """Makes the draft of a plain text, all of which is trained, with one eos at the end."""
    if eos_token is None:
        raise UserError("the tokenizer has no eos token to end a text; give it one")
    before, _, behind = text.rpartition(eos_token)
    ends_with_eos = not behind.strip()
    body = before if ends_with_eos else text
    return Draft(body + eos_token, default_mask=1, stops=(eos_token,), needs_bos=True)


def full_draft(template: ChatTemplate, conversation: Conversation, answers: Sequence[int]) -> Draft:
    """Makes the draft of `train_on: all`: only turns with `train: false` are not trained.

    Args:
        template: The chat template.
        conversation: Has turns.
        answers: Indices of the assistant turns.
    """
    messages = conversation.messages
    turns = []
    for i in answers:
        if messages[i].train is False:
            turn = prove(template, conversation, i)
            # The whole turn is left out, also the text that `{% generation %}` does not mark.
            turns.append(replace(turn, parts=((turn.start, len(turn.text)),)))
    whole, _ = template.write(conversation)
    for turn in turns:
        if not whole.startswith(turn.text):
            raise UserError(
                f"turn {turn.number} is not trained, but the template rewrites it; set"
                " data.train_on"
            )
    stops: tuple[str, ...] = ()
    if messages[-1].role == "assistant" and messages[-1].train is not False:
        end = find_end(template, whole, conversation, len(messages) - 1)
        whole = end.text
        stops = (end.stop,)
    notes = _notes(turns) + of_conversation(template, conversation, [whole])
    return Draft(
        whole, tuple(turns), default_mask=1, stops=stops, notes=notes, needs_bos=template.is_raw
    )


def completion_drafts(
    template: ChatTemplate,
    conversation: Conversation,
    answers: Sequence[int],
    wanted: Sequence[int],
) -> list[Draft]:
    """Makes the drafts in which assistant turns are trained.

    Args:
        template: The chat template.
        conversation: Has turns.
        answers: Indices of the assistant turns.
        wanted: Indices of the turns that `data.train_on` selects. A turn's own `train` wins.

    Returns:
        One draft, or one per trained turn if the template rewrites earlier turns.
    """
    turns = []
    for i in answers:
        flag = conversation.messages[i].train
        if flag or (flag is None and i in wanted):
            turns.append(prove(template, conversation, i))
    whole = _write_whole(template, conversation, turns)
    rewritten = [turn.text for turn in turns if not whole.startswith(turn.text)]
    omissions = of_conversation(template, conversation, [whole, *rewritten])
    if omissions:
        turns = [replace(turn, notes=turn.notes + omissions) for turn in turns]
    if rewritten:
        return drafts_per_turn(turns, template.is_raw)
    return [draft_of(whole, turns, template.is_raw)]


def drafts_per_turn(turns: Sequence[RenderedTurn], needs_bos: bool) -> list[Draft]:
    """Makes one draft per turn, with the text up to this turn."""
    drafts = [draft_of(turn.text, [turn], needs_bos) for turn in turns]
    if len(drafts) == 1:
        return drafts
    return [replace(draft, notes=("per_turn", *draft.notes)) for draft in drafts]


def draft_of(text: str, turns: Sequence[RenderedTurn], needs_bos: bool) -> Draft:
    """Makes a draft in which only these turns are trained."""
    stops = dict.fromkeys(turn.stop for turn in turns)
    return Draft(text, tuple(turns), stops=tuple(stops), notes=_notes(turns), needs_bos=needs_bos)


def _notes(turns: Sequence[RenderedTurn]) -> tuple[str, ...]:
    """Collects the notes of all turns, each of them once."""
    return tuple(dict.fromkeys(note for turn in turns for note in turn.notes))


def _write_whole(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[RenderedTurn]
) -> str:
    """Renders a whole conversation with the switch of its last trained turn."""
    if not turns:
        return template.write(conversation)[0]
    last = turns[-1]
    if last.number == len(conversation.messages):
        return last.whole
    return template.write(conversation, last.switch)[0]


def write_prompt(template: ChatTemplate, conversation: Conversation) -> str:
    """Renders the prompt of a server for the next assistant turn.

    If the last turn is the assistant's, it is the answer, and the prompt is the same as in
    training. If it cannot be trained, the messages before it are rendered.

    Raises:
        UserError: The template cannot write it.
    """
    conversation = move_reasoning(template, conversation)
    messages = conversation.messages
    if messages and messages[-1].role == "assistant":
        try:
            return prove(template, conversation, len(messages) - 1).prompt
        except UserError:
            conversation = replace(conversation, messages=messages[:-1])
    return template.write(conversation, generation_prompt=True)[0]


def prove(template: ChatTemplate, conversation: Conversation, index: int) -> RenderedTurn:
    """Locates the assistant turn `messages[index]` and proves that it continues its prompt.

    Later messages are not rendered, except the next one, which may be needed to find the stop
    token. The switches of the template are tried in their order, no switch first, until the turn
    fits and its reasoning is written. If none fits, the answer is put behind the prompt of a server
    (see `server_prompt`).

    Raises:
        UserError: No switch makes the turn fit, or the template does not end the turn, or does not
            write its calls.
    """
    switches = _switches_for(template, conversation.messages[index])
    second_best = None
    refusal: UserError | None = None
    for switch in switches:
        try:
            turn = _locate(template, conversation, index, switch)
        except UserError as error:
            refusal = _better_reason(refusal, error)
            continue
        if "left_out:reasoning_content" not in turn.notes:
            return turn
        second_best = second_best or turn
    composed = _first_of((_locate_with_reasoning,), template, conversation, index, switches)
    others = (_locate_behind_prompt, _locate_behind_empty_block)
    best = composed or second_best or _first_of(others, template, conversation, index, switches)
    if best is not None:
        return best
    if template.unproved == "lenient":
        return _locate_lenient(template, conversation, index)
    assert refusal is not None
    raise refusal


def _first_of(
    ways: Sequence[_Way],
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    switches: Sequence[Switch],
) -> RenderedTurn | None:
    """Returns the turn as the first of several ways locates it, each with all switches."""
    for locate in ways:
        for switch in switches:
            try:
                return locate(template, conversation, index, switch)
            except UserError:
                # The first refusal says more: it compares the row with the prompt.
                continue
    return None


def _better_reason(first: UserError | None, error: UserError) -> UserError:
    """Returns the first refusal, unless only a later switch makes the turn fit its prompt.

    Such a turn has another fault, which another remedy mends.
    """
    if first is None:
        return error
    if isinstance(first, _PromptMismatch) and not isinstance(error, _PromptMismatch):
        return error
    return first


def _switches_for(template: ChatTemplate, message: Message) -> list[Switch]:
    """Returns the switches that suit a turn: thinking is switched on only for reasoning."""
    if has_reasoning(message):
        return template.switches
    return [switch for switch in template.switches if not any(value for _, value in switch)]


def _locate(
    template: ChatTemplate, conversation: Conversation, index: int, switch: Switch
) -> RenderedTurn:
    """Locates a turn whose text begins with its prompt.

    Raises:
        UserError: The turn does not continue its prompt.
    """
    message = conversation.messages[index]
    written = template.write_turn(conversation, index, switch)
    if not written.whole.startswith(written.prompt):
        # A call that the template never writes is the better reason to refuse the row.
        of_answer(message, written.whole, index + 1)
        _check_prefix(template, written.prompt, written.whole, message, index + 1)
    turn = _turn_at(template, conversation, index, switch, written, len(written.prompt))
    _check_prefix(template, written.prompt, written.whole, message, index + 1)
    return turn


def _locate_behind_prompt(
    template: ChatTemplate, conversation: Conversation, index: int, switch: Switch
) -> RenderedTurn:
    """Locates a turn whose answer the template writes behind another history than its prompt has.

    The text of the turn is the prompt of a server, then the answer.

    Raises:
        UserError: The answer cannot be told from its history, or does not fit the prompt.
    """
    written = template.write_turn(conversation, index, switch)
    start = answer_start(template, conversation, index, switch, written)
    if start is None:
        raise UserError(f"turn {index + 1} (assistant) cannot be told from its history")
    # What was found in the text of the template moves with the answer.
    shift = len(written.prompt) - start
    moved = WrittenTurn(
        prompt=written.prompt,
        whole=written.prompt + written.whole[start:],
        marks=[(first + shift, last + shift) for first, last in written.marks],
    )
    turn = _turn_at(template, conversation, index, switch, moved, len(moved.prompt), written.whole)
    _check_prefix(template, moved.prompt, moved.whole, conversation.messages[index], index + 1)
    return replace(turn, notes=(*turn.notes, "server_prompt"))


def _locate_with_reasoning(
    template: ChatTemplate, conversation: Conversation, index: int, switch: Switch
) -> RenderedTurn:
    """Locates a turn whose reasoning the template does not write into the block of its prompt.

    Raises:
        UserError: The turn has no reasoning, or its prompt opens no block.
    """
    found = with_reasoning(template, conversation, index, switch)
    if found is None:
        raise UserError(f"turn {index + 1} (assistant) has no reasoning for its prompt")
    written, bare = found
    turn = _turn_at(template, conversation, index, switch, written, len(written.prompt), bare)
    message = conversation.messages[index]
    _check_prefix(template, written.prompt, written.whole, message, index + 1)
    return replace(turn, notes=(*turn.notes, "written:reasoning"))


def _locate_behind_empty_block(
    template: ChatTemplate, conversation: Conversation, index: int, switch: Switch
) -> RenderedTurn:
    """Locates a turn without reasoning behind the empty block that the template writes.

    Raises:
        UserError: The template writes no such block.
    """
    message = conversation.messages[index]
    written = template.write_turn(conversation, index, switch)
    start = behind_empty_block(template, conversation, index, switch, written)
    if start is None or has_reasoning(message):
        raise UserError(f"turn {index + 1} (assistant) has no empty thinking block")
    closed = written._replace(prompt=written.whole[:start])
    turn = _turn_at(template, conversation, index, switch, closed, start)
    return replace(turn, notes=(*turn.notes, "empty_thinking"))


def _locate_lenient(template: ChatTemplate, conversation: Conversation, index: int) -> RenderedTurn:
    """Locates a turn that does not fit its prompt, for `data.unproved: lenient`.

    It is trained from where its text leaves the prompt, but never before its own first character.

    Raises:
        UserError: The end of the message before the turn cannot be found in the text.
    """
    written = template.write_turn(conversation, index)
    start = len(os.path.commonprefix([written.prompt, written.whole]))
    if index > 0:
        tails = tails_behind_history(template, conversation, index, (), written)
        if tails is None:
            raise UserError(
                f"turn {index + 1} (assistant) cannot be told from the messages before it, so even"
                " data.unproved: lenient cannot train it; set data.chat_template to a template"
                " whose turns begin as its generation prompt does, or remove the row"
            )
        start = max(start, len(written.whole) - len(tails.whole) + tails.common)
    turn = _turn_at(template, conversation, index, (), written, start)
    return replace(turn, anchor=0, notes=("lenient", *turn.notes))


def _turn_at(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    switch: Switch,
    written: WrittenTurn,
    start: int,
    template_text: str | None = None,
) -> RenderedTurn:
    """Makes the record of a turn whose answer starts at a character of its text.

    Args:
        template: The chat template.
        conversation: Has the turn.
        index: Index of the turn.
        switch: Template variables of the text.
        written: Prompt and text of the turn.
        start: Where the answer starts in the text.
        template_text: The text as the template writes it, if `written` is put together.

    Raises:
        UserError: The template does not end the turn, or does not write its calls, or the answer
            holds a stop token.
    """
    message = conversation.messages[index]
    number = index + 1
    whole = written.whole
    source = whole if template_text is None else template_text
    shift = len(whole) - len(source)
    found = find_end(template, source, conversation, index, switch, start - shift)
    # The stop token of an open turn is added to its text.
    kept = len(os.path.commonprefix([source, found.text]))
    whole = whole[: kept + shift] + found.text[kept:]
    stop = found.stop
    stop_at = found.at + shift
    end = stop_at + len(stop)
    _check_no_stop_inside(template, whole[start:stop_at], stop, message, number)
    omissions = of_answer(message, whole[start:stop_at], number)
    parts: tuple[Span, ...] = ((start, end),)
    if template.has_marks:
        parts = marked_parts(written.marks, start, stop_at, end, number)
    switched = tuple(f"switch:{name}={str(value).lower()}" for name, value in switch)
    return RenderedTurn(
        number=number,
        prompt=written.prompt,
        text=whole[:end],
        stop=stop,
        start=start,
        anchor=_anchor(template, written.prompt),
        parts=parts,
        whole=whole,
        switch=switch,
        notes=(*switched, *omissions),
    )


def _check_no_stop_inside(
    template: ChatTemplate, answer: str, stop: str, message: Message, number: int
) -> None:
    """Refuses an answer that contains a token at which a server would stop."""
    for token in (stop, template.tokenizer.eos_token):
        if not token or token not in answer:
            continue
        remedy = "remove it from the row"
        if token not in str(message.to_dict()):
            remedy = (
                "the chat template writes it, so set data.chat_template to another, or remove the"
                " row"
            )
        raise UserError(
            f"turn {number} (assistant) holds {token!r} before its end, where a server would stop;"
            f" {remedy}"
        )


def _check_prefix(
    template: ChatTemplate, prompt: str, whole: str, message: Message, number: int
) -> None:
    """Refuses a turn that does not continue its prompt.

    Args:
        template: The chat template.
        prompt: The prompt of a server.
        whole: The text with the turn.
        message: The turn.
        number: Number of the turn, for messages.
    """
    start = len(os.path.commonprefix([prompt, whole]))
    row_text = f"the row is written {whole[start : start + 40]!r}"
    if opens_thinking(template, prompt) and not has_reasoning(message):
        raise _PromptMismatch(
            f"turn {number} (assistant) has no reasoning, but the template's prompt opens a"
            f" thinking block: after {prompt[-30:]!r} {row_text}; add reasoning_content, set"
            " data.chat_template to one without that block, or data.unproved to lenient"
        )
    if start < len(prompt):
        server = (
            f"after {prompt[max(0, start - 20) : start]!r} a server feeds"
            f" {prompt[start : start + 40]!r}"
        )
        remedy = (
            "set data.chat_template to a template whose turns begin as its generation prompt does"
        )
        if has_reasoning(message) and END_OF_THINKING.search(prompt, start) is not None:
            remedy = (
                "the prompt closes the thinking block; a variable in data.chat_template_kwargs may"
                f" open it (the template reads {', '.join(template.variables) or 'none'})"
            )
        raise _PromptMismatch(
            f"turn {number} (assistant) does not continue the prompt of a server: {server}, but"
            f" {row_text}; {remedy}, or set data.unproved to lenient"
        )
    if opens_thinking(template, prompt):
        _check_thinking(prompt, whole[start:], number)


def _check_thinking(prompt: str, answer: str, number: int) -> None:
    """Refuses an answer that does not fill the thinking block that its prompt opens."""
    after = f"after {prompt[-30:]!r} the row is written {answer[:40]!r}"
    if starts_thinking(answer):
        raise _PromptMismatch(
            f"turn {number} (assistant) opens a thinking block again that the template's prompt"
            f" opens: {after}; remove the tag from the content"
        )
    if END_OF_THINKING.search(answer) is None:
        raise _PromptMismatch(
            f"turn {number} (assistant) leaves the thinking block open that the template's prompt"
            f" opens: {after}; set data.chat_template to one that writes reasoning, or"
            " data.unproved to lenient"
        )


def _anchor(template: ChatTemplate, prompt: str) -> int:
    """Returns the position of the last special token of a prompt; 0 if there is none."""
    # A slow tokenizer gives no offsets, so a token cannot be found by its position in the text.
    if not template.tokenizer.is_fast:
        return 0
    # Most prompts end with a short header, so the end is searched before the whole text.
    for start in (max(0, len(prompt) - 200), 0):
        found = list(template.special.finditer(prompt, start))
        if found:
            return found[-1].start()
    return 0
