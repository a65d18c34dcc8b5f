"""Whether fast attention gives what the model's own would: compared at the start, on a few
tokens.
"""

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


@torch.no_grad()
def packs_are_exact(lm: PreTrainedModel) -> bool:
    """Whether a row of two examples gives each the hidden states it has alone (state-space layers,
    say, do not).
    """
    input_ids, position_ids = _inputs(lm)
    first = LENGTHS[0]
    try:
        packed = _states(lm, input_ids, position_ids, **pack_kwargs(LENGTHS, lm.device))
    except TypeError:
        # An architecture that hands no keyword arguments down to its layers.
        return False
    alone = _states(
        lm, input_ids[:, first:], position_ids[:, first:], **pack_kwargs(LENGTHS[1:], lm.device)
    )
    # What leaks may reach the first few tokens only.
    return _close(packed[:, first:], alone, tolerance=0.1)


@torch.no_grad()
def is_causal(lm: PreTrainedModel) -> bool:
    """Whether hidden states stay the same when later tokens change (those of BERT without
    `is_decoder` do not).
    """
    input_ids, _ = _inputs(lm)
    position_ids = torch.arange(input_ids.shape[1], device=lm.device)[None]
    first = LENGTHS[0]
    changed = torch.cat([input_ids[:, :first], input_ids[:, first:] // 2], dim=1)
    before = _states(lm, input_ids, position_ids)[:, :first]
    after = _states(lm, changed, position_ids)[:, :first]
    # The same computation twice.
    return _close(before, after, tolerance=0.03)


@torch.no_grad()
def what_is_lost(lm: PreTrainedModel) -> str | None:
    """What the chosen attention function leaves out of what the model asks for; None if nothing.

    One example alone is compared with `eager`, the model's own: caps, sinks, biases by position, or
    masks of its own kind show. A window does not show in a few tokens; but transformers asks for a
    mask with that window, and the layer that gets it must hand the window to the attention
    function.
    """
    name = attention_of(lm)
    input_ids, _ = _inputs(lm)
    position_ids = torch.arange(input_ids.shape[1], device=lm.device)[None]
    windows: set[int] = set()
    try:
        with _noting_windows(name, windows):
            ours = _states_alone(lm, input_ids, position_ids)
    except Exception as error:
        # Whatever a model does with a mask that is not there.
        log.debug("%s under %s", type(lm).__name__, name, exc_info=error)
        return "attention code of its own"
    if windows:
        return f"a window of {min(windows):,} tokens, which its layers do not hand down"
    set_attention(lm, "eager")
    expected = _states(lm, input_ids, position_ids)
    set_attention(lm, name)
    return None if _close(ours, expected, tolerance=0.25) else "scores or a mask of its own kind"


def check_length(lm: PreTrainedModel, longest: int, context: int | None) -> None:
    """Compares the longest example with the positions that the model has.

    Args:
        lm: Causal LM.
        longest: Tokens of the example.
        context: Of `context_length`.

    Raises:
        UserError: They are learned, and there are fewer.
    """
    if context is None or longest <= context:
        return
    tables = [
        m
        for m in lm.modules()
        if isinstance(m, torch.nn.Embedding) and m is not lm.get_input_embeddings()
    ]
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
    """Meanwhile masks hold nothing but their window (0: none); those that a layer was not told of
    are noted.
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
    """Token ids and positions of two examples in a row, [1, T] each.

    Drawn from the whole vocabulary: after ids that follow each other, special tokens often, the
    rounding of bf16 grew to 65 % of some of SmolLM2's states, after such ids to 7 %.
    """
    vocabulary = lm.config.get_text_config().vocab_size
    # The default device may be another.
    drawn = torch.Generator("cpu").manual_seed(0)
    input_ids = torch.randint(vocabulary, (1, sum(LENGTHS)), generator=drawn, device="cpu")
    position_ids = torch.cat([torch.arange(length, device=lm.device) for length in LENGTHS])
    return input_ids.to(lm.device), position_ids[None]


def _states_alone(lm: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """As `_states`, of one example; told that it is one where the layers hand this down to
    attention.
    """
    try:
        return _states(lm, input_ids, position_ids, **pack_kwargs((input_ids.shape[1],), lm.device))
    except TypeError:
        return _states(lm, input_ids, position_ids)


def _states(lm: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:
    """What the model makes of them: hidden states, or logits where it does not tell its head from
    the rest.
    """
    with evaluation_mode(lm):
        output = lm.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs
        )
    states: Tensor = output.logits if lm.base_model is lm else output.last_hidden_state
    return states


def _close(ours: Tensor, expected: Tensor, tolerance: float) -> bool:
    """As close as the type in which the model computes allows: [B, T, D] both; `tolerance` is for
    16 bits.

    What 16 bits round away grows from layer to layer, to 3 % of a state in SmolLM2 on average;
    biases or sinks left out change states by 40 to 80 %.
    """
    if expected.dtype == torch.float32:
        return torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    ours, expected = ours.float(), expected.float()
    differences = (ours - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    # Nan is not close.
    return bool(differences.mean() < tolerance)
