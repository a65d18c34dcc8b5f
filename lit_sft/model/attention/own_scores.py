"""Attention with scores that kernels do not compute, in plain torch.

Some models cap their scores (Gemma 2), or give each head an attention sink: one more score, of a
key whose value is 0 (gpt-oss). Here the scores of `BLOCK` queries exist at once, and the backward
pass computes them again. So memory grows with the length of an example, not with its square.

Letters: B rows, H heads, Q queries, N keys, L tokens of one example, T tokens, S
examples, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_sft.model.attention.cpu_kernel import repeat_heads

BLOCK = 256
"""Queries whose scores exist at once."""


@dataclass(frozen=True)
class Scores:
    """How the scores of a layer are made from queries and keys."""

    scaling: float | None = None
    """Factor on the scores. None means 1 / sqrt(K)."""
    window: int | None = None
    """Number of tokens that a position attends to, itself included. None for all before it."""
    cap: float | None = None
    """The limit that scores approach, as `cap * tanh(score / cap)`."""
    sinks: Tensor | None = None
    """[H] the score of the sink of each head."""
    dropout: float = 0.0
    """Probability of dropout."""

    @property
    def are_plain(self) -> bool:
        """Whether a kernel computes them."""
        return self.cap is None and self.sinks is None


# The loop would be compiled for each number of examples.
@torch.compiler.disable
def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scores: Scores
) -> Tensor:
    """Computes causal attention within each example of a row.

    Args:
        query: [1, H, T, K].
        key: [1, H_kv, T, K].
        value: [1, H_kv, T, K].
        bounds: [S + 1] the position where each example begins, and T.
        scores: How scores are made.

    Returns:
        [1, T, H, K].
    """
    # If the bounds are on a GPU, this synchronizes it.
    lengths = bounds.diff().tolist()
    outs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        for start in range(0, q.shape[2], BLOCK):
            stop = min(start + BLOCK, q.shape[2])
            first = 0 if scores.window is None else max(0, start - scores.window + 1)
            out = checkpoint(
                attend,
                q[:, :, start:stop],
                k[:, :, first:stop],
                v[:, :, first:stop],
                None,
                scores,
                use_reentrant=False,
                preserve_rng_state=scores.dropout > 0,
            )
            outs.append(out)
    return torch.cat(outs, dim=1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores
) -> Tensor:
    """Computes attention of some queries.

    Args:
        query: [B, H, Q, K].
        key: [B, H_kv, N, K].
        value: [B, H_kv, N, K].
        mask: [B, 1, Q, N] bool, True where attention is allowed. Without it, attention is causal,
            and the last query is at the place of the last key.
        scores: How scores are made.

    Returns:
        [B, Q, H, K].
    """
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    logits = (query @ repeat_heads(key, groups).mT).float() * scaling
    if scores.cap is not None:
        logits = scores.cap * torch.tanh(logits / scores.cap)
    if mask is None:
        mask = _causal(logits, scores.window)
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if scores.sinks is not None:
        sinks = scores.sinks.float()[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    probabilities = logits.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    if scores.dropout:
        probabilities = torch.dropout(probabilities, scores.dropout, train=True)
    return (probabilities @ repeat_heads(value, groups)).transpose(1, 2)


def _causal(logits: Tensor, window: int | None) -> Tensor:
    """Returns a causal mask [Q, N], True where attention is allowed."""
    num_queries, num_keys = logits.shape[-2:]
    keys = torch.arange(num_keys, device=logits.device)
    queries = keys[num_keys - num_queries :]
    distance = queries[:, None] - keys
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    return allowed
