r"""Conversation -> Examples: token ids and loss mask, proved against the prompt of a server.

    prompt     <|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n
    example    <|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n Hello <|im_end|> \n
    loss_mask        0       0    0  0      0      0       0          0      0   1       1       0

`assistant_turns` proves that the text of an example begins with the text of its prompt. This module
proves the same for token ids: the ids before the trained ones are the ids of the prompt alone. A
tokenizer splits a text at special tokens before it merges anything, so the ids can differ only
behind the last special token of the prompt, the anchor. This tail of the prompt is tokenized alone
and compared. Masks go by position, never by token id, so a padding token may also be eos.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_sft.data.assistant_turns import (
    Draft,
    TrainOn,
    drafts_per_turn,
    make_drafts,
    write_prompt,
)
from lit_sft.data.chat_template import ChatTemplate, Span
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Example, RenderedTurn

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


class _BoundaryInsideToken(Exception):
    """A trained part of a turn begins or ends inside a token."""


class _Tokens(NamedTuple):
    ids: list[int]
    encoding: Encoding | None
    """None if the tokenizer gives no offsets."""


@dataclass(frozen=True, eq=False)
class Renderer:
    """Renders and tokenizes conversations, and marks the trained tokens.

    Args:
        tokenizer: Any tokenizer of transformers.
        template: The chat template.
        train_on: `completions`: every assistant turn; `last_completion`: the last one; `all`: every
            token. A turn's own `train` wins.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    train_on: TrainOn = "completions"

    def render(
        self, conversations: Sequence[Conversation], rows: Sequence[int]
    ) -> list[list[Example] | UserError]:
        """Renders conversations; all their texts are tokenized in one call.

        Args:
            conversations: K of them.
            rows: K numbers for `Example.row`.

        Returns:
            K results: the examples of a conversation (several if the template rewrites history), or
            its error. The error names no row, because the caller knows file and line.
        """
        written: list[list[Draft] | UserError] = []
        drafts: list[Draft] = []
        for conversation in conversations:
            try:
                own = make_drafts(self.template, conversation, self.train_on)
            except UserError as error:
                written.append(error)
                continue
            written.append(own)
            drafts += own
        tokens = self._encode_drafts(drafts)
        results: list[list[Example] | UserError] = []
        for item, row in zip(written, rows, strict=True):
            if isinstance(item, UserError):
                results.append(item)
                continue
            try:
                results.append(self._examples(item, tokens, row))
            except UserError as error:
                results.append(error)
        return results

    def prompt(self, conversation: Conversation) -> list[int]:
        """Returns the token ids that a server feeds the model for the next assistant turn.

        Args:
            conversation: If the last turn is the assistant's, it is the answer. Its prompt is the
                same as in training, with the same switch of the template.

        Raises:
            UserError: The template cannot write it.
        """
        text = conversation.text
        if text is None:
            text = write_prompt(self.template, conversation)
        ids = self._encode([text])[text].ids
        if conversation.text is None and not self.template.is_raw:
            return ids
        return [*self._missing_bos(ids), *ids]

    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that decides the result of `render`, as plain JSON values."""
        if self.tokenizer.is_fast:
            # Truncation and padding change with every call. They stand before the vocabulary.
            vocabulary = self.tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2]
        else:
            vocabulary = json.dumps(
                [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
            )
        return {
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "special_tokens": self.tokenizer.special_tokens_map,
            "train_on": self.train_on,
            **self.template.fingerprint(),
        }

    def _examples(
        self, drafts: Sequence[Draft], tokens: dict[str, _Tokens], row: int, part: int = 0
    ) -> list[Example]:
        """Makes the examples of some drafts of a row.

        Args:
            drafts: Drafts of the row.
            tokens: Text -> its tokens.
            row: Number of the row.
            part: Number of the first example in the row.

        Raises:
            UserError: Prompt and answer share a token, and cannot be separated.
        """
        examples: list[Example] = []
        for draft in drafts:
            number = part + len(examples)
            try:
                examples.append(self._proved_example(draft, tokens, row, number))
            except _BoundaryInsideToken:
                examples += self._separated_examples(draft, row, number)
        return examples

    def _proved_example(
        self, draft: Draft, tokens: dict[str, _Tokens], row: int, part: int
    ) -> Example:
        """Makes the example of a draft that is tokenized as a whole.

        Raises:
            _BoundaryInsideToken: The ids before a trained part differ from the ids of the prompt.
        """
        ids = tokens[draft.text].ids
        mask = [draft.default_mask] * len(ids)
        for turn in draft.turns:
            for begin, end in self._spans(turn, draft.text, tokens):
                mask[begin:end] = [1 - draft.default_mask] * (end - begin)
        return self._example(draft, ids, mask, row, part)

    def _example(
        self, draft: Draft, ids: list[int], mask: list[int], row: int, part: int
    ) -> Example:
        bos = self._missing_bos(ids) if draft.needs_bos else []
        return Example(
            input_ids=bos + ids,
            loss_mask=[draft.default_mask] * len(bos) + mask,
            row=row,
            part=part,
            stop_ids=tuple(self._id(stop) for stop in draft.stops),
            notes=draft.notes,
        )

    def _spans(self, turn: RenderedTurn, text: str, tokens: dict[str, _Tokens]) -> list[Span]:
        """Finds the trained parts of a turn in the ids of a text.

        Raises:
            _BoundaryInsideToken: A token crosses the start or the end of a part.
        """
        ids = tokens[text].ids
        stop_at = self._token_at(text, tokens, len(turn.text) - len(turn.stop))
        begin = self._begin_of_answer(turn, text, tokens)
        if ids[stop_at] != self._id(turn.stop) or begin > stop_at:
            raise _BoundaryInsideToken
        index_of = {turn.start: begin, len(turn.text): stop_at + 1}
        for part in turn.parts:
            for char in part:
                if char not in index_of:
                    index_of[char] = self._token_at(text, tokens, char)
        return [(index_of[first], index_of[last]) for first, last in turn.parts]

    def _begin_of_answer(self, turn: RenderedTurn, text: str, tokens: dict[str, _Tokens]) -> int:
        """Finds the first token of a turn: the ids before it are the ids of the prompt alone.

        Raises:
            _BoundaryInsideToken: The ids of the prompt differ from those in the text.
        """
        ids = tokens[text].ids
        tail_ids = tokens[turn.prompt[turn.anchor :]].ids
        if "lenient" in turn.notes:
            # The anchor of a lenient turn is 0, so these are the ids of the whole prompt.
            common = len(os.path.commonprefix([tail_ids, ids]))
            return max(common, self._token_with(text, tokens, turn.start))
        first = 0 if turn.anchor == 0 else self._token_at(text, tokens, turn.anchor)
        begin = first + len(tail_ids)
        if ids[first:begin] != tail_ids:
            raise _BoundaryInsideToken
        return begin

    def _token_at(self, text: str, tokens: dict[str, _Tokens], char: int) -> int:
        """Finds the token that begins at a character.

        Raises:
            _BoundaryInsideToken: No token begins there.
        """
        ids, encoding = tokens[text]
        if encoding is None:
            before = self._encode([text[:char]])[text[:char]].ids
            if ids[: len(before)] != before:
                raise _BoundaryInsideToken
            return len(before)
        index = encoding.char_to_token(char)
        span = None if index is None else encoding.token_to_chars(index)
        if index is None or span is None or span[0] != char:
            raise _BoundaryInsideToken
        return int(index)

    def _token_with(self, text: str, tokens: dict[str, _Tokens], char: int) -> int:
        """Finds the token that contains a character, or the next one if none does."""
        ids, encoding = tokens[text]
        if encoding is None:
            before = self._encode([text[:char]])[text[:char]].ids
            return len(os.path.commonprefix([ids, before]))
        for position in range(char, len(text)):
            index = encoding.char_to_token(position)
            if index is not None:
                return int(index)
        return len(ids)

    def _separated_examples(self, draft: Draft, row: int, part: int) -> list[Example]:
        """Makes one example per turn, because prompt and answer share a token.

        If a single turn still has this problem, prompt and answer are tokenized separately.
        """
        turn = draft.turns[0]
        if draft.default_mask == 1:
            raise UserError(
                f"turn {turn.number} is not trained, but shares a token with others; set"
                " data.train_on"
            )
        if len(draft.turns) == 1 and draft.text == turn.text:
            return [self._split_example(draft, turn, row, part)]
        drafts = drafts_per_turn(draft.turns, draft.needs_bos)
        return self._examples(drafts, self._encode_drafts(drafts), row, part)

    def _split_example(self, draft: Draft, turn: RenderedTurn, row: int, part: int) -> Example:
        """Makes the example of one turn whose prompt and answer share a token.

        Raises:
            UserError: They cannot be tokenized separately, and `unproved` is not lenient.
        """
        is_trained_as_a_whole = turn.parts == ((turn.start, len(turn.text)),)
        if is_trained_as_a_whole:
            apart = self._tokenize_apart(turn)
            if apart is not None:
                prompt_ids, answer_ids = apart
                mask = [0] * len(prompt_ids) + [1] * len(answer_ids)
                draft = replace(draft, notes=(*draft.notes, "split_boundary"))
                return self._example(draft, prompt_ids + answer_ids, mask, row, part)
        if self.template.unproved == "lenient" and "lenient" not in turn.notes:
            return self._lenient_example(draft, turn, row, part)
        what = "what is marked"
        if is_trained_as_a_whole:
            what = (
                f"the prompt's end {turn.prompt[-20:]!r} and the answer"
                f" {turn.text[turn.start :][:20]!r}"
            )
        raise UserError(
            f"turn {turn.number} (assistant): the tokenizer does not keep {what} apart; put a"
            " newline or a special token there (data.chat_template, data.prompt_template), or set"
            " data.unproved to lenient"
        )

    def _tokenize_apart(self, turn: RenderedTurn) -> tuple[list[int], list[int]] | None:
        """Tokenizes prompt and answer separately, as at inference.

        Returns:
            The ids of both; None if they do not decode to the text of the turn.
        """
        answer = turn.text[turn.start :]
        # SentencePiece adds a space at the start of a text. So the answer is tokenized after a
        # lead that it does not merge with.
        leads = (turn.stop, "\n")
        texts = [turn.prompt, turn.text]
        for lead in leads:
            texts += [lead, lead + answer]
        tokens = self._encode(texts)
        prompt_ids = tokens[turn.prompt].ids
        for lead in leads:
            lead_ids = tokens[lead].ids
            ids = tokens[lead + answer].ids
            answer_ids = ids[len(lead_ids) :]
            if ids[: len(lead_ids)] != lead_ids or answer_ids[-1:] != [self._id(turn.stop)]:
                continue
            if self._decode(prompt_ids + answer_ids) == self._decode(tokens[turn.text].ids):
                return prompt_ids, answer_ids
        return None

    def _lenient_example(self, draft: Draft, turn: RenderedTurn, row: int, part: int) -> Example:
        """Makes the example of one turn, trained from the end of the common prefix of the ids."""
        turn = replace(turn, anchor=0, notes=(*turn.notes, "lenient"))
        drafts = [replace(draft, turns=(turn,), notes=(*draft.notes, "lenient"))]
        return self._examples(drafts, self._encode_drafts(drafts), row, part)[0]

    def _encode_drafts(self, drafts: Iterable[Draft]) -> dict[str, _Tokens]:
        """Tokenizes the texts of drafts, and the tails of their prompts."""
        texts = []
        for draft in drafts:
            texts.append(draft.text)
            texts += [turn.prompt[turn.anchor :] for turn in draft.turns]
        return self._encode(texts)

    def _encode(self, texts: Iterable[str]) -> dict[str, _Tokens]:
        """Tokenizes texts, each of them once, and returns {text: tokens}."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        encoded = self.tokenizer(
            unique,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encodings = encoded.encodings or [None] * len(unique)
        tokens = {}
        for text, ids, encoding in zip(unique, encoded["input_ids"], encodings, strict=True):
            tokens[text] = _Tokens(ids, encoding)
        return tokens

    def _missing_bos(self, ids: list[int]) -> list[int]:
        """Returns the bos ids for a text without a template; none if it has them already."""
        if ids[: len(self._bos_ids)] == self._bos_ids:
            return []
        return self._bos_ids

    @cached_property
    def _bos_ids(self) -> list[int]:
        """Ids that the tokenizer adds before a text by default."""
        plain_ids = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        ids = self.tokenizer("a")["input_ids"]
        return list(ids[: ids.index(plain_ids[0])])

    def _id(self, token: str) -> int:
        index: Any = self.tokenizer.convert_tokens_to_ids(token)
        return int(index)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
