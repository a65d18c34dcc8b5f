"""Rotary frequencies that depend on the length of the text: of each example, not of the row.

Two types of rotary positions take other frequencies for long texts. `longrope` (Phi-3, Phi-4-mini)
has two sets, `dynamic` recomputes them. transformers (`modeling_rope_utils.dynamic_rope_update`)
decides by the largest position of the whole input, so that an example would depend on the longest
one beside it, and `dynamic` keeps the frequencies of one text for the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_by_example(lm: PreTrainedModel) -> None:
    """Makes the rotary embeddings of a model choose their frequencies for each example alone.

    Args:
        lm: The model. Its rotary embeddings are called with `position_ids` [B, T] in which each
            example counts up in steps of 1.
    """
    for module in lm.modules():
        if _depends_on_length(module):
            _choose_by_example(module)


def _depends_on_length(module: nn.Module) -> bool:
    """Whether this is a rotary embedding whose frequencies depend on the length of its input."""
    if not type(module).__name__.endswith("RotaryEmbedding"):
        return False
    types = getattr(module, "rope_type", None)
    # Gemma 3, for example, has one type for each type of layer.
    names = types.values() if isinstance(types, dict) else [types]
    return any("dynamic" in str(name) or name == "longrope" for name in names)


def _choose_by_example(rotary: Any) -> None:
    embed = rotary.forward

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if position_ids.ndim != 2:
            # Positions in pictures have three coordinates.
            return embed(x, position_ids, *args, **kwargs)
        rows = []
        for row in position_ids:
            parts = []
            for positions in row.split(_lengths(row)):
                _forget(rotary)
                parts.append(embed(x, positions[None], *args, **kwargs))
            rows.append(_join(parts, dim=1))
        return _join(rows, dim=0)

    rotary.forward = forward


def _lengths(positions: Tensor) -> list[int]:
    """Returns the lengths of the runs that count up in steps of 1, in positions [T]."""
    restarts = (positions.diff() != 1).nonzero()[:, 0] + 1
    ends = [0, *restarts.tolist(), len(positions)]
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def _forget(rotary: Any) -> None:
    """Gives a `dynamic` embedding the state that it had before its first input."""
    for name, buffer in list(rotary.named_buffers(recurse=False)):
        prefix, mark, _ = name.partition("original_inv_freq")
        if not mark:
            continue
        # A new tensor, because `longrope` writes into it.
        setattr(rotary, f"{prefix}inv_freq", buffer.clone())
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)


def _join(parts: list[Any], dim: int) -> Any:
    """Concatenates tensors, or tuples of tensors such as (cos, sin), each [B, T, ...]."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=dim)
    return tuple(torch.cat(tensors, dim=dim) for tensors in zip(*parts, strict=True))
