"""Packed attention on a CPU, as one operation: the kernel is that of torch's SDPA.

Letters: H heads, T tokens, K head dimension, S examples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHORT = 192
"""Tokens below which the CPU kernel cuts an example into its smallest blocks."""


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes it: fp32 or bf16 on a CPU, heads of one size."""
    known = query.dtype in (torch.float32, torch.bfloat16)
    return query.device.type == "cpu" and known and query.shape[-1] == value.shape[-1]


@torch.library.custom_op(
    "lit_sft::packed_attention_cpu",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor bounds, float? scale, int? window) -> (Tensor, Tensor)",
)
def packed_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """SDPA's own CPU kernel, example by example, straight into one result: no split, expanded key or concatenation is
    kept. Short examples go backward in fp32: in bf16 that kernel takes four times as long for 64 or 128 tokens.

    One operation for torch.compile, which would unroll the loop over the examples of each pack.

    Returns:
        [1, T, H, K], and the logarithms of the sums of the scores, [1, H, T].
    """
    out, norms = _made(query)
    groups, lengths = query.shape[1] // key.shape[1], bounds.diff().tolist()
    inputs = (x.split(lengths, dim=2) for x in (query, key, value))
    for place, norm, q, k, v in zip(out.split(lengths, dim=1), norms.split(lengths, dim=2), *inputs, strict=True):
        k, v, mask = repeat_heads(k, groups), repeat_heads(v, groups), window_bias(q, window)
        made, made_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling
        )
        place.copy_(made.transpose(1, 2))
        norm.copy_(made_norm)
    return out, norms


@packed_attention_cpu.register_fake
def _made(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "lit_sft::packed_attention_cpu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor norms, Tensor bounds, float? scale, "
    "int? window) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norms: Tensor,
    bounds: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    groups, lengths = query.shape[1] // key.shape[1], bounds.diff().tolist()
    tensors = (*grads, grad.transpose(1, 2), query, key, value, out.transpose(1, 2), norms)
    for *places, g, q, k, v, o, norm in zip(*(x.split(lengths, dim=2) for x in tensors), strict=True):
        inputs = [g, q, repeat_heads(k, groups), repeat_heads(v, groups), o]
        if q.shape[2] < SHORT:
            inputs = [x.float() for x in inputs]
        mask = window_bias(inputs[1], window)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, norm.contiguous(), 0.0, mask is None, attn_mask=mask, scale=scaling
        )
        for place, made in zip(places, (dq, dk, dv), strict=True):
            place.copy_(made if made.shape == place.shape else made.unflatten(1, (-1, groups)).sum(2))
    return grads


@_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bounds, out, norms = ctx.saved_tensors
    made = _backward_op(grad, query, key, value, out, norms, bounds, ctx.scaling, ctx.window)
    return (*made, None, None, None)


packed_attention_cpu.register_autograd(_backward, setup_context=_keep)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[1, H_kv, L, K] -> [1, H, L, K]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def window_bias(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """[L, L] 0 where attention is allowed, else -inf; None where plain causal attention is the same."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    bias = torch.zeros(length, length, dtype=query.dtype, device=query.device)
    return bias.masked_fill_((distance < 0) | (distance >= sliding_window), float("-inf"))
