"""Which attention implementation a loaded model uses: read it, and change it.

Every use of transformers' private `_attn_implementation` stands here. There is no public way to
read the name, and the public `set_attn_implementation` skips models with attention code of their
own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_of(lm: PreTrainedModel) -> str:
    """The name of the attention implementation that a model uses, as transformers knows it."""
    name: str = lm.config._attn_implementation
    return name


def set_attention(lm: PreTrainedModel, name: str) -> None:
    """Changes the attention implementation of a model.

    Args:
        lm: The model.
        name: As transformers knows it. For `sdpa`, a model that does not support it gets `eager`.
    """
    if name == "sdpa":
        # Asked for no name, transformers chooses sdpa where the model supports it, and eager
        # otherwise.
        name = lm.get_correct_attn_implementation(None)
    lm.set_attn_implementation(name)
    # Transformers leaves a model with attention code of its own unchanged. Such a model only reads
    # the mask, and the masks follow this name.
    lm.config._attn_implementation = name
