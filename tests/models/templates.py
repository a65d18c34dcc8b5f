"""What comes of rows under the chat templates of families, which are read out of public packages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chat_templates import runs
from models import families
from template_oracle import Server, Verdict, judge
from template_sweep import PACKAGES, ROWS, templates_of

from lit_sft.errors import UserError
from lit_sft.types import Example

COLUMNS = ("stops", "thinking", "tools")
THINKING = ("reasoning", "reasoning, multi-turn")
TOOLS = ("call", "call, result, answer", "two calls", "calls, multi-turn")
PLAIN = ("single", "multi-turn", "system")
NOT_WRITTEN = "not written"
REASONS = {
    "no call": NOT_WRITTEN,
    "template": "refused by the template",
    "open": "no end of a turn",
    "prefix": "does not follow its prompt",
    "opens thinking": "the prompt opens a thought",
}
"""Reason of a refusal in `template_oracle` -> in the table."""
NONE = dict.fromkeys(COLUMNS, "-")
"""Of a family without a template in these packages."""


def measure(folder: Path) -> dict[str, dict[str, str]]:
    """Judges the templates of all families: family -> column -> value.

    Args:
        folder: Where the packages are downloaded to.

    Raises:
        DownloadError: A package cannot be had.
    """
    packages = {name: templates_of(name, folder) for name in PACKAGES}
    judged: dict[str | None, dict[str, str]] = {None: NONE}
    for family in families.FAMILIES.values():
        if family.template not in judged:
            package, _, template = str(family.template).partition("/")
            judged[family.template] = _judge(packages[package][template])
    return {name: judged[family.template] for name, family in families.FAMILIES.items()}


def _judge(template: str) -> dict[str, str]:
    server = Server(template)
    verdicts = {shape: judge(server, ROWS[shape]) for shape in (*PLAIN, *THINKING, *TOOLS)}
    wrong = {shape: found.faults for shape, found in verdicts.items() if found.kind == "wrong"}
    assert not wrong
    examples = {shape: _examples(server, shape) for shape in verdicts}
    return {
        "stops": _stops(server, examples),
        "thinking": _written(verdicts, examples, THINKING, "left_out:reasoning_content"),
        "tools": _written(verdicts, examples, TOOLS, "left_out:tools"),
    }


def _examples(server: Server, shape: str) -> Sequence[Example]:
    [result] = server.renderer.render([ROWS[shape].conversation()], [0])
    return [] if isinstance(result, UserError) else result


def _stops(server: Server, examples: dict[str, Sequence[Example]]) -> str:
    """The tokens in which trained turns end."""
    tokens = {}
    for group in examples.values():
        for example in group:
            for _, end in runs(example):
                tokens[server.tokenizer.convert_ids_to_tokens(example.input_ids[end - 1])] = True
    return " ".join(f"`{token}`" for token in tokens) or "no row is trained"


def _written(
    verdicts: dict[str, Verdict],
    examples: dict[str, Sequence[Example]],
    shapes: Sequence[str],
    left_out: str,
) -> str:
    """Sums up the rows of some shapes."""
    kinds = [verdicts[shape].kind for shape in shapes]
    refused = {REASONS[kind.partition(": ")[2]] for kind in kinds if kind.startswith("refused")}
    notes = {note for shape in shapes for example in examples[shape] for note in example.notes}
    is_all = all(kind.startswith("refused") for kind in kinds)
    if left_out in notes or (is_all and refused == {NOT_WRITTEN}):
        return NOT_WRITTEN
    if refused:
        return f"{'no' if is_all else 'in part'}: {', '.join(sorted(refused))}"
    return "per turn" if "per turn" in kinds else "yes"
