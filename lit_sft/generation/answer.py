"""A batch of prompts to texts, and to the records that are written of them."""

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
    """Answers a batch. Drawn tokens depend on the seed and the batch only, so that they can be
    drawn again.

    Args:
        model: Whatever its sharding.
        tokenizer: Of the model.
        prompts: B prompts.
        options: Length and sampling; R answers each.
        stop_ids: What ends an answer.
        seed: Of the sampling.
        synced: Whether all ranks share the weights: then all must make the same number of calls.

    Returns:
        B lists of R texts.
    """
    if options.do_sample:
        torch.manual_seed(
            int(np.random.SeedSequence([seed, prompts["number"] + 1]).generate_state(1)[0])
        )
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
    """One record per prompt, without fillers.

    Returns:
        index, prompt, prediction (the first answer), predictions (all of them, where more than one
        was asked for), and reference (where the data has one).
    """
    made = []
    for index, text, texts, reference in zip(
        prompts["index"], prompts["texts"], answers, prompts["references"], strict=True
    ):
        record: dict[str, Any] = {"index": index, "prompt": text, "prediction": texts[0]}
        if len(texts) > 1:
            record["predictions"] = list(texts)
        if reference is not None:
            record["reference"] = reference
        made.append(record)
    return [record for record in made if record["index"] >= 0]
