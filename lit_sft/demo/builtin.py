"""The built-in model and task, `builtin:NAME` in a config: a whole run without the internet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_sft.demo import task
from lit_sft.errors import UserError

_MODELS = {"demo": Path(__file__).parent / "model"}
_TASKS = {"arithmetic": task.splits}


def model_dir(name: str) -> Path:
    """Returns the directory of a built-in model.

    It has config, tokenizer and chat template, but no weights (`model.init: random`).

    Args:
        name: The part after `builtin:`. `demo` is a Qwen3 with 0.9 M parameters, whose tokens are
            bytes and a few whole words.

    Raises:
        UserError: There is no such model.
    """
    if name not in _MODELS:
        raise UserError(
            f"there is no built-in model {name!r}; set model.model_name_or_path to"
            f" {_choices(_MODELS)}"
        )
    return _MODELS[name]


def rows(name: str, split: str) -> list[dict[str, Any]]:
    """Returns the rows of a built-in task, in the `messages` format.

    Args:
        name: The part after `builtin:`. `arithmetic` is described in `lit_sft.demo.task`.
        split: `train`, `validation` or `test`; no prompt is in two of them.

    Raises:
        UserError: There is no such task or split.
    """
    if name not in _TASKS:
        raise UserError(f"there is no built-in data set {name!r}; name it {_choices(_TASKS)}")
    splits = _TASKS[name]()
    if split not in splits:
        raise UserError(
            f"builtin:{name} has no split {split!r}; set the split to {' or '.join(splits)}"
        )
    return [_messages(prompt, answer) for prompt, answer in splits[split]]


def _messages(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    }


def _choices(names: dict[str, Any]) -> str:
    return " or ".join(f"builtin:{name}" for name in names)
