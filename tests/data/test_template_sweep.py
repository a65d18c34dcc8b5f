"""What is trained under the chat templates of public packages, judged by `template_oracle`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES, runs
from template_oracle import Server, judge, judge_examples
from template_sweep import PACKAGES, ROWS, DownloadError, sweep, templates_of

from lit_sft.types import Example

TRAINED = {"trl": 1469, "axolotl": 662, "llama.cpp": 1420}
"""Rows that are trained under the templates of a package; the others are refused."""


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_no_mask_is_wrong_under_any_template(package: str, pytestconfig: Any) -> None:
    """Each row is trained as a server would be asked for it, or refused with a true reason."""
    folder = Path(pytestconfig.cache.mkdir("template_sweep"))
    try:
        templates = templates_of(package, folder)
    except DownloadError as error:
        pytest.skip(str(error))
    verdicts = sweep(templates)
    wrong = {where: found.faults for where, found in verdicts.items() if found.kind == "wrong"}
    assert not wrong
    trained = [found for found in verdicts.values() if not found.kind.startswith("refused")]
    assert len(trained) >= TRAINED[package]


def _shifted(example: Example, by: int) -> Example:
    mask = example.loss_mask
    return replace(example, loss_mask=[0] * by + mask[:-by] if by > 0 else mask[-by:] + [0] * -by)


def _with_run(example: Example, begin: int, end: int) -> Example:
    mask = [int(begin <= i < end) for i in range(len(example.loss_mask))]
    return replace(example, loss_mask=mask)


def _spoiled(example: Example) -> dict[str, Example]:
    """Makes examples whose mask is wrong, from one with one run."""
    [(begin, end)] = runs(example)
    return {
        "one token early": _shifted(example, -1),
        "one token late": _shifted(example, 1),
        "header": _with_run(example, begin - 3, end),
        "no first token": _with_run(example, begin + 1, end),
        "no stop": _with_run(example, begin, end - 1),
        "nothing": _with_run(example, 0, 0),
        "everything": _with_run(example, 0, end),
    }


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("chatml", "single"),
        ("chatml", "system"),
        ("llama-3", "call"),
        ("deepseek-v3", "call"),
        ("qwen3", "reasoning"),
        ("gpt-oss", "reasoning"),
    ],
)
def test_oracle_sees_wrong_masks(family: str, shape: str) -> None:
    template = FAMILIES[family].template
    assert template is not None
    server = Server(template)
    row = ROWS[shape]
    assert judge(server, row).kind == "exact"
    [result] = server.renderer.render([row.conversation()], [0])
    [example] = result
    for name, spoiled in _spoiled(example).items():
        assert judge_examples(server, row, [spoiled]).kind == "wrong", name
    assert judge_examples(server, row, [example, example]).kind == "wrong"
