import pytest

from lit_sft.metrics import exact_match, extract_answer, flops_per_token

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
        ("  text ", None, "text"),
    ],
)
def test_extract_answer(text, regex, answer):
    assert extract_answer(text, regex) == answer


def test_exact_match():
    assert exact_match("the result is 4", "2+2=4", LAST_INTEGER)
    assert not exact_match("the result is 4", "2+2=4")
    assert not exact_match("14", "4", LAST_INTEGER)


def test_flops():
    assert flops_per_token(100, 100) == 600
    assert flops_per_token(100, 0) == 400
