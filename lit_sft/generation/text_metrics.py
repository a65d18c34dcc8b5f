"""Figures from counts and texts: token metrics of a data set, and how near answers come to their
references.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torchmetrics.functional.text import chrf_score, rouge_score, sacre_bleu_score

METRICS = ("exact_match", "rouge", "bleu", "chrf", "token_f1")
"""Of texts."""

_OPEN, _CLOSE = r"(?:<think>|\[THINK\])", r"(?:</think>|\[/THINK\])"
THINKING = re.compile(rf"{_OPEN}.*?(?:{_CLOSE}|\Z)|\A(?:(?!{_OPEN}).)*{_CLOSE}", re.DOTALL)
"""A block of thoughts; also one that the answer's length cut off, and one that the prompt had
opened.
"""
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ARTICLES = {"a", "an", "the"}
_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def without_thinking(text: str) -> str:
    """The text that a reader is meant to see."""
    return THINKING.sub("", text).strip()


def extract_answer(text: str, answer_regex: str | None) -> str:
    """What is compared in a text: the last match of the expression (its first group that took part,
    if it has groups) that is not empty, else the whole text.

    Thinking blocks are removed first; commas between thousands are dropped from a match, so that
    `1,000` equals `1000`.
    """
    text = without_thinking(text)
    if answer_regex is None:
        return text
    matches = re.finditer(answer_regex, text)
    found = [
        next((group for group in m.groups() if group is not None), "") if m.re.groups else m[0]
        for m in matches
    ]
    answers = [_THOUSANDS.sub("", answer).strip().rstrip(".") for answer in found]
    return next(filter(None, reversed(answers)), text)


def exact_match(prediction: str, reference: str, answer_regex: str | None = None) -> bool:
    """Whether the answers taken from both texts are the same string."""
    return extract_answer(prediction, answer_regex) == extract_answer(reference, answer_regex)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; of Chinese and Japanese, which have no spaces, every
    character.

    A mark (a vowel sign of Hindi or Thai, an accent) belongs to the letter before it.
    """
    text = unicodedata.normalize("NFC", text.lower())
    found = "".join(
        sorted(char for char in set(text) if unicodedata.category(char).startswith("M"))
    )
    marks = f"[{found}]*" if found else ""
    return re.findall(rf"[{_CJK}]{marks}|(?:(?![{_CJK}])[^\W_]{marks})+", text)


def score_names(metrics: Iterable[str]) -> list[str]:
    """Names of the scores that these metrics give."""
    return [name for metric in metrics for name in (_ROUGE if metric == "rouge" else (metric,))]


def text_scores(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    answer_regex: str | None,
) -> dict[str, float]:
    """How near predictions come to their references, one each; 0 is not at all, 1 is the same.

    Args:
        metrics: What to compute; torchmetrics does rouge, bleu and chrf.
        predictions: At least one.
        references: As many.
        answer_regex: For the exact match (see `extract_answer`); the other metrics take the texts
            without thoughts.

    Returns:
        Score by name, `rouge_1`, `rouge_2` and `rouge_l` (F measures) for rouge.
    """
    assert predictions and len(predictions) == len(references)
    scores: dict[str, float] = {}
    ours, theirs = (
        [without_thinking(p) for p in predictions],
        [without_thinking(r) for r in references],
    )
    for metric in metrics:
        if metric == "exact_match":
            hits = [
                exact_match(p, r, answer_regex)
                for p, r in zip(predictions, references, strict=True)
            ]
            scores[metric] = sum(hits) / len(hits)
        elif metric == "rouge":
            # RougeLsum is left out: it needs a download.
            found = rouge_score(
                ours, theirs, normalizer=str, tokenizer=words, rouge_keys=tuple(_ROUGE.values())
            )
            scores |= {name: float(found[f"{key}_fmeasure"]) for name, key in _ROUGE.items()}
        elif metric == "bleu":
            # Of the corpus, as sacrebleu computes it.
            tokenize: Any = "zh" if re.search(f"[{_CJK}]", "".join(theirs)) else "13a"
            scores[metric] = float(
                sacre_bleu_score(ours, [[text] for text in theirs], tokenize=tokenize)
            )
        elif metric == "chrf":
            score: Any = chrf_score(ours, [[text] for text in theirs], n_word_order=0)
            scores[metric] = float(score)
        else:
            scores[metric] = sum(map(_token_f1, ours, theirs)) / len(ours)
    return scores


def _token_f1(prediction: str, reference: str) -> float:
    """Overlap of words without articles, as SQuAD counts it (arXiv:1606.05250).

    Where that leaves no word of one text, articles count (the `A` of a multiple choice), and where
    that leaves none, too (operators), whatever stands between spaces: else such texts would equal
    an empty answer.
    """
    ours, theirs = words(prediction), words(reference)
    if not (ours and theirs):
        ours, theirs = prediction.lower().split(), reference.lower().split()
    elif not (_ARTICLES.issuperset(ours) or _ARTICLES.issuperset(theirs)):
        ours, theirs = ([word for word in text if word not in _ARTICLES] for text in (ours, theirs))
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0
