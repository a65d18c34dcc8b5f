"""Generates the answers to a batch of prompts, and makes records of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from lit_sft.model.decode import decode_completion
from lit_sft.model.generate import GenerationOptions, generate
from lit_sft.model.loss import CausalLMLoss
from lit_sft.types import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answer(NamedTuple):
    """A generated answer."""

    text: str
    finish_reason: Literal["stop", "length"]
    """Why it ends: a stop token, or `max_new_tokens`. Servers use these names."""


def answer(
    model: CausalLMLoss,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    options: GenerationOptions,
    stop_ids: Sequence[int],
    seed: int,
    synced: bool = False,
) -> list[list[Answer]]:
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
        B lists of R answers.
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
    answers = [_decoded(tokenizer, ids, stop_ids) for ids in completions]
    count = options.num_return_sequences
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def _decoded(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Sequence[int]
) -> Answer:
    """Decodes the token ids of an answer."""
    text = decode_completion(tokenizer, ids, stop_ids)
    return Answer(text, "stop" if ids[-1] in stop_ids else "length")


def records(prompts: Prompts, answers: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """Makes one record per prompt, without fillers.

    Returns:
        Records with index, prompt, prediction (the text of the first answer) and its
        finish_reason. `predictions` and `finish_reasons` hold those of all answers if there are
        several, `reference` the expected answer if the data has one.
    """
    made = []
    for index, text, given, reference in zip(
        prompts["index"], prompts["texts"], answers, prompts["references"], strict=True
    ):
        if index < 0:
            continue
        record: dict[str, Any] = {
            "index": index,
            "prompt": text,
            "prediction": given[0].text,
            "finish_reason": given[0].finish_reason,
        }
        if len(given) > 1:
            record["predictions"] = [each.text for each in given]
            record["finish_reasons"] = [each.finish_reason for each in given]
        if reference is not None:
            record["reference"] = reference
        made.append(record)
    return made
