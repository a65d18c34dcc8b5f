"""Reads and changes the attention implementation of a loaded model.

All uses of transformers' private `_attn_implementation` are in this file. There is no public way to
read the name, and the public `set_attn_implementation` skips models with custom attention code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_of(lm: PreTrainedModel) -> str:
    """Returns transformers' name of the attention implementation that a model uses."""
    name: str = lm.config._attn_implementation
    return name


def set_attention(lm: PreTrainedModel, name: str) -> None:
    """Changes the attention implementation of a model.

    Args:
        lm: The model.
        name: transformers' name. Instead of `sdpa`, a model that does not support it gets `eager`.
    """
    if name == "sdpa":
        # For None, transformers chooses sdpa if the model supports it, and eager otherwise.
        name = lm.get_correct_attn_implementation(None)
    lm.set_attn_implementation(name)
    # transformers leaves a model with custom attention code unchanged. Such a model only reads the
    # mask, and this name chooses the mask.
    lm.config._attn_implementation = name
