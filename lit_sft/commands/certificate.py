"""`preview --certify`: which shapes of rows can be trained with a tokenizer and its chat template.

Needs the tokenizer, but neither weights nor rows.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from lit_sft.console import show, takes_any_text, visible
from lit_sft.data.formats.parse import to_conversation
from lit_sft.data.row_shapes import ROW_SHAPES
from lit_sft.data.stats import describe
from lit_sft.data.tokenize import Renderer
from lit_sft.data_pipeline import SFTData
from lit_sft.errors import UserError
from lit_sft.types import Conversation, Example, Message

Verdict = Literal["proved", "expanded", "lenient", "refused"]
"""`proved`: one example; `expanded`: several examples, each of them proved; `lenient`: trained with
a mask that is not proved (`data.unproved: lenient`); `refused`: such a row is an error.
"""
STYLES: dict[Verdict, str] = {
    "proved": "green",
    "expanded": "green",
    "lenient": "yellow",
    "refused": "red",
}
_QUESTION = "Hello"


@dataclass(frozen=True)
class ShapeResult:
    """What comes of the row of one shape."""

    shape: str
    verdict: Verdict
    examples: int = 0
    tokens: int = 0
    """Tokens of all examples."""
    trained_tokens: int = 0
    """Trained tokens of all examples."""
    notes: tuple[str, ...] = ()
    """What was done to the row, or left out, in words."""
    reason: str | None = None
    """Why the row is refused."""


@dataclass(frozen=True)
class Certificate:
    """What comes of rows of every shape, and how answers begin and end."""

    model: str
    before_answer: str | None
    """The text between a question and its answer: the end of the user turn and the generation
    prompt. None if the template does not take a question.
    """
    stop_tokens: tuple[str, ...]
    """Stop tokens of all trained turns."""
    results: tuple[ShapeResult, ...]


def certify(data: SFTData, output: Literal["rich", "json"]) -> None:
    """Shows the certificate of the tokenizer and chat template of a run.

    Args:
        data: The data of the run, none of which is read.
        output: `rich`: a table; `json`: one object on stdout, and nothing else there.
    """
    certificate = make_certificate(data)
    if output == "json":
        print(json.dumps(_as_json(certificate), ensure_ascii=not takes_any_text()))
        return
    _show(certificate)


def make_certificate(data: SFTData) -> Certificate:
    """Renders a row of each shape with the settings of a run."""
    results = []
    stop_ids: dict[int, None] = {}
    for shape, row in ROW_SHAPES.items():
        conversation = to_conversation(
            row, format="messages", system_prompt=data.options.system_prompt
        )
        [rendered] = data.renderer.render([conversation], [0])
        if isinstance(rendered, UserError):
            results.append(ShapeResult(shape, "refused", reason=str(rendered)))
            continue
        results.append(_result_of(shape, rendered))
        for example in rendered:
            stop_ids |= dict.fromkeys(example.stop_ids)
    return Certificate(
        model=data.options.model_name_or_path,
        before_answer=_before_answer(data.renderer),
        stop_tokens=tuple(data.tokenizer.convert_ids_to_tokens(list(stop_ids))),
        results=tuple(results),
    )


def _result_of(shape: str, examples: list[Example]) -> ShapeResult:
    notes = dict.fromkeys(note for example in examples for note in example.notes)
    verdict: Verdict = "proved"
    if "lenient" in notes:
        verdict = "lenient"
    elif len(examples) > 1:
        verdict = "expanded"
    return ShapeResult(
        shape=shape,
        verdict=verdict,
        examples=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(sum(example.loss_mask) for example in examples),
        notes=tuple(describe(note) for note in notes),
    )


def _before_answer(renderer: Renderer) -> str | None:
    """Returns the text between a question and the answer; None if the question is refused."""
    question = Conversation((Message("user", _QUESTION),))
    try:
        prompt, _ = renderer.template.write(question, generation_prompt=True)
    except UserError:
        return None
    return prompt.rpartition(_QUESTION)[2]


def _as_json(certificate: Certificate) -> dict[str, Any]:
    shapes = []
    for result in certificate.results:
        shapes.append({**vars(result), "row": ROW_SHAPES[result.shape]})
    return {**vars(certificate), "results": shapes}


def _show(certificate: Certificate) -> None:
    """Shows how answers begin and end, the table, and below it the reasons and notes."""
    show(_head(certificate))
    table = Table(title="What comes of a row of each shape")
    table.add_column("Row", overflow="fold")
    table.add_column("Verdict", no_wrap=True)
    for name in ("Examples", "Trained", "See"):
        table.add_column(name, justify="right", no_wrap=True)
    numbers: dict[str, int] = {}
    for result in certificate.results:
        remarks = result.notes if result.reason is None else (result.reason,)
        for remark in remarks:
            numbers.setdefault(remark, len(numbers) + 1)
        table.add_row(*_cells(result, [numbers[remark] for remark in remarks]))
    show(table)
    show(_numbered(numbers))
    counts = Counter(result.verdict for result in certificate.results)
    show(Text(", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES if counts[verdict])))


def _head(certificate: Certificate) -> Table:
    """Returns three lines: the model, the prompt before an answer, and the ends of answers."""
    prompt = "the template takes no question"
    if certificate.before_answer is not None:
        prompt = repr(certificate.before_answer)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("model", Text(visible(certificate.model)))
    grid.add_row("before an answer", Text(visible(prompt)))
    grid.add_row("stop tokens", Text(visible(" ".join(certificate.stop_tokens) or "none")))
    return grid


def _cells(result: ShapeResult, numbers: list[int]) -> list[Text]:
    verdict = Text(result.verdict, style=STYLES[result.verdict])
    see = Text(", ".join(map(str, numbers)))
    if result.reason is not None:
        return [Text(result.shape), verdict, Text(), Text(), see]
    trained = Text(f"{result.trained_tokens} of {result.tokens}")
    return [Text(result.shape), verdict, Text(str(result.examples)), trained, see]


def _numbered(remarks: dict[str, int]) -> Table:
    """Returns remarks with their numbers, below each other."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for remark, number in remarks.items():
        grid.add_row(str(number), Text(visible(remark)))
    return grid
