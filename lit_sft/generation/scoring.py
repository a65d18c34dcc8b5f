"""Held-out prompts -> scores: the answers of all ranks are compared with their references."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_sft.errors import UserError
from lit_sft.generation.answer import Answer, records
from lit_sft.generation.prompts import Prompt, fits
from lit_sft.generation.text_metrics import METRICS, score_names, text_scores
from lit_sft.types import Prompts


@dataclass
class EvaluationOptions:
    """Scores of greedy answers to held-out prompts, at validation and test."""

    metrics: list[str] | None = None
    """What is computed, logged as `val/<name>` and `test/<name>`. null: exact_match, where the rows
    have answers.
    """
    num_samples: int = 64
    """Rows of the validation (test) set that are answered: its first; of a mixture, of each member
    in proportion.
    """
    every_n_validations: int = 1
    """Answer at every n-th validation."""
    answer_regex: str | None = None
    """What exact_match compares: the last match (its first group) in both texts, if not empty;
    null: whole texts.
    """

    def __post_init__(self) -> None:
        for name in ("num_samples", "every_n_validations"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"model.evaluation.{name} is {getattr(self, name)}, it must be at least 1"
                )
        unknown = [name for name in self.metrics or () if name not in METRICS]
        if unknown:
            raise UserError(
                f"model.evaluation.metrics: there is no {unknown[0]}, only {', '.join(METRICS)}"
            )
        if self.metrics == []:
            raise UserError(
                "model.evaluation.metrics is empty: name some, or set model.evaluation to null"
            )
        try:
            re.compile(self.answer_regex or "")
        except re.error as error:
            raise UserError(
                f"model.evaluation.answer_regex {self.answer_regex!r} does not compile: {error}"
            ) from error

    @property
    def computed(self) -> list[str]:
        """The metrics to compute, each once."""
        return list(dict.fromkeys(self.metrics or ["exact_match"]))

    @property
    def scores(self) -> list[str]:
        """Names of the logged scores."""
        return score_names(self.computed)


def choose_prompts(
    prompts: Sequence[Prompt],
    options: EvaluationOptions,
    key: str,
    max_new_tokens: int,
    context: int | None,
) -> tuple[list[Prompt], str]:
    """Chooses the prompts that are answered.

    Args:
        prompts: The first rows.
        options: The metrics, which need references.
        key: Setting that names the rows, for messages.
        max_new_tokens: Longest answer.
        context: Tokens that the model takes; None: any number.

    Returns:
        The prompts, and a message for the user about those that are left out; else empty.

    Raises:
        UserError: `metrics` is set, and no row has a reference.
    """
    if not any(prompt.reference for prompt in prompts):
        what = f"none of the first {len(prompts)} rows of {key} ends with an answer to compare with"
        if options.metrics is not None:
            raise UserError(
                f"model.evaluation.metrics {options.computed}: {what}; set model.evaluation to null"
            )
        return [], f"{what}, so no answers are scored"
    kept = []
    too_long = []
    for prompt in prompts:
        if fits(prompt, max_new_tokens, context):
            kept.append(prompt)
        else:
            too_long.append(prompt)
    if not too_long:
        return kept, ""
    message = (
        f"{key}: {len(too_long)} of {len(prompts)} prompts leave no room for an"
        f" answer in the model's context of {context} tokens and are not scored, such as"
        f" {too_long[0].where}"
    )
    return kept, message


def too_long_to_match(prompts: Sequence[Prompt], key: str, max_new_tokens: int) -> str:
    """Returns a message for the user if references are longer than answers may be; else empty."""
    lengths = [prompt.num_reference_tokens for prompt in prompts if prompt.reference]
    long = [length for length in lengths if length > max_new_tokens]
    if not long:
        return ""
    return (
        f"{key}: answers are cut at {max_new_tokens} tokens, and {len(long)} of {len(lengths)}"
        f" references are longer (the longest: {max(long)}); raise model.generation.max_new_tokens"
        " if answers need that length"
    )


def evaluate(
    batches: Iterable[Prompts],
    answer: Callable[[Prompts], list[list[Answer]]],
    options: EvaluationOptions,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answers the prompts of this rank, and scores the answers of all ranks.

    This is a collective call. Every rank gathers all answers and scores them in the order of the
    rows, so the scores are the same, bit for bit, for any number of ranks.

    Args:
        batches: The batches of this rank.
        answer: Generates the answers of a batch.
        options: The metrics.

    Returns:
        Score by name (none if no row has a reference), and the records of all rows.
    """
    mine = [record for prompts in batches for record in records(prompts, answer(prompts))]
    table = sorted(gathered(mine), key=lambda record: record["index"])
    pairs = [
        (record["prediction"], record["reference"]) for record in table if "reference" in record
    ]
    if not pairs:
        return {}, table
    predictions, references = zip(*pairs, strict=True)
    return text_scores(options.computed, predictions, references, options.answer_regex), table


def gathered(items: list[Any]) -> list[Any]:
    """Gathers the items of all ranks, in the order of the ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return items
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
