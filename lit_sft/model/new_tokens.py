"""Adds tokens to a tokenizer, and rows for them to the embedding and the head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lit_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ROWS_MULTIPLE = 64
"""An embedding that must grow gets a multiple of this number of rows, because matrix units are slow
with odd sizes.
"""


def add_tokens(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    template: str = "",
    *,
    rows: int | None = None,
) -> list[int]:
    """Adds tokens that are never split.

    Args:
        tokenizer: Gets the tokens.
        tokens: The texts of the tokens.
        template: Text of the chat template. A token in it marks roles, turns or calls. It becomes a
            special token: it may end an answer, and decoded answers leave it out, on servers, too.
            Other tokens (`<answer>`) are text.
        rows: Rows of the model's embedding. A token of the tokenizer that has no row there may be
            named, too. None if that is not known.

    Returns:
        The ids of the tokens.

    Raises:
        UserError: A token is empty, named twice, or already there.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    if rows is not None:
        known = {token: token_id for token, token_id in known.items() if token_id < rows}
    for number, token in enumerate(tokens):
        if not token.strip() or token != token.strip():
            raise UserError(f"model.add_tokens: {token!r} is empty or begins or ends with a space")
        if token in known or token in tokens[:number]:
            where = "is in the tokenizer already" if token in known else "is named twice"
            raise UserError(f"model.add_tokens: {token!r} {where}; leave it out")
    added = []
    for token in tokens:
        if token not in tokenizer.get_vocab():
            added.append(AddedToken(token, special=token in template, normalized=False))
    tokenizer.add_tokens(added)
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


@torch.no_grad()
def make_room(lm: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Adds rows for new tokens to the embedding and the head.

    They start at the mean of the rows before them.

    Args:
        lm: The model, without adapters.
        token_ids: The ids from `add_tokens`, after those of all other tokens that have rows.
    """
    first, end = min(token_ids), max(token_ids) + 1
    weight: Any = lm.get_input_embeddings().weight
    # Many models have spare rows.
    if end > weight.shape[0]:
        # With `mean_resizing`, transformers draws random values around the mean. A resumed run
        # would draw others.
        lm.resize_token_embeddings(end, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tensors: list[Any] = [embedding.weight, head.weight, head.bias]
    for tensor in tensors:
        if tensor is not None:
            tensor[first:] = tensor[:first].float().mean(0).to(tensor.dtype)


def num_rows(lm: PreTrainedModel) -> int:
    """Returns the number of rows of the model's embedding."""
    embedding: Any = lm.get_input_embeddings()
    return int(embedding.weight.shape[0])


def check_rows(tokenizer: PreTrainedTokenizerBase, largest_id: int, rows: int) -> None:
    """Compares the ids of the tokenizer with the rows of the model's embedding.

    A pad token without a row is replaced by the eos token: masks are computed from positions.

    Args:
        tokenizer: Its pad token may be replaced.
        largest_id: The largest token id in the data.
        rows: From `num_rows`.

    Raises:
        UserError: A token in the data has no row, or neither pad nor eos token has one.
    """
    check_id(tokenizer, largest_id, rows)
    pad_id: Any = tokenizer.pad_token_id
    if pad_id >= rows:
        check_id(
            tokenizer, pad_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id, rows
        )
        log.warning(
            "the pad token %r has no row in the model's embedding: %r is used for padding",
            tokenizer.pad_token,
            tokenizer.eos_token,
        )
        tokenizer.pad_token = tokenizer.eos_token
    outside = []
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token_id >= rows and token_id != pad_id:
            outside.append(token)
    if outside:
        log.warning(
            "%d tokens of the tokenizer, such as %r, have no row in the model's embedding; the data"
            " holds none of them",
            len(outside),
            outside[0],
        )


def check_id(tokenizer: PreTrainedTokenizerBase, token_id: int, rows: int) -> None:
    """Refuses a token id that is not below the number of rows of the embedding.

    Raises:
        UserError: Names the token.
    """
    if token_id < rows:
        return
    token = tokenizer.convert_ids_to_tokens(token_id)
    raise UserError(
        f"the token {token!r} has the id {token_id:,}, and the model's embedding has only"
        f" {rows:,} rows: add a row for it with model.add_tokens, such as --model.add_tokens"
        f" '[\"{token}\"]', or take the tokenizer that belongs to the model"
    )
