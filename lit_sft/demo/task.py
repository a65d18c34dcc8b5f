"""The built-in task: short questions with answers that can be checked, generated from a fixed seed.

    Calculate 7-8+3       -1+3=2    one-digit operands, + and -; the last integer is the result
    Is 7 larger than 3?   Yes.      also bigger, greater
    Reverse the word nap  pan       words of three letters

Two questions of the SFT course, which are no calculation, are in the training split. The third one,
`Calculate 1+1-1`, is in the validation split: the model has to compute its answer, not remember it.
"""

from __future__ import annotations

import random
from itertools import product

Row = tuple[str, str]
"""Prompt and answer."""

COURSE: tuple[Row, ...] = (
    (
        "Give me an 1-sentence introduction of LLM.",
        "An LLM is a neural network trained on a large amount of text to predict the next token.",
    ),
    (
        "What's the difference between thread and process?",
        "A process has its own memory, while the threads of a process share it.",
    ),
)
COURSE_REPEATS = 20
"""Copies of each question of the course in the training split, so that it is learned as fast as
the rest.
"""
HELD_OUT = "Calculate 1+1-1"
"""The course's calculation, always in the validation split."""

_SEED = 20


def splits() -> dict[str, list[Row]]:
    """Returns all rows by split, shuffled in the same way in every call.

    Returns:
        4,190 rows of `train`, 300 each of `validation` and `test`. No prompt is in two splits. Five
        of six held-out rows are calculations.
    """
    rng = random.Random(_SEED)
    train, validation, test = list(COURSE * COURSE_REPEATS), [], []
    for rows, held_out in ((_calculations(), 250), (_comparisons(), 25), (_reversals(), 25)):
        rng.shuffle(rows)
        # The sort is stable, so only this prompt moves to the front.
        rows.sort(key=lambda row: row[0] != HELD_OUT)
        validation += rows[:held_out]
        test += rows[held_out : 2 * held_out]
        train += rows[2 * held_out :]
    by_split = {"train": train, "validation": validation, "test": test}
    for rows in by_split.values():
        rng.shuffle(rows)
    return by_split


def _calculations() -> list[Row]:
    """Returns all 4,000 calculations.

    The answer first does one operation, so the model only learns tables of two operands.
    """
    rows = []
    for a, first, b, second, c in product(range(10), "+-", range(10), "+-", range(10)):
        partial = a + b if first == "+" else a - b
        result = partial + c if second == "+" else partial - c
        rows.append((f"Calculate {a}{first}{b}{second}{c}", f"{partial}{second}{c}={result}"))
    return rows


def _comparisons() -> list[Row]:
    """Returns all 300 comparisons."""
    rows = []
    for word, a, b in product(("larger", "bigger", "greater"), range(10), range(10)):
        rows.append((f"Is {a} {word} than {b}?", "Yes." if a > b else "No."))
    return rows


def _reversals() -> list[Row]:
    """Returns all 450 words of consonant, vowel, other consonant; few of them are real words."""
    rows = []
    for first, vowel, last in product("bdflmnprst", "aeiou", "bdflmnprst"):
        if first != last:
            word = first + vowel + last
            rows.append((f"Reverse the word {word}", word[::-1]))
    return rows
