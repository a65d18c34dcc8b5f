"""Adds tokens to a tokenizer, and rows for them to the embedding and the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lit_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_MULTIPLE = 64
"""An embedding that must grow gets a multiple of this number of rows, because matrix units are slow
with odd sizes.
"""


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], template: str = ""
) -> list[int]:
    """Adds tokens that are never split.

    Args:
        tokenizer: Gets the tokens.
        tokens: The texts of the tokens.
        template: Text of the chat template. A token in it marks roles, turns or calls. It becomes a
            special token: it may end an answer, and decoded answers leave it out, on servers, too.
            Other tokens (`<answer>`) are text.

    Returns:
        The ids of the tokens.

    Raises:
        UserError: A token is empty, named twice, or already there.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if not token.strip() or token != token.strip():
            raise UserError(f"model.add_tokens: {token!r} is empty or begins or ends with a space")
        if token in known or token in tokens[:number]:
            where = "is in the tokenizer already" if token in known else "is named twice"
            raise UserError(f"model.add_tokens: {token!r} {where}; leave it out")
    added = [AddedToken(token, special=token in template, normalized=False) for token in tokens]
    tokenizer.add_tokens(added)
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


@torch.no_grad()
def make_room(lm: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Adds rows for new tokens to the embedding and the head.

    They start at the mean of the rows before them.

    Args:
        lm: The model, without adapters.
        token_ids: The ids from `add_tokens`: consecutive, and after those of all other tokens.
    """
    first, end = token_ids[0], token_ids[-1] + 1
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
