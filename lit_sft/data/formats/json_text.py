"""Reads JSON in which no object has a key twice; Python would silently keep the last one only."""

from __future__ import annotations

import json
from typing import Any


class DoubleKeyError(ValueError):
    """An object has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r:.60} stands twice in an object; keep one of them")


def parse_json(text: str) -> Any:
    """Parses a text.

    Raises:
        DoubleKeyError: An object in it has a key twice.
        ValueError: It is not JSON.
        RecursionError: It is nested too deep.
    """
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DoubleKeyError(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Made once: `json.loads` would make one for each text."""
