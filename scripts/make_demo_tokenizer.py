"""Writes the tokenizer of the built-in model, after a change of the built-in task.

    python scripts/make_demo_tokenizer.py

The tokens are all bytes, the special tokens, and the frequent words of the training split, which
halve the length of the rows. Digits, signs and the letters of rare words stay single bytes.
"""

from __future__ import annotations

import re
from collections import Counter

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lit_sft.demo import builtin as demo

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")
MIN_COUNT = 20


def build() -> Tokenizer:
    """Builds the tokenizer. The id of a byte is its value."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [
        message["content"]
        for row in demo.rows("arithmetic", "train")
        for message in row["messages"]
    ]
    pieces = Counter(piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    words = {
        piece
        for piece, count in pieces.items()
        if count >= MIN_COUNT and re.fullmatch(r"Ġ?[A-Za-z]{2,}", piece)
    }
    vocabulary = [*_byte_symbols(), *SPECIAL_TOKENS, *sorted(words.union(ROLES))]
    # With ignore_merges, a word of the vocabulary becomes one token, and all others become bytes.
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _byte_symbols() -> list[str]:
    """Returns {byte: visible character that stands for it in byte-level vocabularies}."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    invisible = [byte for byte in range(256) if byte not in visible]
    symbols = {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + i) for i, byte in enumerate(invisible)
    }
    return [symbols[byte] for byte in range(256)]


if __name__ == "__main__":
    path = demo.model_dir("demo") / "tokenizer.json"
    path.write_text(build().to_str(pretty=False) + "\n", encoding="utf-8")
    print(f"{path}: {build().get_vocab_size()} tokens")
