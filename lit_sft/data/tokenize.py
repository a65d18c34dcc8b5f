r"""Conversation -> Examples: token ids, and which of them are trained, proved against what a server feeds the model.

    prompt     <|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n
    example    <|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n Hello <|im_end|> \n
    loss_mask        0       0    0  0      0      0       0          0      0   1       1       0

That the text of an example begins with the text of the prompt is proved in `turns`. Here the same is proved of the ids:
those before the trained ones are the ids of the prompt alone. Special tokens cut a text before anything in it is
merged, so the two can differ only behind the prompt's last special token, the anchor; that tail is tokenized alone and
compared. Masks go by position, never by token id, so a padding token that is also eos does no harm.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from lit_sft.errors import UserError
from lit_sft.types import Conversation, Example, RenderedTurn

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


class _Template(Protocol):
    """Writes conversations as text and locates their turns in it: `turns.ChatTemplate`."""

    @property
    def is_raw(self) -> bool: ...
    @property
    def unproved(self) -> str: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def prove(self, conversation: Conversation, index: int) -> RenderedTurn: ...
    def write(self, conversation: Conversation, switch: Any = ()) -> tuple[str, Any]: ...
    def prompt(self, conversation: Conversation) -> str: ...
    def left_out(self, conversation: Conversation, texts: Sequence[str]) -> tuple[str, ...]: ...
    def find_stop(self, text: str, conversation: Conversation, index: int) -> tuple[int, str]: ...


@dataclass(frozen=True, slots=True)
class _Draft:
    """The text of an example-to-be."""

    text: str
    turns: tuple[RenderedTurn, ...]
    """Turns whose label differs from `label`; `text` begins with the text of each."""
    label: int = 0
    """1 = what lies outside of `turns` is trained."""
    stops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bare: bool = False
    """No template wrote this text, so the tokenizer adds its bos."""


class _Tokens(NamedTuple):
    ids: list[int]
    encoding: Encoding | None
    """None from a tokenizer that does not know where in the text its tokens lie."""


@dataclass(frozen=True, eq=False)
class Renderer:
    """Tokenizes conversations as their template writes them, and marks what is trained.

    Args:
        tokenizer: Any tokenizer of transformers.
        template: What writes the text.
        train_on: `completions`: every assistant turn; `last_completion`: the last one; `all`: every token. A turn's own
            `train` wins.
    """

    tokenizer: PreTrainedTokenizerBase
    template: _Template
    train_on: Literal["completions", "last_completion", "all"] = "completions"

    def render(self, conversations: Sequence[Conversation], rows: Sequence[int]) -> list[list[Example] | UserError]:
        """Render conversations; all their texts are tokenized in one call.

        Args:
            conversations: K of them.
            rows: K numbers for `Example.row`.

        Returns:
            K results: the examples of a conversation (several where the template rewrites history), or what is wrong
            with it, without the row's number: the caller knows file and line.
        """
        results: list[list[Example] | UserError] = []
        drafts: list[tuple[int, _Draft]] = []  # and which conversation it belongs to
        for k, conversation in enumerate(conversations):
            try:
                drafts += [(k, draft) for draft in self._drafts(conversation)]
                results.append([])
            except UserError as error:
                results.append(error)
        tokens = self._tokenize(draft for _, draft in drafts)
        for k, draft in drafts:
            examples = results[k]
            if not isinstance(examples, UserError):
                try:
                    examples += self._examples(draft, tokens, rows[k], len(examples))
                except UserError as error:
                    results[k] = error
        return results

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids that a server feeds to have a conversation continued.

        Args:
            conversation: A last assistant turn is what is asked for: the prompt is then the one that it is trained
                behind, with the same switch of the template.

        Raises:
            UserError: The template cannot write it.
        """
        text = self.template.prompt(conversation) if conversation.text is None else conversation.text
        ids = self._encode([text])[text].ids
        return [*self._missing_bos(ids), *ids] if conversation.text is not None or self.template.is_raw else ids

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what `render` returns, as plain JSON values."""
        if self.tokenizer.is_fast:
            # truncation and padding are written before the vocabulary, and change with every call
            vocabulary = self.tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2]
        else:
            vocabulary = json.dumps([type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())])
        return {
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "special_tokens": self.tokenizer.special_tokens_map,
            "train_on": self.train_on,
            **self.template.fingerprint(),
        }

    def _drafts(self, conversation: Conversation) -> list[_Draft]:
        if conversation.text is not None:
            eos = self.tokenizer.eos_token
            if eos is None:
                raise UserError("the tokenizer has no eos token to end a text; give it one")
            before, _, rest = conversation.text.rpartition(eos)
            text = conversation.text if rest.strip() else before  # behind which eos stands already
            return [_Draft(text + eos, (), label=1, stops=(eos,), bare=True)]
        messages = conversation.messages
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if self.template.is_raw:  # what comes before the last answer is its prompt, whoever said it
            answers = answers[-1:]
            messages = messages[: answers[-1] + 1 if answers else None]
            conversation = replace(conversation, messages=messages)
        if self.train_on == "all":
            return [self._full_draft(conversation, [i for i in answers if messages[i].train is False])]
        wanted = answers if self.train_on == "completions" else answers[-1:]
        trained = [i for i in answers if messages[i].train or (messages[i].train is None and i in wanted)]
        turns = tuple(self.template.prove(conversation, i) for i in trained)
        if turns and turns[-1].number == len(messages):
            whole = turns[-1].whole
        else:
            whole, _ = self.template.write(conversation, turns[-1].switch if turns else ())
        rewritten = [turn.text for turn in turns if not whole.startswith(turn.text)]
        if left_out := self.template.left_out(conversation, [whole, *rewritten]):
            turns = tuple(replace(turn, notes=turn.notes + left_out) for turn in turns)
        return self._per_turn(turns) if rewritten else [self._draft(whole, turns)]

    def _full_draft(self, conversation: Conversation, untrained: list[int]) -> _Draft:
        messages = conversation.messages
        turns = tuple(self.template.prove(conversation, i) for i in untrained)
        whole, _ = self.template.write(conversation)
        if rewritten := [turn.number for turn in turns if not whole.startswith(turn.text)]:
            raise UserError(f"turn {rewritten[0]} is not trained, but the template rewrites it; set data.train_on")
        is_answer = messages[-1].role == "assistant" and len(messages) - 1 not in untrained
        stops = [self.template.find_stop(whole, conversation, len(messages) - 1)[1]] if is_answer else []
        draft = self._draft(whole, turns)
        notes = draft.notes + self.template.left_out(conversation, [whole])
        return replace(draft, label=1, stops=tuple(stops), notes=notes)

    def _per_turn(self, turns: Sequence[RenderedTurn]) -> list[_Draft]:
        drafts = [self._draft(turn.text, (turn,)) for turn in turns]
        return drafts if len(drafts) == 1 else [replace(draft, notes=("per_turn", *draft.notes)) for draft in drafts]

    def _draft(self, text: str, turns: tuple[RenderedTurn, ...]) -> _Draft:
        notes = tuple(dict.fromkeys(note for turn in turns for note in turn.notes))
        stops = tuple(dict.fromkeys(turn.stop for turn in turns))
        return _Draft(text, turns, 0, stops, notes, bare=self.template.is_raw)

    def _examples(self, draft: _Draft, tokens: dict[str, _Tokens], row: int, part: int) -> list[Example]:
        ids = tokens[draft.text].ids
        mask = [draft.label] * len(ids)
        for turn in draft.turns:
            spans = self._spans(turn, draft.text, tokens)
            if spans is None:
                return self._separate(draft, row, part)
            for begin, end in spans:
                mask[begin:end] = [1 - draft.label] * (end - begin)
        return [self._example(draft, ids, mask, row, part)]

    def _example(self, draft: _Draft, ids: list[int], mask: list[int], row: int, part: int) -> Example:
        bos = self._missing_bos(ids) if draft.bare else []
        mask = [draft.label] * len(bos) + mask
        return Example(bos + ids, mask, row, part, tuple(map(self._id, draft.stops)), draft.notes)

    def _spans(self, turn: RenderedTurn, text: str, tokens: dict[str, _Tokens]) -> list[tuple[int, int]] | None:
        """Where the trained parts of a turn lie in the ids; None if a token reaches over one of their ends."""
        ids = tokens[text].ids
        tail_at, tail = self._tail(turn)
        tail_ids = tokens[tail].ids
        first = 0 if tail_at == 0 else self._token_at(text, tokens, tail_at)
        stop_at = self._token_at(text, tokens, len(turn.text) - len(turn.stop))
        if first is None or stop_at is None or ids[stop_at] != self._id(turn.stop):
            return None
        begin = len(os.path.commonprefix([tail_ids, ids])) if "lenient" in turn.notes else first + len(tail_ids)
        if begin > stop_at or ("lenient" not in turn.notes and ids[first:begin] != tail_ids):
            return None
        index_of = {turn.start: begin, len(turn.text): stop_at + 1}
        for char in {char for part in turn.parts for char in part}.difference(index_of):
            if (index := self._token_at(text, tokens, char)) is None:
                return None
            index_of[char] = index
        return [(index_of[first], index_of[last]) for first, last in turn.parts]

    def _separate(self, draft: _Draft, row: int, part: int) -> list[Example]:
        """One example per turn; where prompt and answer still share a token, each is tokenized by itself."""
        turn = draft.turns[0]
        if draft.label == 1:
            raise UserError(f"turn {turn.number} is not trained, but shares a token with others; set data.train_on")
        if len(draft.turns) == 1 and draft.text == turn.text:
            return [self._split(draft, turn, row, part)]
        drafts = self._per_turn(draft.turns)
        tokens = self._tokenize(drafts)
        return [example for n, single in enumerate(drafts) for example in self._examples(single, tokens, row, part + n)]

    def _split(self, draft: _Draft, turn: RenderedTurn, row: int, part: int) -> Example:
        answer = turn.text[turn.start :]
        # behind something that does not merge with it, because SentencePiece adds a space where a text begins
        leads = (turn.stop, "\n") if turn.parts == ((turn.start, len(turn.text)),) else ()
        tokens = self._encode([turn.prompt, turn.text, *(text for lead in leads for text in (lead, lead + answer))])
        prompt_ids, text_ids = tokens[turn.prompt].ids, tokens[turn.text].ids
        for lead in leads:
            lead_ids, ids = tokens[lead].ids, tokens[lead + answer].ids
            answer_ids = ids[len(lead_ids) :]
            fits = ids[: len(lead_ids)] == lead_ids and answer_ids[-1:] == [self._id(turn.stop)]
            if fits and self._decode(prompt_ids + answer_ids) == self._decode(text_ids):
                draft = replace(draft, notes=(*draft.notes, "split_boundary"))
                mask = [0] * len(prompt_ids) + [1] * len(answer_ids)
                return self._example(draft, prompt_ids + answer_ids, mask, row, part)
        if self.template.unproved == "lenient" and "lenient" not in turn.notes:
            lenient = self._draft(turn.text, (replace(turn, notes=(*turn.notes, "lenient")),))
            return self._examples(lenient, self._tokenize([lenient]), row, part)[0]
        what = f"the prompt's end {turn.prompt[-20:]!r} and the answer {answer[:20]!r}" if leads else "what is marked"
        raise UserError(
            f"turn {turn.number} (assistant): the tokenizer does not keep {what} apart; put a newline or a special "
            "token there (data.chat_template, data.prompt_template), or set data.unproved to lenient"
        )

    def _tail(self, turn: RenderedTurn) -> tuple[int, str]:
        """What of a prompt must be tokenized alone: (where it begins, the text)."""
        at = 0 if not self.tokenizer.is_fast or "lenient" in turn.notes else turn.anchor
        return at, turn.prompt[at:]

    def _token_at(self, text: str, tokens: dict[str, _Tokens], char: int) -> int | None:
        """Index of the token that begins at a character; None if none does."""
        ids, encoding = tokens[text]
        if encoding is None:
            before = self._encode([text[:char]])[text[:char]].ids
            return len(before) if ids[: len(before)] == before else None
        index = encoding.char_to_token(char)
        span = None if index is None else encoding.token_to_chars(index)
        return index if span is not None and span[0] == char else None

    def _tokenize(self, drafts: Iterable[_Draft]) -> dict[str, _Tokens]:
        """The texts of all drafts, and the tails of their prompts."""
        return self._encode(t for draft in drafts for t in (draft.text, *(self._tail(turn)[1] for turn in draft.turns)))

    def _encode(self, texts: Iterable[str]) -> dict[str, _Tokens]:
        if not (unique := list(dict.fromkeys(texts))):
            return {}
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        encoded = self.tokenizer(unique, add_special_tokens=False, **options)
        encodings = encoded.encodings or [None] * len(unique)
        return dict(zip(unique, map(_Tokens, encoded["input_ids"], encodings), strict=True))

    def _missing_bos(self, ids: list[int]) -> list[int]:
        """What stands before a text that no template wrote, unless the text begins with it already."""
        return [] if ids[: len(self._bos_ids)] == self._bos_ids else self._bos_ids

    @cached_property
    def _bos_ids(self) -> list[int]:
        """What the tokenizer puts before a text by itself."""
        plain, ids = self.tokenizer("a", add_special_tokens=False)["input_ids"], self.tokenizer("a")["input_ids"]
        return list(ids[: ids.index(plain[0])])

    def _id(self, token: str) -> int:
        index: Any = self.tokenizer.convert_tokens_to_ids(token)
        return int(index)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
