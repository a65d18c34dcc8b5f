"""Packed attention: examples lie end to end in a row, and each attends only to itself.

Its cost is the sum of the squares of the example lengths, not the square of the row length.

Letters: B rows, H heads, T tokens, K head dimension, S examples.

    lengths 3 2        a b c d e
                     a x . . . .
                     b x x . . .        one causal square per example; nothing else is computed
                     c x x x . .
                     d . . . x .
                     e . . . x x
"""

from __future__ import annotations

import inspect
import logging
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.model.attention import cpu_kernel
from lit_sft.model.attention.own_scores import Scores, attend, attend_packed

log = logging.getLogger(__name__)

PACKED = "lit_sft_packed"
"""Name under which `packed_attention` is known to transformers."""
PACK_KWARGS = frozenset(
    ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seq_lens_host", "chunks")
)
"""Names of the keyword arguments that `pack_kwargs` returns."""


def pack_kwargs(
    lengths: tuple[int, ...], device: torch.device, chunk: int | None = None
) -> dict[str, Any]:
    """Returns the keyword arguments that describe the S examples of a row to attention.

    A model's layers pass them down. The names are those of transformers, except for
    `cu_seq_lens_host` and `chunks`. The bounds are tensors, because torch.compile would compile
    again for every new tuple of lengths.

    Args:
        lengths: [S] tokens of each example.
        device: Device of the model's inputs.
        chunk: Tokens of a chunk, from `chunk_size`.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`: [S + 1] int32 on the device, the position where each
        example begins, and T. `max_length_q` and `max_length_k`: tokens of the longest example.
        `cu_seq_lens_host`: the same bounds in host memory, for kernels that need the lengths as
        numbers. Reading them from a GPU would synchronize it in each layer. `chunks`: the same
        arguments for layers that attend within chunks, if there are any.
    """
    kwargs = _bounds_of(lengths, device)
    if chunk is not None:
        kwargs["chunks"] = _bounds_of(_cut(lengths, chunk), device)
    return kwargs


def _bounds_of(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    host_lengths = torch.tensor((0, *lengths), dtype=torch.int32, device="cpu")
    host_bounds = host_lengths.cumsum(0, dtype=torch.int32)
    bounds = host_bounds.to(device, non_blocking=True)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "cu_seq_lens_host": host_bounds,
    }


def _cut(lengths: tuple[int, ...], chunk: int) -> tuple[int, ...]:
    """Cuts each example at the multiples of a chunk: (5, 3) at 2 -> (2, 2, 1, 2, 1)."""
    parts: list[int] = []
    for length in lengths:
        full, rest = divmod(length, chunk)
        parts += [chunk] * full
        if rest:
            parts.append(rest)
    return tuple(parts)


def chunk_size(config: Any) -> int | None:
    """Returns the tokens of a chunk if some layers attend within chunks only (Llama 4), or None."""
    text_config = config.get_text_config()
    if "chunked_attention" not in (getattr(text_config, "layer_types", None) or ()):
        return None
    chunk: int = text_config.attention_chunk_size
    return chunk


def is_chunked(module: Any) -> bool:
    """Whether an attention layer of a model with chunks attends within them."""
    return bool(module.config.layer_types[module.layer_idx] == "chunked_attention")


# transformers calls attention functions with these arguments.
def packed_attention(  # noqa: PLR0913
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    cu_seq_lens_host: Tensor | None = None,
    chunks: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes packed attention, in transformers' interface for attention functions.

    Without `cu_seq_lens_q` (in generation, for example) it calls transformers' SDPA function, or
    plain torch for scores that SDPA does not compute.

    Args:
        module: The attention layer.
        query: [1, H, T, K].
        key: [1, H_kv, T, K].
        value: [1, H_kv, T, K].
        attention_mask: The mask of padded prompts. None in training.
        dropout: Probability of dropout.
        scaling: Factor on the scores. None means 1 / sqrt(K).
        sliding_window: Number of tokens that a position attends to, itself included.
        softcap: The limit that scores approach.
        s_aux: [H] the score of the attention sink of each head.
        cu_seq_lens_q: [S + 1] the position where each example begins, and T.
        max_length_q: Tokens of the longest example.
        cu_seq_lens_host: `cu_seq_lens_q` in host memory, if available.
        chunks: The last three arguments for a layer that attends within chunks.
        **kwargs: Arguments of other implementations.

    Returns:
        [1, T, H, K], and None in place of the attention weights.
    """
    scores = Scores(scaling, sliding_window, softcap, s_aux, dropout)
    if cu_seq_lens_q is None or attention_mask is not None:
        return _unpacked(module, query, key, value, attention_mask, scores, **kwargs), None
    query = _with_temperature_of_example(module, query, cu_seq_lens_q)
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings return fp32. Autocast would cast the inputs of SDPA, but not of these
        # kernels.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    whole = _Bounds(cu_seq_lens_q, max_length_q, cu_seq_lens_host)
    bounds, longest, host_bounds = _bounds_of_layer(module, whole, chunks)
    kernel = _kernel(query, value, scores)
    if kernel == FLASH:
        out = _varlen(query, key, value, longest, bounds, scaling, sliding_window)
    elif kernel == CPU:
        out, _ = cpu_kernel.packed_attention_cpu(
            query, key, value, bounds, scaling, sliding_window, s_aux
        )
    elif kernel == SDPA:
        out = _per_segment(query, key, value, dropout, host_bounds, scaling, sliding_window)
    else:
        out = attend_packed(query, key, value, host_bounds, scores)
    if module.training and not torch.compiler.is_compiling():
        dtype_name = str(query.dtype).removeprefix("torch.")
        _log_kernel(kernel, query.device.type, dtype_name, query.shape[-1])
    return out, None


class _Bounds(NamedTuple):
    """Where the examples of a row lie, or their chunks."""

    on_device: Tensor
    longest: int
    on_host: Tensor | None


def _bounds_of_layer(
    module: nn.Module, examples: _Bounds, chunks: dict[str, Any] | None
) -> tuple[Tensor, int, Tensor]:
    """Returns what a layer attends within: positions on the device, the longest, on the host."""
    bounds = examples
    if chunks is not None and is_chunked(module):
        bounds = _Bounds(
            chunks["cu_seq_lens_q"], chunks["max_length_q"], chunks["cu_seq_lens_host"]
        )
    on_host = bounds.on_device if bounds.on_host is None else bounds.on_host
    return bounds.on_device, bounds.longest, on_host


def _unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
    **kwargs: Any,
) -> Tensor:
    """Attention of padded prompts, in generation: [B, H, Q, K] -> [B, Q, H, K]."""
    if not scores.are_plain:
        return attend(query, key, value, mask, scores)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=scores.dropout,
        scaling=scores.scaling,
        sliding_window=scores.window,
        **kwargs,
    )
    return out


def _with_temperature_of_example(module: Any, query: Tensor, bounds: Tensor) -> Tensor:
    """Scales the queries by their positions in the example, not in the row.

    The layers of Llama 4 without rotary positions scale queries by their position
    (arXiv:2501.19399). transformers takes the place in the row for it.

    Args:
        module: The attention layer.
        query: [1, H, T, K], scaled by the position in the row.
        bounds: [S + 1] the position where each example begins, and T.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    in_row = torch.arange(query.shape[2], device=query.device)
    example = torch.bucketize(in_row, bounds[1:], right=True)
    in_example = in_row - bounds[:-1][example]
    factors = _temperature(module, in_example) / _temperature(module, in_row)
    return (query * factors[:, None]).to(query.dtype)


def _temperature(module: Any, positions: Tensor) -> Tensor:
    """Returns the factors [T] of Llama 4 at positions [T]."""
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
    return torch.log1p(steps) * module.attn_scale + 1.0


FLASH = "torch's variable-length flash kernel"
CPU = "SDPA's CPU kernel"
SDPA = "SDPA, example by example"
PLAIN = "plain torch, 256 tokens at a time"


def _kernel(query: Tensor, value: Tensor, scores: Scores) -> str:
    """Returns the name of the kernel for these inputs."""
    has_sinks = scores.sinks is not None
    if scores.cap is not None:
        return PLAIN
    if not scores.dropout:
        if flash_supports(query, value) and not has_sinks:
            return FLASH
        if cpu_kernel.supports(query, value):
            return CPU
    return PLAIN if has_sinks else SDPA


# The cache makes each line appear once.
@lru_cache
def _log_kernel(kernel: str, device: str, dtype: str, head_size: int) -> None:
    log.info("packed attention: %s (%s, %s, head size %s)", kernel, device, dtype, head_size)


def flash_supports(query: Tensor, value: Tensor) -> bool:
    """Whether torch's flash kernel supports these inputs.

    It needs 16 bits, an NVIDIA GPU from Ampere on, and heads of one size up to 256.
    """
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size <= 256
        and size % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@torch.compiler.disable
def _per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    bounds: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Calls SDPA once per example: [1, H, T, K] -> [1, T, H, K].

    Used for dropout, and for fp32 on a GPU.
    """
    # If the bounds are on a GPU, this synchronizes it.
    lengths = bounds.diff().tolist()
    groups = query.shape[1] // key.shape[1]
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outs = []
    for q, k, v in parts:
        # If keys have fewer heads than queries, torch 2.11 materializes the scores on a GPU.
        k = cpu_kernel.repeat_heads(k, groups)
        v = cpu_kernel.repeat_heads(v, groups)
        mask = cpu_kernel.window_bias(q, sliding_window)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
        )
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    longest: int,
    bounds: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Calls torch's variable-length flash attention: [1, H, T, K] -> [1, T, H, K]."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if _varlen_has_gqa_option():
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    # Tokens to the left and to the right of a position; -1 is no limit.
    left = -1 if sliding_window is None else sliding_window - 1
    window = (left, 0)
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
        **options,
    )
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache
def _varlen_has_gqa_option() -> bool:
    """Whether grouped-query attention must be enabled. torch 2.11 detects it by the shapes."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _packed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Makes the mask of padded prompts, as for SDPA. Packed rows need no mask."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    mask: Any = sdpa_mask
    made: Tensor | None = mask(*args, attention_mask=attention_mask, **kwargs)
    return made


def register() -> None:
    """Registers packed attention with transformers, under the name `PACKED`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _packed_mask)


def choose(requested: str) -> str:
    """Returns the attention implementation to load a model with.

    `auto` takes packed attention.

    Args:
        requested: `model.attn_implementation`.
    """
    # On some GPUs SDPA tries cuDNN first, which takes up to half a second to plan each new length:
    # https://github.com/meta-pytorch/torchtune/issues/1652,
    # https://github.com/modelscope/FunASR/issues/3704
    torch.backends.cuda.enable_cudnn_sdp(False)
    if requested != "auto":
        return requested
    register()
    return PACKED
