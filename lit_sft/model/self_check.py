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
from lit_sft.model.attention.packed import chunk_size, is_chunked, pack_kwargs
from lit_sft.model.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LENGTHS = (5, 7)
"""Tokens of the two examples that are compared."""

THRESHOLD = 6
"""A number of tokens between those of the two examples."""
THRESHOLDS = (
    # Attention windows, and chunks as in Llama 4.
    "sliding_window",
    "attention_chunk_size",
    # The number of tokens that sparse attention selects: DeepSeek V3.2, GLM-5; Doge.
    "index_topk",
    "keep_window_size",
    # The position from which queries are scaled: Llama 4 (arXiv:2501.19399), Inkling.
    "floor_scale",
    "log_scaling_n_floor",
    # The length from which rotary frequencies change: `dynamic` and `longrope`.
    "max_position_embeddings",
    "original_max_position_embeddings",
    "original_max_seq_len",
)
"""Names of the numbers of tokens from which a model computes differently.

They are fields of configs or of modules in transformers 5.24. Real ones are thousands of tokens,
and a comparison of as many would be slow. So they are lowered while a model is checked.
"""
MUCH = 1e9
"""Bytes of scores from which a warning tells their size."""
SELECTIONS = ("index_topk", "index_topk_blocks", "keep_window_size")
"""Fields of configs of models that attend to a selection of tokens.

Tokens of the same score are chosen by their place among all tokens of the batch. Few tokens need
not show it.
"""


@torch.no_grad()
def packing_is_exact(lm: PreTrainedModel) -> bool:
    """Whether an example has the same hidden states in a pack as alone.

    State-space layers, for example, carry their state from one example to the next. Thresholds are
    lowered, because some models count tokens from the start of the row, not of the example.
    """
    if _selects_tokens(lm):
        return False
    input_ids, position_ids = _inputs(lm)
    first = LENGTHS[0]
    with _lowered_thresholds(lm):
        # The lowered one.
        chunk = chunk_size(lm.config)
        together = pack_kwargs(LENGTHS, lm.device, chunk)
        bounds = pack_kwargs(LENGTHS[1:], lm.device, chunk)
        try:
            packed = _states(lm, input_ids, position_ids, **together)
        except Exception as error:
            # Many architectures pass no keyword arguments down to their layers.
            log.debug("%s with packed examples", type(lm).__name__, exc_info=error)
            return False
        alone = _states(lm, input_ids[:, first:], position_ids[:, first:], **bounds)
    # Small, because a leak may reach only the first few tokens of the second example.
    return _close(packed[:, first:], alone, tolerance=0.1)


@torch.no_grad()
def run_two_examples(lm: PreTrainedModel) -> None:
    """Calls the layers of a model with a row of two examples, `LENGTHS` tokens."""
    input_ids, position_ids = _inputs(lm)
    _states(lm, input_ids, position_ids, **pack_kwargs(LENGTHS, lm.device))


@torch.no_grad()
def padding_is_exact(lm: PreTrainedModel) -> bool:
    """Whether an example has the same hidden states in a padded row as alone.

    The row beside it is longer, and passes every threshold.
    """
    if _selects_tokens(lm):
        return False
    first, second = LENGTHS
    input_ids, position_ids = _inputs(lm)
    padded_ids = torch.stack([input_ids[0, :second], input_ids[0, first:]])
    rows = position_ids[:, first:].expand_as(padded_ids).clone()
    # As in `CausalLMLoss`, the padding counts from 0 again.
    rows[0, first:] = torch.arange(second - first, device=lm.device)
    with _lowered_thresholds(lm):
        padded = _states(lm, padded_ids, rows)
        alone = _states(lm, input_ids[:, :first], position_ids[:, :first])
    # Small, because the same code computes both.
    return _close(padded[:1, :first], alone, tolerance=0.03)


def _selects_tokens(lm: PreTrainedModel) -> bool:
    config = lm.config.get_text_config()
    return any(getattr(config, name, None) for name in SELECTIONS)


@torch.no_grad()
def numbers_positions_itself(lm: PreTrainedModel) -> bool:
    """Whether the first position of a model is not 0.

    In RoBERTa, for example, it is the id of the pad token plus 1.
    """
    input_ids = _inputs(lm)[0][:, LENGTHS[0] :]
    position_ids = torch.arange(input_ids.shape[1], device=lm.device)[None]
    # Small, because the same code computes both.
    return not _close(
        _states(lm, input_ids, position_ids), _states(lm, input_ids, None), tolerance=0.03
    )


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
            _states_alone(lm, input_ids, position_ids)
        # Without a mask, which some attention code needs.
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


def warn_of_scores(lm: PreTrainedModel, tokens: int) -> None:
    """Warns if attention keeps the scores of all pairs of tokens, and they take much memory.

    Args:
        lm: The causal LM.
        tokens: Tokens of the longest row.
    """
    if attention_of(lm) != "eager":
        return
    config = lm.config.get_text_config()
    # A model without attention has no heads. The softmax is kept in fp32.
    size = 4 * getattr(config, "num_attention_heads", 0) * tokens**2
    total = size * config.num_hidden_layers
    if total < MUCH:
        return
    log.warning(
        "attention `eager` keeps the scores of all pairs of tokens: for a row of %s tokens %.1f GB"
        " in each of %s layers, %.1f GB in all; lower data.max_length, or set"
        " model.gradient_checkpointing to full, which keeps those of one layer at a time",
        f"{tokens:,}",
        size / 1e9,
        config.num_hidden_layers,
        total / 1e9,
    )


@contextmanager
def _lowered_thresholds(lm: PreTrainedModel) -> Iterator[None]:
    """Lowers the `THRESHOLDS` of a model to `THRESHOLD` tokens in a `with` block."""
    holders: list[dict[str, Any]] = [vars(lm.config), vars(lm.config.get_text_config())]
    for module in lm.modules():
        holders.append(vars(module))
    lowered: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for holder in holders:
        lowered += _lower(holder)
    try:
        yield
    finally:
        # In reverse, because a config may be among the holders twice.
        for holder, before in reversed(lowered):
            holder.update(before)


def _lower(holder: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Lowers the thresholds in a dictionary and in those within it.

    Returns:
        The dictionaries that are changed, and their values before.
    """
    changed = []
    before = {}
    for name, value in holder.items():
        if name in THRESHOLDS and isinstance(value, int | float) and value > THRESHOLD:
            before[name] = value
        # `rope_parameters`, which some models have for each type of layer.
        if name.startswith("rope_") and isinstance(value, dict):
            changed += _lower(value)
            for inner in value.values():
                changed += _lower(inner) if isinstance(inner, dict) else []
    holder.update(dict.fromkeys(before, THRESHOLD))
    return [*changed, (holder, before)]


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
        handed = kwargs.get("sliding_window")
        if kwargs.get("chunks") is not None and is_chunked(module):
            handed = module.config.attention_chunk_size
        if window and window != handed:
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
    bounds = pack_kwargs((input_ids.shape[1],), lm.device, chunk_size(lm.config))
    try:
        return _states(lm, input_ids, position_ids, **bounds)
    except TypeError:
        return _states(lm, input_ids, position_ids)


def _states(
    lm: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None, **kwargs: Any
) -> Tensor:
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
