"""The built-in task: short questions whose answers can be checked, all made by code from a fixed
seed.

    Calculate 7-8+3       -1+3=2    one-digit operands, + and -; the last integer is the result
    Is 7 larger than 3?   Yes.      also bigger, greater
    Reverse the word nap  pan       words of three letters

The training split also has the two questions of the SFT course that are no calculation. The third,
`Calculate 1+1-1`, is kept for validation, like every held-out prompt: a right answer to it was
worked out, not remembered.
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
"""Times that each question of the course is in the training split, so that it is learned as soon as
the rest.
"""
HELD_OUT = "Calculate 1+1-1"
"""The course's calculation, always in the validation split."""

_SEED = 20


def splits() -> dict[str, list[Row]]:
    """All rows by split, shuffled; the same in every call. No prompt is in two splits.

    Returns:
        4,190 rows of `train`, 300 each of `validation` and `test`; five of six held-out rows are
        calculations.
    """
    rng = random.Random(_SEED)
    train, validation, test = list(COURSE * COURSE_REPEATS), [], []
    for rows, held_out in ((_calculations(), 250), (_comparisons(), 25), (_reversals(), 25)):
        rng.shuffle(rows)
        # Stable: only this one comes to the front.
        rows.sort(key=lambda row: row[0] != HELD_OUT)
        validation += rows[:held_out]
        test += rows[held_out : 2 * held_out]
        train += rows[2 * held_out :]
    by_split = {"train": train, "validation": validation, "test": test}
    for rows in by_split.values():
        rng.shuffle(rows)
    return by_split


def _calculations() -> list[Row]:
    """All 4,000. The answer does the first operation, so there are tables of two operands to learn,
    not of three.
    """
    rows = []
    for a, first, b, second, c in product(range(10), "+-", range(10), "+-", range(10)):
        partial = a + b if first == "+" else a - b
        result = partial + c if second == "+" else partial - c
        rows.append((f"Calculate {a}{first}{b}{second}{c}", f"{partial}{second}{c}={result}"))
    return rows


def _comparisons() -> list[Row]:
    """All 300."""
    questions = product(("larger", "bigger", "greater"), range(10), range(10))
    return [(f"Is {a} {word} than {b}?", "Yes." if a > b else "No.") for word, a, b in questions]


def _reversals() -> list[Row]:
    """All 450 of consonant, vowel, consonant that do not read the same both ways; few are real
    words.
    """
    words = (
        a + vowel + b for a, vowel, b in product("bdflmnprst", "aeiou", "bdflmnprst") if a != b
    )
    return [(f"Reverse the word {word}", word[::-1]) for word in words]
