"""Packed attention: examples that lie end to end in a row see only themselves, at the cost of the
sum of their squares.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.model.attention import cpu_kernel

log = logging.getLogger(__name__)

PACKED = "lit_sft_packed"
"""Name under which `packed_attention` is known to transformers."""


def pack_kwargs(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Describes the S examples of a row to attention; the layers of a model hand these keyword
    arguments down.

    The names are those of transformers, but for `cu_seq_lens_host`. The bounds are tensors, because
    torch.compile would compile again for every new tuple of lengths.

    Args:
        lengths: Tokens of each example.
        device: Device of the model's inputs.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`: [S + 1] int32 on the device, where the examples begin,
        and the end. `max_length_q` and `max_length_k`: length of the longest example.
        `cu_seq_lens_host`: the same bounds in host memory, for attention that needs the lengths as
            numbers: to read them from a GPU, each layer would wait for it.
    """
    host_bounds = torch.tensor((0, *lengths), dtype=torch.int32, device="cpu").cumsum(
        0, dtype=torch.int32
    )
    bounds = host_bounds.to(device, non_blocking=True)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "cu_seq_lens_host": host_bounds,
    }


# The arguments are those with which transformers calls an attention function.
def packed_attention(  # noqa: PLR0913
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
    cu_seq_lens_host: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface; without `cu_seq_lens_q` (generation, say) it is the
    library's own SDPA.

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
        cu_seq_lens_host: `cu_seq_lens_q` in host memory, if it is there.
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
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for SDPA; rotary embeddings left fp32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if flash_takes(query, value) and not dropout:
        kernel = "torch's variable-length flash kernel"
        out = _varlen(query, key, value, max_length_q, cu_seq_lens_q, scaling, sliding_window)
    elif cpu_kernel.takes(query, value) and not dropout:
        kernel = "SDPA's CPU kernel"
        out, _ = cpu_kernel.packed_attention_cpu(
            query, key, value, cu_seq_lens_q, scaling, sliding_window
        )
    else:
        kernel = "SDPA, example by example"
        bounds = cu_seq_lens_q if cu_seq_lens_host is None else cu_seq_lens_host
        out = _per_segment(query, key, value, dropout, bounds, scaling, sliding_window)
    if module.training and not torch.compiler.is_compiling():
        _tell(kernel, query.device.type, str(query.dtype).removeprefix("torch."), query.shape[-1])
    return out, None


@lru_cache
def _tell(kernel: str, device: str, dtype: str, head_size: int) -> None:
    """Says once how a model that is trained attends."""
    log.info("packed attention: %s (%s, %s, head size %s)", kernel, device, dtype, head_size)


def flash_takes(query: Tensor, value: Tensor) -> bool:
    """What torch's flash kernel computes: 16 bits, on NVIDIA GPUs from Ampere on, heads of one size
    up to 256.
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
    """One call of SDPA per example: [1, H, T, K] -> [1, T, H, K]. For dropout, and fp32 on a
    GPU.
    """
    # Without a copy in host memory, this waits for the device.
    lengths = bounds.diff().tolist()
    groups = query.shape[1] // key.shape[1]
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outs = []
    for q, k, v in parts:
        # With fewer heads of keys than of queries, torch 2.11 makes whole matrices of scores on a
        # GPU.
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
    """Torch's own variable-length flash attention (CUDA, 16 bit): [1, H, T, K] -> [1, T, H, K]."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes heads that share a key without being told
    shared: dict[str, Any] = (
        {"enable_gqa": query.shape[1] != key.shape[1]} if _varlen_is_told() else {}
    )
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
        **shared,
    )
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache
def _varlen_is_told() -> bool:
    """Whether the kernel has to be told that heads share keys and values."""
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
    """The implementation for a model: what was asked for, or with `auto` packed attention where the
    scores allow it.

    Args:
        config: The model's config.
        requested: `model.attn_implementation`.

    Returns:
        A name for `attn_implementation`. Soft-capped scores are only exact in `eager`, with
        transformers' own mask for packs.
    """
    # SDPA asks cuDNN first on some GPUs, which takes up to half a second to make a plan for each
    # new length: https://github.com/meta-pytorch/torchtune/issues/1652,
    # https://github.com/modelscope/FunASR/issues/3704
    torch.backends.cuda.enable_cudnn_sdp(False)
    if requested != "auto":
        return requested
    text_config = config.get_text_config()
    if getattr(text_config, "attn_logit_softcapping", None) or text_config.model_type == "gpt_oss":
        # Capped, or sinks.
        log.warning(
            "%s needs scores that SDPA cannot compute: attention falls back to `eager`.",
            text_config.model_type,
        )
        return "eager"
    register()
    return PACKED
