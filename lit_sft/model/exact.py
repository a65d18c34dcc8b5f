"""Whether fast attention gives what the model's own would: compared at the start, on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PackKwargs = Callable[[tuple[int, ...], torch.device], dict[str, Any]]
"""`loss.pack_kwargs`."""

LENGTHS = (5, 7)


@torch.no_grad()
def packs_are_exact(lm: PreTrainedModel, pack_kwargs: PackKwargs) -> bool:
    """Whether a row of two examples gives each the hidden states it has alone (state-space layers, say, do not)."""
    input_ids, position_ids = _inputs(lm)
    first = LENGTHS[0]
    try:
        packed = _states(lm, input_ids, position_ids, **pack_kwargs(LENGTHS, lm.device))
    except TypeError:  # an architecture that hands no keyword arguments down to its layers
        return False
    alone = _states(lm, input_ids[:, first:], position_ids[:, first:], **pack_kwargs(LENGTHS[1:], lm.device))
    return _close(packed[:, first:], alone)


@torch.no_grad()
def is_causal(lm: PreTrainedModel) -> bool:
    """Whether hidden states stay the same when a later token changes (those of BERT without `is_decoder` do not)."""
    input_ids, _ = _inputs(lm)
    position_ids = torch.arange(input_ids.shape[1], device=lm.device)[None]
    changed = input_ids.clone()
    changed[:, -1] = 1 - changed[:, -1].clamp(max=1)  # 0, or 1 where it was 0
    before, after = (_states(lm, ids, position_ids)[:, :-1] for ids in (input_ids, changed))
    return _close(before, after)


@torch.no_grad()
def what_is_lost(lm: PreTrainedModel, pack_kwargs: PackKwargs) -> str | None:
    """What the chosen attention function leaves out of what the model asks for; None if nothing.

    One example alone is compared with `eager`, the model's own: caps, sinks, biases by position, or masks of its own
    kind show. A window does not show in a few tokens; but transformers asks for a mask with that window, and the layer
    that gets it must hand the window to the attention function.
    """
    name = lm.config._attn_implementation
    input_ids, _ = _inputs(lm)
    position_ids = torch.arange(input_ids.shape[1], device=lm.device)[None]
    windows: set[int] = set()
    try:
        with _noting_windows(name, windows):
            try:
                ours = _states(lm, input_ids, position_ids, **pack_kwargs((input_ids.shape[1],), lm.device))
            except TypeError:
                ours = _states(lm, input_ids, position_ids)
    except Exception as error:  # whatever a model does with a mask that is not there
        log.debug("%s under %s", type(lm).__name__, name, exc_info=error)
        return "attention code of its own"
    if windows:
        return f"a window of {min(windows):,} tokens, which its layers do not hand down"
    attend_by(lm, "eager")
    expected = _states(lm, input_ids, position_ids)
    attend_by(lm, name)
    return None if _close(ours, expected) else "scores or a mask of its own kind"


def attend_by(lm: PreTrainedModel, name: str) -> None:
    """Changes the attention of a model.

    Of a model with attention code of its own only the masks change, which is all that there is to change.

    Args:
        lm: The model.
        name: Of transformers; `sdpa` is `eager` for a model that does not know it.
    """
    name = "eager" if name == "sdpa" and not lm._supports_sdpa else name
    lm.set_attn_implementation(name)
    lm.config._attn_implementation = name


@contextmanager
def _noting_windows(name: str, windows: set[int]) -> Iterator[None]:
    """Meanwhile masks hold nothing but their window (0: none); those that a layer was not told of are noted."""
    from transformers import AttentionInterface, AttentionMaskInterface

    attend, mask = AttentionInterface()[name], AttentionMaskInterface()[name]

    def marked(*args: Any, q_length: int = 1, kv_length: int = 1, local_size: int | None = None, **kwargs: Any) -> Any:
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
    """Token ids and positions of two examples in a row, [1, T] each."""
    input_ids = torch.arange(3, 3 + sum(LENGTHS), device=lm.device)[None] % lm.config.get_text_config().vocab_size
    return input_ids, torch.cat([torch.arange(length, device=lm.device) for length in LENGTHS])[None]


def _states(lm: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:
    """What the model makes of them: hidden states, or logits where it does not tell its head from the rest."""
    was_training = lm.training
    lm.eval()
    try:
        output = lm.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs)
    finally:
        lm.train(was_training)
    states: Tensor = output.logits if lm.base_model is lm else output.last_hidden_state
    return states


def _close(ours: Tensor, expected: Tensor) -> bool:
    """As close as the type in which the model computes allows."""
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    ours, expected = ours.float(), expected.float()
    return torch.allclose(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
