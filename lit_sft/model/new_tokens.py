"""New tokens: known to the tokenizer, and with rows of their own in the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lit_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_MULTIPLE = 64
"""An embedding that has to grow gets a multiple of this many rows: matrix units are slow with odd
sizes.
"""


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], template: str = ""
) -> list[int]:
    """Adds tokens that are never split.

    Args:
        tokenizer: Is changed.
        tokens: Their texts.
        template: Text of the chat template. A token that it writes marks roles, turns or calls, and
            so is special: it may end an answer, and is left out of decoded ones, by servers, too.
            Others (`<answer>`) are text.

    Returns:
        Their ids.

    Raises:
        UserError: One is empty, named twice, or already there.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if not token.strip() or token != token.strip():
            raise UserError(f"model.add_tokens: {token!r} is empty or begins or ends with a space")
        if token in known or token in tokens[:number]:
            where = "is in the tokenizer already" if token in known else "is named twice"
            raise UserError(f"model.add_tokens: {token!r} {where}; leave it out")
    tokenizer.add_tokens(
        [AddedToken(token, special=token in template, normalized=False) for token in tokens]
    )
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


@torch.no_grad()
def make_room(lm: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Starts the rows of new tokens at the mean of those before them, in the embedding and in the
    head.

    Args:
        lm: The model, before adapters are put into it.
        token_ids: What `add_tokens` returned: consecutive, behind all other tokens.
    """
    first, end = token_ids[0], token_ids[-1] + 1
    rows: Any = lm.get_input_embeddings().weight
    if end > rows.shape[0]:
        # Many models have rows to spare.
        # transformers' own start values are drawn at random around the mean: a resumed run would
        # draw others
        lm.resize_token_embeddings(end, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tensors: list[Any] = [embedding.weight, head.weight, head.bias]
    for tensor in tensors:
        if tensor is not None:
            tensor[first:] = tensor[:first].float().mean(0).to(tensor.dtype)
