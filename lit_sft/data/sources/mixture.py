"""Members of a mixture: `[{path: ..., weight: 2.0}, ...]` in `data.train` and other sources."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_sft.errors import UserError

KEYS = ("path", "name", "split", "weight")


@dataclass(frozen=True)
class Member:
    """One source of a mixture."""

    path: str
    name: str | None
    """Configuration of a hub data set."""
    split: str | None
    weight: float
    """How often the rows are repeated; 0.5: half of them."""


def read_member(entry: str | Mapping[str, Any], key: str) -> Member:
    """Reads one entry of the list.

    Args:
        entry: A path, or an object with `KEYS`.
        key: The setting, such as `data.train[0]`, for messages.

    Raises:
        UserError: A key is unknown, or a value is not allowed.
    """
    if isinstance(entry, str):
        return Member(entry, None, None, 1.0)
    if not isinstance(entry, Mapping):
        raise UserError(
            f"`{key}` is {entry!r:.60}, expected a path or {{path, name, split, weight}}"
        )
    _check_keys(entry, key)
    path = entry.get("path")
    if not isinstance(path, str):
        raise UserError(
            f"`{key}.path` is {path!r:.60}, expected a path, glob, hub id or builtin:NAME"
        )
    member = Member(path, entry.get("name"), entry.get("split"), _weight(entry.get("weight"), key))
    place = os.path.expanduser(path)
    if member.split is not None and os.path.isfile(place):
        raise UserError(
            f"`{key}.split` is `{member.split}`, but the local `{path}` has none; remove the key"
        )
    if member.name is not None and os.path.exists(place):
        raise UserError(
            f"`{key}.name` is `{member.name}`, but the local `{path}` has none; remove the key"
        )
    return member


def _check_keys(entry: Mapping[str, Any], key: str) -> None:
    for name in entry:
        if name in KEYS:
            continue
        near = difflib.get_close_matches(str(name), KEYS, 1)
        remedy = f"did you mean `{near[0]}`?" if near else "remove it"
        raise UserError(f"`{key}` has no key `{name}`; {remedy}")


def _weight(value: Any, key: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(
            f"`{key}.weight` is {value!r:.60}, expected a number above 0; to leave a source out,"
            " remove it"
        )
    return value
