"""A tokenizer and models small enough to be built in every test: import them with `from tiny import
...`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Threads only wait for each other over matrices of this size, for 20 times as long as the work
# takes on a busy machine.
torch.set_num_threads(1)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as Qwen writes it, without a default system prompt."""

_CORPUS = (
    "system user assistant You are a helpful assistant.",
    "What is the difference between a thread and a process? A process has its own memory.",
    "Calculate 1+1-1. The answer is 1. Hello world, how are you today? I am fine, thank you.",
)


def tiny_tokenizer(
    *,
    chat_template: str | None = CHATML,
    pad_token: str | None = "<|endoftext|>",
    bos_token: str | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: any text in, the same text out. As in Qwen3-Base, eos is
    not the end of a turn.

    Args:
        chat_template: None for a tokenizer that has none.
        pad_token: None for a tokenizer that has none; equal to eos by default.
        bos_token: Put before every text where given.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [*SPECIAL_TOKENS] if bos_token is None else [*SPECIAL_TOKENS, bos_token]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if bos_token is not None:
        bos = (bos_token, backend.token_to_id(bos_token))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[bos]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token=pad_token,
        bos_token=bos_token,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(vocab_size: int = 320, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 2-layer Llama with untied embeddings and an eos of 0; overrides go to its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build(
        LlamaForCausalLM,
        LlamaConfig,
        seed,
        _sizes(vocab_size, tie_word_embeddings=False) | overrides,
    )


def tiny_qwen3(vocab_size: int = 320, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 2-layer Qwen3 with tied embeddings, as the small Qwen3 models have; overrides go to its
    config.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = _sizes(vocab_size, tie_word_embeddings=True, head_dim=16)
    return _build(Qwen3ForCausalLM, Qwen3Config, seed, sizes | overrides)


def tiny_gpt2(vocab_size: int = 320, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 2-layer GPT-2: learned absolute positions, Conv1D layers, tied embeddings; overrides go to
    its config.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1,
        bos_token_id=None, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _build(GPT2LMHeadModel, GPT2Config, seed, sizes | overrides)


def tiny_qwen3_moe(vocab_size: int = 320, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 2-layer Qwen3-MoE with 4 experts, 2 per token; overrides go to its config."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = _sizes(vocab_size, tie_word_embeddings=False, head_dim=16)
    sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig, seed, sizes | overrides)


def tiny_gpt_oss(vocab_size: int = 320, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 2-layer gpt-oss with 4 experts, 2 per token, whose matrices are transposed and have biases;
    overrides go to its config.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = _sizes(vocab_size, tie_word_embeddings=False, head_dim=16)
    sizes |= dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    return _build(GptOssForCausalLM, GptOssConfig, seed, sizes | overrides)


def save_tiny(
    directory: Path | str,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> str:
    """Writes a Hugging Face directory (by default a tiny Llama and the tiny tokenizer) and returns
    its path.
    """
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    model = tiny_llama(len(tokenizer)) if model is None else model
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def _sizes(vocab_size: int, **more: Any) -> dict[str, Any]:
    # A wider initialization than 0.02: the logits are far apart, so that greedy answers are varied
    # and not near-ties.
    return dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, **more,
    )  # fmt: skip


def _build(
    model_class: Any, config_class: Any, seed: int, sizes: dict[str, Any]
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = model_class(config_class(**sizes))
    return model.eval()
