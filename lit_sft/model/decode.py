"""Token ids of an answer -> text, with the model's reasoning between tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHTS = ("<think>", "</think>", "[THINK]", "[/THINK]")
"""Tags of reasoning. They stay in the text, so that reasoning and answer can be told apart. In most
tokenizers they are plain text, in some they are special tokens.
"""
_CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>(.*?)(?:<\|end\|>|\Z)"
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)<\|message\|>|<\|start\|>assistant",
    re.DOTALL,
)
"""Headers of gpt-oss. It writes its reasoning as a separate message in the channel `analysis`,
before the message to the user.
"""


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Sequence[int]
) -> str:
    """Returns the text of an answer, without its stop token and without special tokens.

    Tags of reasoning stay, even if they are special tokens. The reasoning of gpt-oss gets `<think>`
    tags.

    Args:
        tokenizer: The tokenizer of the model.
        ids: Token ids of the answer.
        stop_ids: Ids of stop tokens; one at the end is dropped.
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
    return _with_think_tags(text) if has_channels else text


def _with_think_tags(text: str) -> str:
    """Replaces the channels of gpt-oss by `<think>` tags."""

    def tagged(channel: re.Match[str]) -> str:
        thought = channel[1]
        return "" if thought is None else f"<think>{thought}</think>"

    text = _CHANNEL.sub(tagged, text)
    return re.sub("|".join(map(re.escape, _CHANNELS)), "", text)


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """The texts of special tokens by id. Cached, because some tokenizers have hundreds.

    Args:
        tokenizer: The tokenizer.
        size: Its length, which changes with new tokens and so refreshes the cache.
    """
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special[index] = str(token)
    return special
