"""What people see in the terminal and in TensorBoard: rows, trained tokens, answers side by
side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED, READ = "bold green", "dim"


def console() -> Console:
    """Where tables go; 100 columns where the output is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=100)


def coloured_tokens(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[int]
) -> Text:
    """An example with its trained tokens in green, the rest dimmed, special tokens visible."""
    text = Text()
    start = 0
    # Runs of equal mask are decoded together, as a character may take several tokens.
    for end in range(1, len(input_ids) + 1):
        if end == len(input_ids) or loss_mask[end] != loss_mask[start]:
            piece = str(tokenizer.decode(list(input_ids[start:end]), skip_special_tokens=False))
            text.append(piece, style=TRAINED if loss_mask[start] else READ)
            start = end
    return text


def answers_table(questions: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    """Questions down, answers of each column (`before`, `after`) side by side."""
    table = Table(title="Answers", show_lines=True)
    table.add_column("Question", ratio=1, overflow="fold")
    for name in columns:
        table.add_column(name, ratio=2, overflow="fold")
    for row, question in enumerate(questions):
        table.add_row(
            Text(question), *(Text(visible(answers[row])) for answers in columns.values())
        )
    return table


def answers_markdown(questions: Sequence[str], columns: Mapping[str, Sequence[str]]) -> str:
    """The same table for TensorBoard's text page."""
    lines = ["| Question | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, question in enumerate(questions):
        cells = [question, *(visible(answers[row]) for answers in columns.values())]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def visible(text: str) -> str:
    """Control characters as escapes, so that the gibberish of an untrained model cannot move the
    cursor.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _cell(text: str) -> str:
    for old, new in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("\n", "<br>"),
    ):
        text = text.replace(old, new)
    return text
