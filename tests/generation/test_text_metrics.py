import math

import pytest
import torch
from torchmetrics.functional.text import rouge_score, squad

from lit_sft.generation.text_metrics import (
    METRICS,
    exact_match,
    extract_answer,
    score_names,
    text_scores,
    without_thinking,
    words,
)
from lit_sft.training.token_metrics import TokenMetrics
from lit_sft.types import LossOutput

BOXED = r"#### (-?\d+)|\\boxed\{(.*?)\}"
LAST_INTEGER = r"(-?\d+)\D*$"


@pytest.mark.parametrize(
    ("text", "regex", "answer"),
    [
        ("1+1=2, 2-1=1", LAST_INTEGER, "1"),
        ("so it is -3.", LAST_INTEGER, "-3"),
        ("no number", LAST_INTEGER, "no number"),
        ("<think>9 or 8</think>\n7", LAST_INTEGER, "7"),
        ("She has 1,234.\n#### 1,234", r"#### (-?[\d,.]+)", "1234"),
        ("#### 12.", r"#### (-?[\d,.]+)", "12"),
        ("#### 1,2", "#### (.*)", "1,2"),
        ("#### 1,234,567.5 and 1,2345", "#### (.*)", "1234567.5 and 1,2345"),
        (r"so \boxed{5}", BOXED, "5"),
        ("#### 5", BOXED, "5"),
        ("Answer: 5", r"Answer:(?: (-?\d+\.\d+))?", "Answer: 5"),
        ("it is 5", r"(-?\d*)", "5"),
        ("it is 5.", r"[\d,.]*", "5"),
        ("it is.", r"[\d,.]*", "it is."),
        ("  text ", None, "text"),
    ],
)
def test_extract_answer(text, regex, answer):
    assert extract_answer(text, regex) == answer


def test_exact_match():
    assert exact_match("the result is 4", "2+2=4", LAST_INTEGER)
    assert not exact_match("the result is 4", "2+2=4")
    assert not exact_match("14", "4", LAST_INTEGER)


@pytest.mark.parametrize(
    "text", ["<think>a</think> b", "<think>\na\n</think>\n\nb", "a</think>b", "b<think>cut off"]
)
@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_thoughts_are_removed(text, marks):
    assert without_thinking(text.replace("<think>", marks[0]).replace("</think>", marks[1])) == "b"


def test_words():
    assert words("The cat's  mat, 3.5 snake_case") == [
        "the",
        "cat",
        "s",
        "mat",
        "3",
        "5",
        "snake",
        "case",
    ]
    assert words("GPT你好,世界") == ["gpt", "你", "好", "世", "界"]
    assert words("हिन्दी का की தமிழ் สวัสดี") == ["हिन्दी", "का", "की", "தமிழ்", "สวัสดี"]
    assert words("Cafe\u0301 a\u0332 \u2764\ufe0f 1") == [
        "caf\u00e9",
        "a\u0332",
        "1",
    ]  # no word of a mark alone


def test_scores_are_those_of_the_field():
    """rouge as it is by default, BLEU of the corpus, F1 of SQuAD; worked out by hand where
    short.
    """
    ours = ["The cat sat on the mat today.", "hello there, general"]
    theirs = ["The cat sat on the mat!", "hello there"]
    scores = text_scores(METRICS, ours, theirs, None)
    rouge = rouge_score(ours, theirs, rouge_keys=("rouge1", "rouge2", "rougeL"))
    for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert scores[name] == float(rouge[f"{key}_fmeasure"])
    assert scores["rouge_1"] == pytest.approx((12 / 13 + 4 / 5) / 2)
    assert scores["token_f1"] == pytest.approx((2 * 4 / 9 + 4 / 5) / 2)  # articles do not count
    # 13a: 8 + 4 tokens, of which 6 + 2, 5 + 1, 4 and 3 n-grams are found; no brevity penalty
    assert scores["bleu"] == pytest.approx((8 / 12 * 6 / 10 * 4 / 8 * 3 / 6) ** 0.25, rel=1e-5)
    assert 0.7 < scores["chrf"] < 1 and scores["exact_match"] == 0


def test_token_f1_is_that_of_squad():
    texts = ["The cat sat on a mat.", "a cat", "An answer: 5", "", "the old cat cat"]
    for ours in texts:
        for theirs in filter(None, texts):
            answers = [{"answers": {"answer_start": [0], "text": [theirs]}, "id": "1"}]
            f1 = squad([{"prediction_text": ours, "id": "1"}], answers)["f1"] / 100
            assert text_scores(["token_f1"], [ours], [theirs], None)["token_f1"] == pytest.approx(
                float(f1)
            )


@pytest.mark.parametrize(
    ("ours", "theirs", "score"),
    [
        ("", "A", 0),
        ("the", "A", 0),
        ("A.", "A", 1),
        ("A B", "A", 2 / 3),
        ("A", "the A", 2 / 3),
        ("-", "+", 0),
        ("+", "+", 1),
    ],
)
def test_token_f1_of_texts_without_words(ours, theirs, score):
    assert text_scores(["token_f1"], [ours], [theirs], None)["token_f1"] == pytest.approx(score)


def test_equal_texts_score_one_and_empty_ones_nothing():
    texts = ["one two three four five", "你好世界,今天好"]
    assert text_scores(
        METRICS, texts, [f"<think>x</think>{text}" for text in texts], None
    ) == pytest.approx(dict.fromkeys(score_names(METRICS), 1.0))
    assert set(text_scores(METRICS, ["", ""], texts, None).values()) == {0.0}


def test_token_metrics_weigh_every_target():
    metric = TokenMetrics()
    for losses, correct in (([1.0], 1), ([2.0, 3.0, 4.0], 0), ([], 0)):
        metric.update(
            LossOutput(torch.tensor(sum(losses)), torch.tensor(len(losses)), torch.tensor(correct))
        )
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values == pytest.approx(
        {"loss": 2.5, "perplexity": math.exp(2.5), "token_accuracy": 0.25}
    )
    metric.reset()
    assert float(metric.compute()["loss"]) == 0
