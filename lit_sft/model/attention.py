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

import inspect
import logging
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

PACKED = "lit_sft_packed"
"""Name under which `packed_attention` is known to transformers."""

SHORT = 192
"""Tokens below which the CPU kernel cuts an example into its smallest blocks."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface; without `segment_lengths` (generation, say) it is the library's own SDPA.

    Args:
        module: The attention layer.
        query: [1, H, T, K].
        key: [1, H_kv, T, K].
        value: [1, H_kv, T, K].
        attention_mask: Given only outside of training; then `segment_lengths` must be None.
        dropout: Probability.
        scaling: Factor on the scores; None is 1 / sqrt(K).
        sliding_window: Tokens that a position sees, itself included.
        segment_lengths: S lengths of the examples in the row, sum T.
        **kwargs: What other implementations need.

    Returns:
        [1, T, H, K] and None in place of the weights.
    """
    if segment_lengths is None or attention_mask is not None:
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
    if torch.is_autocast_enabled(query.device.type):  # as autocast does for SDPA; rotary embeddings left fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    whole = sliding_window is None or max(segment_lengths) <= sliding_window
    if flash_takes(query, value) and not dropout:
        kernel, out = (
            "torch's variable-length flash kernel",
            _varlen(query, key, value, segment_lengths, scaling, sliding_window),
        )
    elif whole and not dropout and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16):
        kernel, out = "SDPA's CPU kernel", _CPUSegments.apply(query, key, value, segment_lengths, scaling)
    else:
        kernel = "SDPA, example by example"
        out = _per_segment(query, key, value, segment_lengths, dropout, scaling, sliding_window)
    if module.training and not torch.compiler.is_compiling():
        _tell(kernel, query.device.type, str(query.dtype).removeprefix("torch."), query.shape[-1])
    return out, None


@lru_cache
def _tell(kernel: str, device: str, dtype: str, head_size: int) -> None:
    """Says once how a model that is trained attends."""
    log.info("packed attention: %s (%s, %s, head size %s)", kernel, device, dtype, head_size)


def flash_takes(query: Tensor, value: Tensor) -> bool:
    """What torch's flash kernel computes: 16 bits, on NVIDIA GPUs from Ampere on, heads of one size up to 256."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size <= 256
        and size % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


class _CPUSegments(torch.autograd.Function):
    """SDPA's own CPU kernel, example by example, straight into one result: no split, expanded key or concatenation is
    kept. Short examples go backward in fp32: in bf16 that kernel takes four times as long for 64 or 128 tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None
    ) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        groups, norms = query.shape[1] // key.shape[1], []
        parts = zip(out.split(lengths, dim=1), *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        for place, q, k, v in parts:
            k, v = _repeat_heads(k, groups), _repeat_heads(v, groups)
            made, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scaling)
            place.copy_(made.transpose(1, 2))
            norms.append(norm)
        ctx.save_for_backward(query, key, value, out, *norms)
        ctx.lengths, ctx.scaling = lengths, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *norms = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        groups = query.shape[1] // key.shape[1]
        by_example = (x.split(ctx.lengths, dim=2) for x in (*grads, grad.transpose(1, 2), query, key, value))
        for *places, g, q, k, v, o, norm in zip(
            *by_example, out.transpose(1, 2).split(ctx.lengths, dim=2), norms, strict=True
        ):
            inputs = [g, q, _repeat_heads(k, groups), _repeat_heads(v, groups), o]
            if q.shape[2] < SHORT:
                inputs = [x.float() for x in inputs]
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *inputs, norm, 0.0, True, scale=ctx.scaling
            )
            for place, made in zip(places, (dq, dk, dv), strict=True):
                place.copy_(made if made.shape == place.shape else made.unflatten(1, (-1, groups)).sum(2))
        return (*grads, None, None)


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[1, H_kv, L, K] -> [1, H, L, K]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """One call of SDPA per example: [1, H, T, K] -> [1, T, H, K]."""
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outs = []
    for q, k, v in parts:
        mask = _window_mask(q.shape[2], sliding_window, q.device)
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


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] True where attention is allowed; None where plain causal attention is the same."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Torch's own variable-length flash attention (CUDA, 16 bit): [1, H, T, K] -> [1, T, H, K]."""
    from torch.nn.attention.varlen import varlen_attn

    if query.shape[1] != key.shape[1] and not _varlen_takes_groups():
        groups = query.shape[1] // key.shape[1]
        key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    shared: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    bounds = (
        torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device, non_blocking=True)
    )
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        bounds,
        bounds,
        max(lengths),
        max(lengths),
        scale=scaling,
        window_size=window,
        **shared,
    )
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache
def _varlen_takes_groups() -> bool:
    """Whether heads may share keys and values; torch 2.11 may not know the argument."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


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
