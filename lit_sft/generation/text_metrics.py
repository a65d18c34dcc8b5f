"""Metrics that compare answers with references: exact match, rouge, bleu, chrF and token F1."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torchmetrics.functional.text import chrf_score, rouge_score, sacre_bleu_score

METRICS = ("exact_match", "rouge", "bleu", "chrf", "token_f1")
"""Names in `model.evaluation.metrics`."""

_OPEN, _CLOSE = r"(?:<think>|\[THINK\])", r"(?:</think>|\[/THINK\])"
THINKING = re.compile(rf"{_OPEN}.*?(?:{_CLOSE}|\Z)|\A(?:(?!{_OPEN}).)*{_CLOSE}", re.DOTALL)
"""A thinking block, even if the answer was cut inside it or the prompt had opened it."""
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ARTICLES = {"a", "an", "the"}
_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def without_thinking(text: str) -> str:
    """Removes thinking blocks."""
    return THINKING.sub("", text).strip()


def extract_answer(text: str, answer_regex: str | None) -> str:
    """Returns the part of a text that `exact_match` compares.

    Thinking blocks are removed first. `1,000` becomes `1000`.

    Args:
        text: An answer or a reference.
        answer_regex: None: the whole text.

    Returns:
        The last match that is not empty, or the first group of it that took part; the whole text
        if there is none.
    """
    text = without_thinking(text)
    if answer_regex is None:
        return text
    for match in reversed(list(re.finditer(answer_regex, text))):
        found = match[0]
        if match.re.groups:
            found = next((group for group in match.groups() if group is not None), "")
        found = _THOUSANDS.sub("", found).strip().rstrip(".")
        if found:
            return found
    return text


def exact_match(prediction: str, reference: str, answer_regex: str | None = None) -> bool:
    """Whether `extract_answer` gives the same string for both texts."""
    return extract_answer(prediction, answer_regex) == extract_answer(reference, answer_regex)


def words(text: str) -> list[str]:
    """Splits a text into lower-case words without punctuation.

    In Chinese and Japanese, which have no spaces, every character is a word. A mark (an accent, a
    vowel sign of Hindi or Thai) belongs to the letter before it.
    """
    text = unicodedata.normalize("NFC", text.lower())
    found = {char for char in text if unicodedata.category(char).startswith("M")}
    marks = f"[{''.join(sorted(found))}]*" if found else ""
    return re.findall(rf"[{_CJK}]{marks}|(?:(?![{_CJK}])[^\W_]{marks})+", text)


def score_names(metrics: Iterable[str]) -> list[str]:
    """Lists the names of the scores that these metrics give."""
    names: list[str] = []
    for metric in metrics:
        names += _ROUGE if metric == "rouge" else [metric]
    return names


def text_scores(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    answer_regex: str | None,
) -> dict[str, float]:
    """Scores predictions against their references; 0 is no overlap, 1 is equality.

    Args:
        metrics: Names from `METRICS`.
        predictions: N texts, at least one.
        references: N texts.
        answer_regex: For the exact match (see `extract_answer`). The other metrics compare whole
            texts without thinking blocks.

    Returns:
        Score by name. Rouge gives the F measures `rouge_1`, `rouge_2` and `rouge_l`.
    """
    assert predictions and len(predictions) == len(references)
    shown_predictions = [without_thinking(text) for text in predictions]
    shown_references = [without_thinking(text) for text in references]
    scores: dict[str, float] = {}
    for metric in metrics:
        if metric == "exact_match":
            scores[metric] = _exact_match_share(predictions, references, answer_regex)
        elif metric == "rouge":
            scores |= _rouge(shown_predictions, shown_references)
        elif metric == "bleu":
            scores[metric] = _bleu(shown_predictions, shown_references)
        elif metric == "chrf":
            scores[metric] = _chrf(shown_predictions, shown_references)
        else:
            total = sum(map(_token_f1, shown_predictions, shown_references))
            scores[metric] = total / len(predictions)
    return scores


def _exact_match_share(
    predictions: Sequence[str], references: Sequence[str], answer_regex: str | None
) -> float:
    hits = 0
    for prediction, reference in zip(predictions, references, strict=True):
        hits += exact_match(prediction, reference, answer_regex)
    return hits / len(predictions)


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    # RougeLsum is left out: it would download a sentence splitter.
    found = rouge_score(
        predictions,
        references,
        normalizer=str,
        tokenizer=words,
        rouge_keys=tuple(_ROUGE.values()),
    )
    return {name: float(found[f"{key}_fmeasure"]) for name, key in _ROUGE.items()}


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of the corpus, as sacrebleu computes it."""
    has_cjk = re.search(f"[{_CJK}]", "".join(references)) is not None
    tokenize: Any = "zh" if has_cjk else "13a"
    score = sacre_bleu_score(predictions, [[text] for text in references], tokenize=tokenize)
    return float(score)


def _chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    score: Any = chrf_score(predictions, [[text] for text in references], n_word_order=0)
    return float(score)


def _token_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two texts without articles, as SQuAD computes it (arXiv:1606.05250).

    Articles count if a text has no other word, such as the `A` of a multiple choice. A text without
    any word, such as `+`, is split at spaces. Otherwise such texts would equal an empty answer.
    """
    ours = words(prediction)
    theirs = words(reference)
    if not ours or not theirs:
        ours = prediction.lower().split()
        theirs = reference.lower().split()
    elif not _ARTICLES.issuperset(ours) and not _ARTICLES.issuperset(theirs):
        ours = [word for word in ours if word not in _ARTICLES]
        theirs = [word for word in theirs if word not in _ARTICLES]
    common = (Counter(ours) & Counter(theirs)).total()
    if common == 0:
        return 0.0
    return 2 * common / (len(ours) + len(theirs))
