"""`preview`: shows rows as the model will see them. Needs the tokenizer, but no weights."""

from __future__ import annotations

import json
import logging
from typing import Literal

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_sft.console import coloured_tokens, console, takes_any_text
from lit_sft.data.sources.rows import first_rows
from lit_sft.data.stats import Counts
from lit_sft.data_pipeline import SFTData
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Message

log = logging.getLogger(__name__)


def preview(data: SFTData, num_rows: int, output: Literal["rich", "json"]) -> None:
    """Shows the first rows: as conversations, then as tokens with the trained ones in green.

    Args:
        data: The data of the run; its training rows are shown.
        num_rows: Number of rows.
        output: `rich`: tables; `json`: one object per example on stdout, and nothing else there.
    """
    if num_rows < 1:
        raise UserError(f"--num_rows is {num_rows}, it must be at least 1")
    rows = first_rows(data.open("train"), num_rows)
    preparation = data.preparation(rows)
    counts = Counts()
    examples = list(preparation.examples(rows, counts))
    for line in counts.lines("preview"):
        log.info(line)
    tokenizer = data.tokenizer
    if output == "json":
        for example in examples:
            text = tokenizer.decode(example.input_ids, skip_special_tokens=False)
            record = {
                "row": example.row,
                "part": example.part,
                "text": text,
                "input_ids": example.input_ids,
                "loss_mask": example.loss_mask,
            }
            print(json.dumps(record, ensure_ascii=not takes_any_text()))
        return
    screen = console()
    kept = dict.fromkeys(example.row for example in examples)
    screen.print(_conversations_table([preparation.conversation(rows, row) for row in kept]))
    for example in examples:
        trained = sum(example.loss_mask)
        title = (
            f"row {example.row}, part {example.part}: {len(example.input_ids)} tokens, {trained}"
            " trained (green)"
        )
        screen.print(
            Panel(coloured_tokens(tokenizer, example.input_ids, example.loss_mask), title=title)
        )


def _conversations_table(conversations: list[Conversation]) -> Table:
    table = Table(title="Rows, turn by turn", show_lines=True)
    for name in ("User", "Assistant"):
        table.add_column(name, ratio=1, overflow="fold")
    for conversation in conversations:
        asked = [] if conversation.text is None else [conversation.text]
        for message in conversation.messages:
            if message.role == "assistant":
                table.add_row(Text("\n".join(asked)), Text(_said(message)))
                asked = []
            elif message.role == "user":
                asked.append(message.content)
            else:
                asked.append(f"[{message.role}] {message.content}")
        # A plain text, or a question without an answer.
        if asked:
            table.add_row(Text("\n".join(asked)), "")
        table.add_section()
    return table


def _said(message: Message) -> str:
    """Returns the reasoning, the answer and the calls of an assistant turn."""
    parts = []
    if message.reasoning_content:
        parts.append(f"[reasoning] {message.reasoning_content}")
    if message.content:
        parts.append(message.content)
    for call in message.tool_calls or ():
        parts.append(f"[call] {json.dumps(call['function'], ensure_ascii=not takes_any_text())}")
    return "\n".join(parts)
