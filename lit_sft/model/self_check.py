"""Compares fast attention with the model's own attention, before training and on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_sft.errors import UserError
from lit_sft.model.attention.implementation import attention_of, set_attention
from lit_sft.model.attention.packed import pack_kwargs
from lit_sft.model.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LENGTHS = (5, 7)
"""Tokens of the two examples that are compared."""


@torch.no_grad()
def packing_is_exact(lm: PreTrainedModel) -> bool:
    """Whether an example has the same hidden states in a pack as alone.

    State-space layers, for example, carry their state from one example to the next.
    """
    input_ids, position_ids = _inputs(lm)
    first = LENGTHS[0]
    try:
        packed = _states(lm, input_ids, position_ids, **pack_kwargs(LENGTHS, lm.device))
    except TypeError:
        # This architecture passes no keyword arguments down to its layers.
        return False
    bounds = pack_kwargs(LENGTHS[1:], lm.device)
    alone = _states(lm, input_ids[:, first:], position_ids[:, first:], **bounds)
    # Small, because a leak may reach only the first few tokens of the second example.
    return _close(packed[:, first:], alone, tolerance=0.1)


@torch.no_grad()
def is_causal(lm: PreTrainedModel) -> bool:
    """Whether hidden states do not depend on later tokens.

    In BERT without `is_decoder`, for example, they do.
    """
    input_ids, _ = _inputs(lm)
    position_ids = torch.arange(input_ids.shape[1], device=lm.device)[None]
    first = LENGTHS[0]
    changed = torch.cat([input_ids[:, :first], input_ids[:, first:] // 2], dim=1)
    before = _states(lm, input_ids, position_ids)[:, :first]
    after = _states(lm, changed, position_ids)[:, :first]
    # Small, because the same code computes both.
    return _close(before, after, tolerance=0.03)


@torch.no_grad()
def missing_feature(lm: PreTrainedModel) -> str | None:
    """Returns what the chosen attention function ignores of the model's attention, or None.

    One example is compared with `eager`, the model's own attention code. This shows caps, sinks,
    position biases, and special masks. A sliding window does not show in a few tokens. But
    transformers asks for a mask with that window, and the layer must pass the window on to the
    attention function. So these two are compared.
    """
    name = attention_of(lm)
    input_ids, _ = _inputs(lm)
    position_ids = torch.arange(input_ids.shape[1], device=lm.device)[None]
    windows: set[int] = set()
    try:
        with _noting_windows(name, windows):
            ours = _states_alone(lm, input_ids, position_ids)
    except Exception as error:
        # Custom attention code may do anything with a mask that is None.
        log.debug("%s under %s", type(lm).__name__, name, exc_info=error)
        return "attention code of its own"
    if windows:
        return f"a window of {min(windows):,} tokens, which its layers do not hand down"
    set_attention(lm, "eager")
    expected = _states(lm, input_ids, position_ids)
    set_attention(lm, name)
    if _close(ours, expected, tolerance=0.25):
        return None
    return "scores or a mask of its own kind"


def check_length(lm: PreTrainedModel, longest: int, context: int | None) -> None:
    """Refuses examples that are longer than a table of learned positions, and warns of other ones.

    Args:
        lm: The causal LM.
        longest: Tokens of the longest example.
        context: The model's context, from `context_length`.

    Raises:
        UserError: The model has a learned position for fewer tokens.
    """
    if context is None or longest <= context:
        return
    tables = []
    for module in lm.modules():
        if module is lm.get_input_embeddings():
            continue
        if isinstance(module, torch.nn.Embedding):
            tables.append(module)
    # OPT has two more positions than its context.
    if any(context <= table.num_embeddings <= context + 2 for table in tables):
        raise UserError(
            f"data.max_length: the longest example has {longest:,} tokens, but {type(lm).__name__}"
            f" has learned positions for {context:,} only: set it to {context}"
        )
    log.warning(
        "the longest example has %s tokens, the model was made for %s",
        f"{longest:,}",
        f"{context:,}",
    )


@contextmanager
def _noting_windows(name: str, windows: set[int]) -> Iterator[None]:
    """Finds the sliding windows that a model's layers do not pass on to attention.

    In the block, transformers makes masks that hold only the size of their window (0 for none). The
    attention function compares it with the window that the layer passes.

    Args:
        name: The attention implementation.
        windows: Gets the windows that differ.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    attend, mask = AttentionInterface()[name], AttentionMaskInterface()[name]

    def marked(
        *args: Any,
        q_length: int = 1,
        kv_length: int = 1,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        return torch.full((1, 1, q_length, kv_length), local_size or 0, device=kwargs.get("device"))

    def attend_and_note(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        module, query, key, value, *masks = args
        marks = masks[0] if masks else attention_mask
        window = 0 if marks is None else int(marks.max())
        if window and window != kwargs.get("sliding_window"):
            windows.add(window)
        return attend(module, query, key, value, None, **kwargs)

    AttentionInterface.register(name, attend_and_note)
    AttentionMaskInterface.register(name, marked)
    try:
        yield
    finally:
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, mask)


def _inputs(lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Returns random token ids and positions of two examples in a row, [1, T] each.

    They are drawn from the whole vocabulary. With the first ids instead, which are often special
    tokens, the rounding of bf16 grew to 65 % of some hidden states of SmolLM2; with drawn ids it is
    7 %.
    """
    vocabulary = lm.config.get_text_config().vocab_size
    # Named, because the default device may be a GPU.
    generator = torch.Generator("cpu").manual_seed(0)
    input_ids = torch.randint(vocabulary, (1, sum(LENGTHS)), generator=generator, device="cpu")
    position_ids = torch.cat([torch.arange(length, device=lm.device) for length in LENGTHS])
    return input_ids.to(lm.device), position_ids[None]


def _states_alone(lm: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Returns `_states` of one example, with its bounds if the layers pass them on to attention."""
    try:
        return _states(lm, input_ids, position_ids, **pack_kwargs((input_ids.shape[1],), lm.device))
    except TypeError:
        return _states(lm, input_ids, position_ids)


def _states(lm: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:
    """Returns the hidden states [1, T, D], or the logits of a model without a separate backbone."""
    with evaluation_mode(lm):
        output = lm.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs
        )
    states: Tensor = output.logits if lm.base_model is lm else output.last_hidden_state
    return states


def _close(ours: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two results agree, up to the rounding of their dtype.

    In 16 bits the rounding error grows from layer to layer, to 3 % of a hidden state of SmolLM2 on
    average. Missing biases or sinks change hidden states by 40 to 80 %.

    Args:
        ours: [B, T, D].
        expected: [B, T, D].
        tolerance: Mean relative difference that is accepted in 16 bits.
    """
    if expected.dtype == torch.float32:
        return torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    ours, expected = ours.float(), expected.float()
    differences = (ours - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    # NaN is not close.
    return bool(differences.mean() < tolerance)
