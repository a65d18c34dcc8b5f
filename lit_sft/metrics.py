"""Functions that turn counts and texts into figures, and what is computed at validation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_sft.types import UserError

THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass
class EvaluationOptions:
    """Greedy answers to held-out prompts, compared with their references at validation and test."""

    metrics: list[Literal["exact_match"]] = field(default_factory=lambda: ["exact_match"])
    """What is computed; logged as `val/<name>` and `test/<name>`."""
    num_samples: int = 64
    """Rows of the validation (test) set that are answered, from its start."""
    every_n_validations: int = 1
    """Answer at every n-th validation."""
    answer_regex: str | None = None
    """What is compared: the last match (its first group) in both texts. None compares whole texts."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "every_n_validations"):
            if getattr(self, name) < 1:
                raise UserError(f"model.evaluation.{name} is {getattr(self, name)}, it must be at least 1")
        try:
            re.compile(self.answer_regex or "")
        except re.error as error:
            raise UserError(f"model.evaluation.answer_regex {self.answer_regex!r} does not compile: {error}") from error


class Perplexity(MeanMetric):
    """exp of the weighted mean of token losses."""

    def compute(self) -> Tensor:
        """[]."""
        return torch.exp(super().compute())


def extract_answer(text: str, answer_regex: str | None) -> str:
    """What is compared in a text: the last match of the expression (its first group, if it has one), else the whole
    text.

    Thinking blocks are removed first; commas inside numbers are dropped from a match, so that `1,000` equals `1000`.
    """
    text = THINKING.sub("", text).strip()
    if answer_regex is None:
        return text
    matches = list(re.finditer(answer_regex, text))
    if not matches:
        return text
    last = matches[-1]
    answer = last.group(1) if last.re.groups else last.group(0)
    return re.sub(r"(?<=\d),(?=\d)", "", answer).strip().rstrip(".")


def exact_match(prediction: str, reference: str, answer_regex: str | None = None) -> bool:
    """Whether the answers taken from both texts are the same string."""
    return extract_answer(prediction, answer_regex) == extract_answer(reference, answer_regex)


def flops_per_token(num_parameters: int, num_trainable: int) -> int:
    """Matrix-product operations of one training token: 2 forward and 2 for the gradient by the input per weight, and 2
    per
    trained weight for its own gradient (Kaplan et al. 2020, arXiv:2001.08361, without attention scores).
    """
    return 4 * num_parameters + 2 * num_trainable
