"""Generates the answers to a batch of prompts, and makes records of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lit_sft.model.decode import decode_completion
from lit_sft.model.generate import GenerationOptions, generate
from lit_sft.model.loss import CausalLMLoss
from lit_sft.types import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer(
    model: CausalLMLoss,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    options: GenerationOptions,
    stop_ids: Sequence[int],
    seed: int,
    synced: bool = False,
) -> list[list[str]]:
    """Generates answers. Sampled tokens depend on seed and batch only, so a rerun repeats them.

    Args:
        model: The model, sharded or not.
        tokenizer: The tokenizer of the model.
        prompts: B prompts.
        options: Length, sampling, and R answers per prompt.
        stop_ids: Tokens that end an answer.
        seed: Seed of the sampling.
        synced: Whether the weights are sharded over ranks. Then all ranks must make the same
            number of calls.

    Returns:
        B lists of R texts.
    """
    if options.do_sample:
        sequence = np.random.SeedSequence([seed, prompts["number"] + 1])
        torch.manual_seed(int(sequence.generate_state(1)[0]))
    completions = generate(
        model.lm,
        prompts["input_ids"].to(model.lm.device),
        prompts["attention_mask"].to(model.lm.device),
        options=options,
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
        synced=synced,
        entry=model.generate,
    )
    texts = [decode_completion(tokenizer, ids, stop_ids) for ids in completions]
    count = options.num_return_sequences
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def records(prompts: Prompts, answers: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Makes one record per prompt, without fillers.

    Returns:
        Records with index, prompt and prediction (the first answer). `predictions` holds all
        answers if there are several, `reference` the expected answer if the data has one.
    """
    made = []
    for index, text, texts, reference in zip(
        prompts["index"], prompts["texts"], answers, prompts["references"], strict=True
    ):
        if index < 0:
            continue
        record: dict[str, Any] = {"index": index, "prompt": text, "prediction": texts[0]}
        if len(texts) > 1:
            record["predictions"] = list(texts)
        if reference is not None:
            record["reference"] = reference
        made.append(record)
    return made
