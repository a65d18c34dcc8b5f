"""The parts of an answer that a template marks with `{% generation %}`."""

from __future__ import annotations

from collections.abc import Sequence

from lit_sft.data.chat_template import Span
from lit_sft.errors import UserError


def marked_parts(
    marks: Sequence[Span], start: int, stop_at: int, end: int, number: int
) -> tuple[Span, ...]:
    """Returns the marked parts of an answer, all positions in characters of the whole text.

    A stop token directly behind a marked part belongs to it.

    Args:
        marks: Ranges that the template marks.
        start: Begin of the answer.
        stop_at: Begin of the stop token.
        end: End of the stop token.
        number: Number of the turn, for messages.

    Raises:
        UserError: The stop token is neither marked nor directly behind a mark.
    """
    parts = []
    for first, last in marks:
        if first < end and last > start:
            parts.append((max(start, first), min(last, end)))
    if parts and parts[-1][1] == stop_at:
        parts[-1] = (parts[-1][0], end)
    if not parts or parts[-1][1] != end:
        raise UserError(
            "the {% generation %} marks of the chat template leave out the stop token of turn"
            f" {number} (assistant); put {{% endgeneration %}} behind it (data.chat_template)"
        )
    return tuple(parts)
