"""Prompts -> completions, in batches.

Letters: B prompts, T tokens of the longest prompt, R answers per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_sft.errors import UserError
from lit_sft.model.evaluation_mode import evaluation_mode
from lit_sft.model.parallel import is_compiled

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


@dataclass
class GenerationOptions:
    """Length and sampling of answers. Nothing is taken from the model's own generation config."""

    max_new_tokens: int = 100
    """Maximum number of tokens of an answer."""
    do_sample: bool = False
    """Draw each token at random (true), or take the most likely one (false)."""
    temperature: float = 1.0
    """Divide the logits by this before a token is drawn."""
    top_p: float = 1.0
    """Draw only from the most likely tokens that together have this probability."""
    top_k: int | None = None
    """Draw only from this number of most likely tokens. null draws from all."""
    num_return_sequences: int = 1
    """Number of answers per prompt."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(
                f"model.generation.max_new_tokens is {self.max_new_tokens}; set it to at least 1"
            )
        if self.temperature <= 0:
            raise UserError(
                f"model.generation.temperature is {self.temperature}; set a positive number, or"
                " do_sample to false for the most likely answer"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"model.generation.top_p is {self.top_p}; set a share above 0 and up to 1"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(
                f"model.generation.top_k is {self.top_k}; set it to at least 1, or to null for all"
                " tokens"
            )
        if self.num_return_sequences < 1:
            raise UserError(
                f"model.generation.num_return_sequences is {self.num_return_sequences}; set at"
                " least 1"
            )
        sampling = [name for name in _SAMPLING if getattr(self, name) != getattr(type(self), name)]
        if sampling and not self.do_sample:
            raise UserError(
                f"model.generation.{sampling[0]} has no effect on greedy answers; set do_sample to"
                " true"
            )


_SAMPLING = ("temperature", "top_p", "top_k", "num_return_sequences")


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    extra: Iterable[int] = (),
) -> list[int]:
    """Returns all ids that end an answer, sorted.

    Args:
        tokenizer: Its eos token is one.
        generation_config: Its eos tokens are some.
        extra: Further ids, such as those of end-of-turn tokens.
    """
    stops = {int(token_id) for token_id in extra}
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    eos = None if generation_config is None else generation_config.eos_token_id
    if eos is not None:
        stops.update([eos] if isinstance(eos, int) else map(int, eos))
    return sorted(stops)


def left_pad(prompt_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pads prompts on the left, so that all end where the answers begin.

    Args:
        prompt_ids: B lists of token ids, none of them empty.
        pad_id: Id of the padding. Any id works, because nothing attends to it.

    Returns:
        input_ids [B, T] and attention_mask [B, T], both int64. The mask is 0 on the padding.
    """
    assert prompt_ids and all(prompt_ids)
    width = max(map(len, prompt_ids))
    input_ids = []
    attention_mask = []
    for ids in prompt_ids:
        padding = width - len(ids)
        input_ids.append([pad_id] * padding + list(ids))
        attention_mask.append([0] * padding + [1] * len(ids))
    return torch.tensor(input_ids), torch.tensor(attention_mask)


@torch.no_grad()
def generate(
    lm: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    options: GenerationOptions,
    stop_ids: Sequence[int],
    pad_id: int,
    synced: bool = False,
    entry: Callable[..., Tensor] | None = None,
) -> list[list[int]]:
    """Completes a batch of prompts.

    In fp32, an answer does not depend on the other prompts of the batch. The model may be in the
    middle of training: modes and settings are restored.

    Args:
        lm: The causal LM, on the device of the inputs. It may contain adapters, but must not be a
            `PeftModel`.
        input_ids: [B, T] int64, padded on the left.
        attention_mask: [B, T] int64, 0 on the padding.
        options: Length and sampling.
        stop_ids: An answer ends with the first of these ids.
        pad_id: Id that fills up answers that end early.
        synced: Whether the weights are sharded. Then a rank that is done keeps calling the model
            until all ranks are done.
        entry: Called in place of `lm.generate`, with the same arguments. If the weights are
            sharded, this is the method for which they are gathered.

    Returns:
        B * R lists of new ids, each up to and including its stop id. The R answers of a prompt
        follow each other.

    Raises:
        UserError: A prompt and its answer would not fit into the model's context.
    """
    _check_room(lm, int(attention_mask.sum(1).max()), options.max_new_tokens)
    run: Callable[..., Tensor] = entry if entry is not None else lm.generate  # type: ignore[assignment]
    with _ready_to_generate(lm, cast=not synced):
        output = run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=_generation_config(options, stop_ids, pad_id),
            synced_gpus=synced,
        )
    stops = set(stop_ids)
    return [_up_to_stop(ids, stops) for ids in output[:, input_ids.shape[1] :].tolist()]


def context_length(config: PretrainedConfig) -> int | None:
    """Returns how many tokens a model can read. None for no limit, as in recurrent models."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_room(lm: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> None:
    context = context_length(lm.config)
    if context is not None and prompt_length + max_new_tokens > context:
        raise UserError(
            f"a prompt of {prompt_length} tokens and model.generation.max_new_tokens"
            f" {max_new_tokens} exceed the model's context of {context} tokens: shorten the prompt"
            " or set a smaller max_new_tokens"
        )


def _generation_config(
    options: GenerationOptions, stop_ids: Sequence[int], pad_id: int
) -> GenerationConfig:
    sampling: dict[str, Any] = {}
    if options.do_sample:
        sampling = dict(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k or 0,
            num_return_sequences=options.num_return_sequences,
        )
    return _new_generation_config(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.do_sample,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **sampling,
    )


@contextmanager
def _ready_to_generate(lm: PreTrainedModel, cast: bool) -> Iterator[None]:
    """Prepares a model for generation in a `with` block, and restores it afterwards.

    Evaluation mode also switches gradient checkpointing off, which would forbid the key-value
    cache. Autocast is off, because it would cast every weight for every token.

    Args:
        lm: The causal LM.
        cast: Whether to cast the weights once instead, if autocast is enabled with bf16. The copy
            takes half of the memory of fp32 weights. In fp16 a model that was trained in bf16 may
            overflow, so the weights stay in their dtype. Sharded weights must not be cast: they are
            gathered in the compute dtype.
    """
    kind = lm.device.type
    dtype = torch.get_autocast_dtype(kind)
    casts = cast and torch.is_autocast_enabled(kind) and dtype == torch.bfloat16
    # `generate` takes what its config leaves open, such as a repetition penalty, from this one.
    own_generation_config = lm.generation_config
    lm.generation_config = _new_generation_config()
    try:
        with (
            evaluation_mode(lm),
            _weights_cast(lm, dtype) if casts else nullcontext(),
            _contiguous_states(lm),
            _uncompiled(lm),
            torch.autocast(kind, enabled=False),
        ):
            yield
    finally:
        lm.generation_config = own_generation_config


@contextmanager
def _weights_cast(lm: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replaces all fp32 weights by cast copies in a `with` block.

    It does not assign `parameter.data`: with another dtype, a parameter loses its gradient
    accumulator and the hooks on it, by which DDP reduces gradients. From then on every rank would
    train alone, without an error.
    """
    stored = []
    # One copy per parameter, so that tied weights stay tied.
    copies = {}
    for module in lm.modules():
        own_parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, parameter in own_parameters:
            if parameter.dtype != torch.float32:
                continue
            stored.append((module, name, parameter))
            if parameter not in copies:
                copy = parameter.detach().to(dtype)
                copies[parameter] = nn.Parameter(copy, requires_grad=False)
    try:
        for module, name, parameter in stored:
            setattr(module, name, copies[parameter])
        yield
    finally:
        for module, name, parameter in stored:
            setattr(module, name, parameter)


@contextmanager
def _contiguous_states(lm: PreTrainedModel) -> Iterator[None]:
    """Makes the input of the head contiguous in a `with` block.

    In generation it is a slice, the last hidden state of each prompt. Without gradients torch would
    then copy the head's weight for every prompt (3.6 GB for 64 prompts of SmolLM2):
    https://github.com/pytorch/pytorch/issues/186148.
    """
    head = lm.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _uncompiled(lm: nn.Module) -> AbstractContextManager[None]:
    """Runs compiled blocks uncompiled in a `with` block.

    They would be compiled again for every new length, until torch stops compiling them, also in
    training.
    """
    if is_compiled(lm):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _new_generation_config(**settings: Any) -> GenerationConfig:
    from transformers import GenerationConfig

    make: Callable[..., GenerationConfig] = GenerationConfig
    return make(**settings)


def _up_to_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Cuts an answer after its first stop id."""
    for position, token_id in enumerate(ids):
        if token_id in stops:
            return ids[: position + 1]
    return ids
