"""Reads the text of a config: refuses broken YAML, a text without keys, and a key written twice."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from lit_sft.errors import UsageError

EXPECTED = "expected keys with values, as --print_config shows"
MERGE = "<<"
"""YAML's key for merging another mapping, which may stand in a mapping more than once."""


def check_config(text: str, origin: str) -> None:
    """Checks the text of a config file.

    Args:
        text: The text.
        origin: The file, as an error names it.

    Raises:
        UsageError: The text is no YAML, holds no keys with values, or has a key twice.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{origin}: {_in_words(error)}") from error
    if root is None:
        raise UsageError(f"{origin} is empty: {EXPECTED}")
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{origin} holds no keys: {EXPECTED}")
    _refuse_double_keys(root, origin)


def check_value(text: str, origin: str) -> None:
    """Checks a value that may be written in YAML; a text that is no YAML is taken as text.

    Args:
        text: The value.
        origin: Its key, as an error names it.

    Raises:
        UsageError: The value has a key twice.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    if root is not None:
        _refuse_double_keys(root, origin)


def _refuse_double_keys(root: yaml.Node, origin: str) -> None:
    """Refuses a key that is written twice; YAML would silently keep the last one only.

    Raises:
        UsageError: A key is written twice.
    """
    lines: dict[str, int] = {}
    for key, line in _keys(root, ""):
        if key in lines:
            place = f"line {line}" if line == lines[key] else f"lines {lines[key]} and {line}"
            raise UsageError(
                f"{origin}: {key} is written twice, in {place}, and only one would count: merge"
                " the two"
            )
        lines[key] = line
    for key, line in lines.items():
        # `trainer.devices: 2` beside `trainer:` at the top of a file: one would replace the other.
        group = key.partition(".")[0]
        if isinstance(root, yaml.MappingNode) and _is_at_top(root, key) and group in lines:
            raise UsageError(
                f"{origin}: {key} in line {line} stands beside {group} in line {lines[group]}, and"
                f" only one would count: write it below {group}"
            )


def _is_at_top(root: yaml.MappingNode, key: str) -> bool:
    """Whether a dotted key is written as one word at the top of the text."""
    return "." in key and any(node.value == key for node, _ in root.value)


def _keys(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    """Lists the dotted keys below a node with their lines, from 1."""
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield from _keys(item, f"{prefix.removesuffix('.')}[{position}].")
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == MERGE:
            continue
        yield f"{prefix}{key.value}", key.start_mark.line + 1
        yield from _keys(value, f"{prefix}{key.value}.")


def _in_words(error: yaml.YAMLError) -> str:
    """Describes an error of YAML: its line and the reason."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    reason = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return f"{reason} ({error.context})" if error.context else reason
