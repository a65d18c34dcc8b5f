"""Token ids of an answer -> its text, with the model's thoughts between marks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHTS = ("<think>", "</think>", "[THINK]", "[/THINK]")
"""Marks that stay in the text of an answer, so that thoughts can be told from it; most tokenizers
have them as text.
"""
_CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>(.*?)(?:<\|end\|>|\Z)"
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)<\|message\|>|<\|start\|>assistant",
    re.DOTALL,
)
"""Headers of gpt-oss, which thinks in a message of its own, in the channel `analysis`, before the
one to the user.
"""


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Sequence[int]
) -> str:
    """The text of an answer, without its stop token and without special tokens.

    Marks of thoughts stay, whatever they are to the tokenizer; what gpt-oss thinks is put between
    `<think>` marks.
    """
    if not ids:
        return ""
    if ids[-1] in set(stop_ids):
        ids = ids[:-1]
    special = _special_tokens(tokenizer, len(tokenizer))
    has_channels = "<|channel|>" in special.values()
    marks = _THOUGHTS + _CHANNELS if has_channels else _THOUGHTS
    kept = [token_id for token_id in ids if token_id not in special or special[token_id] in marks]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return _thoughts_marked(text) if has_channels else text


def _thoughts_marked(text: str) -> str:
    """An answer with the channels of gpt-oss -> the same with `<think>` marks."""

    def marked(channel: re.Match[str]) -> str:
        thought = channel[1]
        return "" if thought is None else f"<think>{thought}</think>"

    text = _CHANNEL.sub(marked, text)
    return re.sub("|".join(map(re.escape, _CHANNELS)), "", text)


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Texts by id, collected once: some tokenizers have hundreds. `size` tells when there are new
    ones.
    """
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return special | {
        index: str(token)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
