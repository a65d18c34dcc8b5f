"""Packed attention on a CPU, as one operation of torch.

It calls the CPU kernel of torch's SDPA for each example. The backward pass of long examples in
bf16 is our own, because it is faster.

Letters: H heads, T tokens, L tokens of one example, K head dimension, S examples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHORT = 128
"""Tokens below which the backward pass uses SDPA's kernel, in fp32. In bf16 that kernel takes four
times as long for 64 or 128 tokens.
"""
BLOCK = 256
"""Queries whose scores exist at once in our backward pass. The scores stay in a CPU's cache, and
keys after the block are skipped.
"""


def supports(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel supports these inputs: fp32 or bf16 on a CPU, heads of one size."""
    is_known_dtype = query.dtype in (torch.float32, torch.bfloat16)
    is_one_size = query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and is_known_dtype and is_one_size


@torch.library.custom_op(
    "lit_sft::packed_attention_cpu",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor bounds, float? scale, int? window,"
        " Tensor? sinks=None) -> (Tensor, Tensor)"
    ),
)
def packed_attention_cpu(  # noqa: PLR0913 - as the schema has them
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scaling: float | None,
    window: int | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Calls SDPA's CPU kernel for each example, and writes the results into one tensor.

    Neither the splits, nor the repeated keys, nor a concatenation are kept for backward. It is one
    operation, because torch.compile would unroll the loop over the examples of each pack.

    An attention sink is one more score of each position, of a key whose value is 0. So it changes
    the results by a factor, and the backward pass of SDPA is right when it gets the changed results
    and log-sum-exps.

    Args:
        query: [1, H, T, K].
        key: [1, H_kv, T, K].
        value: [1, H_kv, T, K].
        bounds: [S + 1] the position where each example begins, and T.
        scaling: Factor on the scores. None means 1 / sqrt(K).
        window: Number of tokens that a position attends to. None for all before it.
        sinks: [H] the score of the sink of each head, or None.

    Returns:
        The result [1, T, H, K], and the log-sum-exp of the scores [1, H, T].
    """
    out, norms = _empty_results(query)
    groups = query.shape[1] // key.shape[1]
    lengths = bounds.diff().tolist()
    inputs = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = (out.split(lengths, dim=1), norms.split(lengths, dim=2))
    for out_part, norm_part, q, k, v in zip(*outputs, *inputs, strict=True):
        k = repeat_heads(k, groups)
        v = repeat_heads(v, groups)
        mask = window_bias(q, window)
        # The public SDPA does not return the log-sum-exp, which the backward pass needs.
        result, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling
        )
        out_part.copy_(result.transpose(1, 2))
        norm_part.copy_(norm)
    if sinks is None:
        return out, norms
    # [1, H, 1].
    scores = sinks.float()[None, :, None]
    # [1, T, H, 1], the share of the attention that the sink leaves.
    kept = torch.sigmoid(norms - scores).transpose(1, 2)[..., None]
    return out.mul_(kept), torch.logaddexp(norms, scores)


@packed_attention_cpu.register_fake
def _empty_results(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
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
    grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    tensors = (*grads, grad.transpose(1, 2), query, key, value, out.transpose(1, 2), norms)
    lengths = bounds.diff().tolist()
    examples = zip(*(x.split(lengths, dim=2) for x in tensors), strict=True)
    for dq_part, dk_part, dv_part, g, q, k, v, o, norm in examples:
        is_plain_bf16 = q.dtype == torch.bfloat16 and window_bias(q, window) is None
        if not is_plain_bf16 or q.shape[2] < SHORT:
            dq, dk, dv = _backward_by_kernel(g, q, k, v, o, norm, scaling, window)
        else:
            dq, dk, dv = _backward_by_products(g, q, k, v, o, norm, scaling)
        dq_part.copy_(dq)
        dk_part.copy_(dk)
        dv_part.copy_(dv)
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
    """Backward pass of one example by SDPA's kernel."""
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass of one example in bf16, by five matrix products.

    oneDNN computes these twice as fast as SDPA's kernel (2.7 ms instead of 5.5 for 330 tokens, 9
    heads of 64, two threads). It is as exact: scores and gradients need a number subtracted before
    they are rounded to bf16, and two more columns in the factors do so within the products, in
    fp32. Query heads that share a key are rows of one product.
    """
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    length, dim = q.shape[2], q.shape[3]
    heads = (k.shape[1], -1)
    # [1, H, L], the term that the backward pass of the softmax subtracts.
    mean = torch.linalg.vecdot(g.float(), o.float())
    # [H_kv, groups, L, K + 2].
    queries = torch.cat([q, _as_two_bf16(norm / -scale)], -1)[0].unflatten(0, heads)
    grads = torch.cat([g, _as_two_bf16(-mean)], -1)[0].unflatten(0, heads)
    ones = k.new_ones(k.shape[1], length, 2)
    # [H_kv, L, K + 2].
    keys = torch.cat([k[0], ones], -1)
    values = torch.cat([v[0], ones], -1)
    dq = q.new_empty(q.shape[1:]).unflatten(0, heads)
    dk = k.new_zeros(k.shape[1:], dtype=torch.float32)
    dv = k.new_zeros(k.shape[1:], dtype=torch.float32)
    for start in range(0, length, BLOCK):
        rows = slice(start, start + BLOCK)
        # The keys that these queries may attend to.
        seen = slice(0, start + BLOCK)
        q_rows = queries[:, :, rows].flatten(1, 2)
        g_rows = grads[:, :, rows].flatten(1, 2)
        probabilities = torch.bmm(q_rows, keys[:, seen].mT).mul_(scale).exp_()
        probabilities.unflatten(1, (queries.shape[1], -1))[..., start:].tril_()
        dv[:, seen] += torch.bmm(probabilities.mT, g_rows[..., :dim])
        scores = torch.bmm(g_rows, values[:, seen].mT).mul_(probabilities)
        dq[:, :, rows] = torch.bmm(scores, keys[:, seen, :dim]).mul_(scale).view_as(dq[:, :, rows])
        dk[:, seen] += torch.bmm(scores.mT, q_rows[..., :dim])
    return dq.flatten(0, 1)[None], dk.mul_(scale)[None], dv[None]


def _as_two_bf16(x: Tensor) -> Tensor:
    """Splits fp32 numbers into sums of two bf16 numbers: [...] -> [..., 2]."""
    high = x.bfloat16()
    return torch.stack([high, (x - high).bfloat16()], -1)


@_backward_op.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling, ctx.window, sinks = inputs
    ctx.save_for_backward(*tensors, sinks, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bounds, sinks, out, norms = ctx.saved_tensors
    grads = _backward_op(grad, query, key, value, out, norms, bounds, ctx.scaling, ctx.window)
    sinks_grad = None if sinks is None else _sinks_grad(grad, out, norms, sinks)
    # No gradients of bounds, scaling and window.
    return (*grads, None, None, None, sinks_grad)


def _sinks_grad(grad: Tensor, out: Tensor, norms: Tensor, sinks: Tensor) -> Tensor:
    """Returns the gradient of the sinks [H].

    The backward pass of a softmax: the probability of the sink, times the gradient of its value,
    which is 0, minus the mean over all values.
    """
    # [1, H, T].
    probabilities = torch.exp(sinks.float()[None, :, None] - norms)
    mean = torch.linalg.vecdot(grad.float(), out.float()).transpose(1, 2)
    return -(probabilities * mean).sum((0, 2)).to(sinks.dtype)


packed_attention_cpu.register_autograd(_backward, setup_context=_save_for_backward)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Repeats each key or value head for its group of queries: [1, H_kv, L, K] -> [1, H, L, K]."""
    if groups == 1:
        return x
    return x.repeat_interleave(groups, dim=1)


def window_bias(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """Returns the bias [L, L] of a sliding window: 0 where attention is allowed, -inf elsewhere.

    None if the example is no longer than the window, where causal attention is the same.
    """
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    bias = torch.zeros(length, length, dtype=query.dtype, device=query.device)
    return bias.masked_fill_((distance < 0) | (distance >= sliding_window), float("-inf"))
