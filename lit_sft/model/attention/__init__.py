"""Packed attention: examples that lie end to end in a row see only themselves, at the cost of the sum of their squares.

Letters: B rows, H heads, T tokens, K head dimension, S examples.

    lengths 3 2        a b c d e
                     a x . . . .
                     b x x . . .        one causal square per example; nothing outside the squares is computed
                     c x x x . .
                     d . . . x .
                     e . . . x x
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.model.attention import cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PACKED = "lit_sft_packed"
"""Name under which `packed_attention` is known to transformers."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface; without `cu_seq_lens_q` (generation, say) it is the library's own SDPA.

    Args:
        module: The attention layer.
        query: [1, H, T, K].
        key: [1, H_kv, T, K].
        value: [1, H_kv, T, K].
        attention_mask: Given only outside of training; then `cu_seq_lens_q` must be None.
        dropout: Probability.
        scaling: Factor on the scores; None is 1 / sqrt(K).
        sliding_window: Tokens that a position sees, itself included.
        cu_seq_lens_q: [S + 1] where the examples begin, and T.
        max_length_q: Length of the longest example.
        **kwargs: What other implementations need.

    Returns:
        [1, T, H, K] and None in place of the weights.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    if query.is_cuda and query.dtype != torch.float32 and not dropout:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    if torch.is_autocast_enabled(query.device.type):  # as autocast does for SDPA
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.device.type == "cpu" and not dropout and query.dtype in (torch.float32, torch.bfloat16):
        out: Tensor = cpu.packed_attention_cpu(query, key, value, cu_seq_lens_q, scaling, sliding_window)[0]
        return out, None
    return _per_segment(query, key, value, cu_seq_lens_q, dropout, scaling, sliding_window), None


@torch.compiler.disable
def _per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """One call of SDPA per example: [1, H, T, K] -> [1, T, H, K]. For dropout, and fp32 on a GPU."""
    parts = zip(*(tensor.split(bounds.diff().tolist(), dim=2) for tensor in (query, key, value)), strict=True)
    outs = []
    for q, k, v in parts:
        mask = cpu.window_bias(q, sliding_window)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Torch's own variable-length flash attention (CUDA, 16 bit): [1, H, T, K] -> [1, T, H, K]."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def _packed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for packed rows (the lengths say it all); for padded prompts what SDPA would get."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    mask: Any = sdpa_mask
    made: Tensor | None = mask(*args, attention_mask=attention_mask, **kwargs)
    return made


def register() -> None:
    """Makes `PACKED` a name that `attn_implementation` accepts."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _packed_mask)


def choose(config: Any, requested: str) -> str:
    """The implementation for a model: what was asked for, or with `auto` packed attention where the scores allow it.

    Args:
        config: The model's config.
        requested: `model.attn_implementation`.

    Returns:
        A name for `attn_implementation`. Soft-capped scores are only exact in `eager`, with transformers' own mask for
        packs.
    """
    if requested != "auto":
        return requested
    text_config = config.get_text_config()
    if getattr(text_config, "attn_logit_softcapping", None) or text_config.model_type == "gpt_oss":  # capped, or sinks
        log.warning(
            "%s needs scores that SDPA cannot compute: attention falls back to `eager`.", text_config.model_type
        )
        return "eager"
    register()
    return PACKED


@torch.no_grad()
def packs_are_exact(lm: PreTrainedModel, pack_kwargs: Callable[..., dict[str, Any]]) -> bool:
    """Whether a row of two examples gives each the hidden states it has alone (state-space layers, say, do not)."""
    device = lm.device
    vocab_size = lm.config.get_text_config().vocab_size
    first, second = 5, 7
    input_ids = torch.arange(3, 3 + first + second, device=device)[None] % vocab_size
    position_ids = torch.cat([torch.arange(first, device=device), torch.arange(second, device=device)])[None]
    was_training = lm.training
    lm.eval()

    def hidden(start: int, *lengths: int) -> Tensor:
        inputs = {"input_ids": input_ids[:, start:], "position_ids": position_ids[:, start:], "use_cache": False}
        made: Tensor = lm.base_model(**inputs, **pack_kwargs(lengths, device)).last_hidden_state
        return made.float()

    try:
        ours, expected = hidden(0, first, second)[:, first:], hidden(first, second)
    except TypeError:  # an architecture that hands no keyword arguments down to its layers
        return False
    finally:
        lm.train(was_training)
    tolerance = 1e-4 if lm.dtype == torch.float32 else 5e-2
    return torch.allclose(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
