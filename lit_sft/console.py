"""Tables and colours for the terminal, and the same tables for TensorBoard."""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED, READ = "bold green", "dim"
SHOWN_LINES = 12
"""Lines of a text that a table in the terminal shows."""
SHOWN_CHARACTERS = 600
"""Characters of it, which are about as many lines in a table of two answers."""


def console() -> Console:
    """Returns the console for tables; 100 columns wide if stdout is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=100)


def show(renderable: RenderableType) -> None:
    """Prints a table or panel, and never fails: what only prints must not end a run.

    Characters that the encoding of stdout lacks become `?`. If nobody reads stdout any more,
    nothing is printed.
    """
    screen = console()
    try:
        try:
            screen.print(renderable)
        except UnicodeEncodeError as error:
            # A new one, because the first still holds what it could not print.
            screen = console()
            with screen.capture() as capture:
                screen.print(renderable)
            print(capture.get().encode(error.encoding, "replace").decode(error.encoding), end="")
    except (OSError, ValueError):
        # A broken pipe, a terminal that is gone, or a closed stream.
        return


def takes_any_text() -> bool:
    """Whether stdout has every character, so that a text can be printed as it is."""
    return sys.stdout is not None and (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")


def coloured_tokens(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[int]
) -> Text:
    """Colours an example: trained tokens green, others dimmed, special tokens visible.

    Args:
        tokenizer: Decodes the tokens.
        input_ids: [T] token ids.
        loss_mask: [T], 1 = trained.
    """
    text = Text()
    start = 0
    # Neighbours with the same mask are decoded together: a character may span several tokens.
    for end in range(1, len(input_ids) + 1):
        if end == len(input_ids) or loss_mask[end] != loss_mask[start]:
            piece = str(tokenizer.decode(list(input_ids[start:end]), skip_special_tokens=False))
            text.append(piece, style=TRAINED if loss_mask[start] else READ)
            start = end
    return text


def answers_table(questions: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    """Returns a table with one row per question and one column of answers per name.

    Long texts are cut: a model that repeats itself would fill the terminal.
    """
    table = Table(title="Answers", show_lines=True)
    table.add_column("Question", ratio=1, overflow="fold")
    for name in columns:
        table.add_column(name, ratio=2, overflow="fold")
    for row, question in enumerate(questions):
        table.add_row(
            Text(_shortened(question)),
            *(Text(_shortened(answers[row])) for answers in columns.values()),
        )
    return table


def _shortened(text: str) -> str:
    """Returns the visible beginning of a text, and how many characters were cut."""
    shown = "\n".join(text.split("\n")[:SHOWN_LINES])[:SHOWN_CHARACTERS]
    if shown == text:
        return visible(text)
    cut = len(text) - len(shown)
    return f"{visible(shown)}\n… {cut:,} more characters"


def answers_markdown(questions: Sequence[str], columns: Mapping[str, Sequence[str]]) -> str:
    """Returns the table of `answers_table` as Markdown, for the text page of TensorBoard."""
    lines = ["| Question | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, question in enumerate(questions):
        cells = [question, *(visible(answers[row]) for answers in columns.values())]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def visible(text: str) -> str:
    """Escapes control characters: the gibberish of an untrained model could move the cursor."""
    shown = []
    for char in text:
        is_shown = char.isprintable() or char == "\n"
        shown.append(char if is_shown else char.encode("unicode_escape").decode())
    return "".join(shown)


def _cell(text: str) -> str:
    """Escapes what Markdown or HTML would interpret in a cell of a table."""
    text = html.escape(text, quote=False)
    for old, new in (("|", "\\|"), ("`", "\\`"), ("\n", "<br>")):
        text = text.replace(old, new)
    return text
