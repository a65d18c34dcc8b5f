"""Prompts -> completions, many at a time, greedy by default.

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
    """How answers are written. Greedy means greedy: nothing is taken from the model's own
    generation config.
    """

    max_new_tokens: int = 100
    """An answer ends here at the latest."""
    do_sample: bool = False
    """false: the most likely token each time. true: tokens are drawn, as the options below say."""
    temperature: float = 1.0
    """Logits are divided by it before a token is drawn."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are drawn from."""
    top_k: int | None = None
    """Only so many of the most likely tokens are drawn from; null for all."""
    num_return_sequences: int = 1
    """Answers per prompt."""

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
    """Every id that ends an answer: eos of tokenizer and generation config, and `extra` (ends of
    turn); sorted.
    """
    stops = {int(token_id) for token_id in extra}
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    eos = None if generation_config is None else generation_config.eos_token_id
    if eos is not None:
        stops.update([eos] if isinstance(eos, int) else map(int, eos))
    return sorted(stops)


def left_pad(prompt_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Makes prompts one rectangle that ends where the answers begin.

    Args:
        prompt_ids: B lists of token ids, none of them empty.
        pad_id: Id of the filling; what it is does not matter, as nothing looks at it.

    Returns:
        input_ids [B, T] and attention_mask [B, T], both int64; the mask is 0 on the padding.
    """
    assert prompt_ids and all(prompt_ids)
    width = max(map(len, prompt_ids))
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompt_ids])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    return input_ids, attention_mask


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
    """Completes a batch of prompts; in fp32 each text is what the prompt alone would give.

    The model may be in the middle of training: modes and settings are put back as they were.

    Args:
        lm: Causal LM on the device of the inputs; adapters have to be inside it, not around it.
        input_ids: [B, T] int64, padded on the left.
        attention_mask: [B, T] int64, 0 on the padding.
        options: Length and sampling.
        stop_ids: An answer ends with the first of these ids.
        pad_id: Id that fills answers which end early.
        synced: Set where all ranks share the weights (sharding): a rank that is done keeps calling
            the model until the last one is.
        entry: Called in place of `lm.generate`, with the same arguments: where the weights are
            sharded, the method of the wrapper that gathers them.

    Returns:
        B * R lists of new ids, the R answers of a prompt together, each up to and including its
        stop id.

    Raises:
        UserError: If a prompt leaves no room for the answer in the model's context.
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
    """Tokens that a model can read; None where there is no limit, as in recurrent ones."""
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
    """Evaluation mode, no inherited generation settings, no autocast; everything is put back
    afterwards.

    Evaluation mode also switches gradient checkpointing off, which would forbid the cache of keys
    and values. Autocast would cast every weight again for every token; with `cast` they are cast
    once instead where it is to bf16, which costs half of the weights in memory. Sharded ones are
    gathered in the type that sharding was told. In fp16 a model that was trained in bf16 may
    overflow, so there the weights stay as they are stored.
    """
    kind = lm.device.type
    dtype = torch.get_autocast_dtype(kind)
    casts = cast and torch.is_autocast_enabled(kind) and dtype == torch.bfloat16
    # `generate` fills what a config leaves open from this one: repetition penalties, say, or a
    # length.
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
    """Puts copies in place of all weights in fp32.

    Not by `parameter.data`: given another type, a parameter loses the node of the graph that adds
    up its gradient, and the hooks on it, by which DDP reduces gradients. Without a word, every rank
    would train alone from then on.
    """
    stored = [
        (module, name, parameter)
        for module in lm.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.dtype == torch.float32
    ]
    # One copy of each parameter: tied weights stay tied.
    copies = {
        parameter: nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for _, _, parameter in stored
    }
    try:
        for module, name, parameter in stored:
            setattr(module, name, copies[parameter])
        yield
    finally:
        for module, name, parameter in stored:
            setattr(module, name, parameter)


@contextmanager
def _contiguous_states(lm: PreTrainedModel) -> Iterator[None]:
    """Hands the head contiguous states, where it is a module of its own.

    Without gradients torch copies the weight for every prompt if its input is a slice, as the last
    states of the prompts are (3.6 GB for 64 prompts of SmolLM2, frozen):
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
    """Lets compiled blocks run as they are written: they would be compiled again for every new
    length, until torch gives up, for training, too.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled(lm) else nullcontext()


def _new_generation_config(**settings: Any) -> GenerationConfig:
    from transformers import GenerationConfig

    make: Callable[..., GenerationConfig] = GenerationConfig
    return make(**settings)


def _up_to_stop(ids: list[int], stops: set[int]) -> list[int]:
    end = next((i + 1 for i, token_id in enumerate(ids) if token_id in stops), len(ids))
    return ids[:end]
