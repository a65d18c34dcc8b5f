"""Tables in the terminal stay readable, whatever a model answers."""

import io

from rich.console import Console

from lit_sft.console import SHOWN_CHARACTERS, SHOWN_LINES, answers_markdown, answers_table


def shown(*answers):
    """What the terminal shows of a table with one question."""
    console = Console(width=100, file=io.StringIO())
    columns = {f"column {number}": [answer] for number, answer in enumerate(answers)}
    console.print(answers_table(["What is a thread?"], columns))
    return console.file.getvalue()


def test_a_model_that_loops_on_newlines():
    text = shown("1" + "\n" * 590, "fine")
    assert len(text.splitlines()) < 2 * SHOWN_LINES
    assert f"… {590 - SHOWN_LINES + 1} more characters" in text


def test_a_model_that_repeats_a_word():
    text = shown("word " * 1000, "fine")
    assert len(text.splitlines()) < 40
    assert f"… {5000 - SHOWN_CHARACTERS:,} more characters" in text


def test_short_answers_are_whole():
    text = "\n".join(map(str, range(SHOWN_LINES)))
    assert "more characters" not in shown(text)


def test_tensorboard_has_the_whole_text():
    assert answers_markdown(["q"], {"after": ["word " * 1000]}).count("word") == 1000
