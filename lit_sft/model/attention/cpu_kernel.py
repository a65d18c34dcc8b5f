"""Packed attention on a CPU, as one operation: the kernel is that of torch's SDPA, backward in bf16
our own.

Letters: H heads, T tokens, L tokens of one example, K head dimension, S examples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHORT = 128
"""Tokens below which SDPA's kernel goes backward faster, in fp32: in bf16 it takes four times as
long for 64 or 128.
"""
BLOCK = 256
"""Queries whose scores exist at once in the backward pass: they meet no key behind them, and stay
in a CPU's cache.
"""


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes it: fp32 or bf16 on a CPU, heads of one size."""
    known = query.dtype in (torch.float32, torch.bfloat16)
    return query.device.type == "cpu" and known and query.shape[-1] == value.shape[-1]


@torch.library.custom_op(
    "lit_sft::packed_attention_cpu",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor bounds, float? scale, int? window) -> (Tensor,"
        " Tensor)"
    ),
)
def packed_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """SDPA's own CPU kernel, example by example, straight into one result: no split, expanded key
    or concatenation is kept.

    One operation for torch.compile, which would unroll the loop over the examples of each pack.

    Returns:
        [1, T, H, K], and the logarithms of the sums of the scores, [1, H, T].
    """
    out, norms = _made(query)
    groups, lengths = query.shape[1] // key.shape[1], bounds.diff().tolist()
    inputs = (x.split(lengths, dim=2) for x in (query, key, value))
    for place, norm, q, k, v in zip(
        out.split(lengths, dim=1), norms.split(lengths, dim=2), *inputs, strict=True
    ):
        k, v, mask = repeat_heads(k, groups), repeat_heads(v, groups), window_bias(q, window)
        # The public SDPA does not return the logarithms of the sums, which the backward pass needs.
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
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor norms, Tensor bounds,"
        " float? scale, int? window) -> (Tensor, Tensor, Tensor)"
    ),
)
def _backward_op(  # noqa: PLR0913 - as the schema has them
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
    tensors = (*grads, grad.transpose(1, 2), query, key, value, out.transpose(1, 2), norms)
    for *places, g, q, k, v, o, norm in zip(
        *(x.split(bounds.diff().tolist(), dim=2) for x in tensors), strict=True
    ):
        plain = (
            q.dtype != torch.bfloat16 or q.shape[2] < SHORT or window_bias(q, window) is not None
        )
        backward = _backward_by_kernel if plain else _backward_by_products
        for place, made in zip(places, backward(g, q, k, v, o, norm, scaling, window), strict=True):
            place.copy_(made)
    return grads


def _backward_by_kernel(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    norm: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One example by the kernel of SDPA."""
    groups = q.shape[1] // k.shape[1]
    inputs = [g, q, repeat_heads(k, groups), repeat_heads(v, groups), o]
    if q.shape[2] < SHORT:
        inputs = [x.float() for x in inputs]
    mask = window_bias(inputs[1], window)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *inputs, norm.contiguous(), 0.0, mask is None, attn_mask=mask, scale=scaling
    )
    return dq, dk.unflatten(1, (-1, groups)).sum(2), dv.unflatten(1, (-1, groups)).sum(2)


def _backward_by_products(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    norm: Tensor,
    scaling: float | None,
    _: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One example in bf16 by five matrix products, of which oneDNN makes twice as much as SDPA's
    kernel does of its own (2.7 ms instead of 5.5 for 330 tokens, 9 heads of 64, two threads), as
    exactly: two more columns subtract within the products, in fp32, what has to be subtracted from
        scores and gradients before they are rounded. Heads
    that share a key are rows of one product.
    """
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    length, dim, heads = q.shape[2], q.shape[3], (k.shape[1], -1)
    # [1, H, L], what the softmax subtracts.
    mean = torch.linalg.vecdot(g.float(), o.float())
    # [H_kv, groups, L, K + 2].
    queries = torch.cat([q, _in_two(norm / -scale)], -1)[0].unflatten(0, heads)
    grads = torch.cat([g, _in_two(-mean)], -1)[0].unflatten(0, heads)
    ones = k.new_ones(k.shape[1], length, 2)
    # [H_kv, L, K + 2].
    keys, values = torch.cat([k[0], ones], -1), torch.cat([v[0], ones], -1)
    dq = q.new_empty(q.shape[1:]).unflatten(0, heads)
    dk, dv = (k.new_zeros(k.shape[1:], dtype=torch.float32) for _ in range(2))
    for start in range(0, length, BLOCK):
        rows, seen = slice(start, start + BLOCK), slice(0, start + BLOCK)
        q_rows, g_rows = queries[:, :, rows].flatten(1, 2), grads[:, :, rows].flatten(1, 2)
        probabilities = torch.bmm(q_rows, keys[:, seen].mT).mul_(scale).exp_()
        probabilities.unflatten(1, (queries.shape[1], -1))[..., start:].tril_()
        dv[:, seen] += torch.bmm(probabilities.mT, g_rows[..., :dim])
        scores = torch.bmm(g_rows, values[:, seen].mT).mul_(probabilities)
        dq[:, :, rows] = torch.bmm(scores, keys[:, seen, :dim]).mul_(scale).view_as(dq[:, :, rows])
        dk[:, seen] += torch.bmm(scores.mT, q_rows[..., :dim])
    return dq.flatten(0, 1)[None], dk.mul_(scale)[None], dv[None]


def _in_two(x: Tensor) -> Tensor:
    """fp32 numbers as sums of two in bf16, 16 bits together: [...] -> [..., 2]."""
    high = x.bfloat16()
    return torch.stack([high, (x - high).bfloat16()], -1)


@_backward_op.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
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
    """[L, L] 0 where attention is allowed, else -inf; None where plain causal attention is the
    same.
    """
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    bias = torch.zeros(length, length, dtype=query.dtype, device=query.device)
    return bias.masked_fill_((distance < 0) | (distance >= sliding_window), float("-inf"))
