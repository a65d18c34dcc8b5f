"""Flags of a turn that say whether it is trained, under the names that other programs give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_sft.errors import UserError

_TRAINED = ("weight", "train", "training", "loss", "loss_scale", "loss_weight", "loss_mask")
"""Keys that are 1 or true if the turn is trained."""
_MASKED = ("masked", "mask")
"""Keys that are 1 or true if the turn is not trained (torchtune)."""
_PER_TOKEN = "train_detail"
"""Ranges of characters with a flag each (axolotl)."""
FLAGS = (*_TRAINED, *_MASKED, _PER_TOKEN)
"""All keys of a turn that are flags."""


def train_flag(
    raw: Mapping[str, Any], role: str, key: str, default: bool | None = None
) -> bool | None:
    """Reads the flag of a turn.

    Args:
        raw: The turn, without nulls.
        role: Its role.
        key: Name in errors.
        default: Result for an assistant turn without a flag.

    Returns:
        Whether the assistant turn is trained; None for other roles.

    Raises:
        UserError: A flag is neither 0 nor 1, two flags contradict each other, or a turn of another
            role should be trained.
    """
    if raw.get(_PER_TOKEN):
        raise UserError(
            f"`{key}.{_PER_TOKEN}` flags parts of a turn, but a turn is trained or left out as a"
            " whole; split the turn, or set `weight` to 0"
        )
    flags: dict[str, bool] = {}
    for name in (*_TRAINED, *_MASKED):
        if name in raw:
            is_set = _read_flag(raw[name], name, role, key)
            flags[name] = is_set if name in _TRAINED else not is_set
    if len(set(flags.values())) > 1:
        raise UserError(
            f"`{key}` has flags that contradict each other: {', '.join(flags)}; keep one of them"
        )
    flag = next(iter(flags.values()), None)
    if role == "assistant":
        return default if flag is None else flag
    if flag:
        raise UserError(
            f"`{key}` ({role}) is to be trained ({', '.join(flags)}), but such a flag stands only"
            " in assistant turns; remove it"
        )
    return None


def _read_flag(value: object, name: str, role: str, key: str) -> bool:
    if value not in (0, 1):
        raise UserError(
            f"`{key}` ({role}) has the {name} {value!r:.40}, expected true, false, 0 or 1"
        )
    return bool(value)
