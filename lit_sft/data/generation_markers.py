"""What a template marks of an answer with `{% generation %}`."""

from __future__ import annotations

from lit_sft.errors import UserError

_Span = tuple[int, int]


def marked(marks: list[_Span], start: int, stop_at: int, end: int, number: int) -> tuple[_Span, ...]:
    """What of an answer lies between the marks; a stop token right behind them is trained, too.

    Args:
        marks: Ranges that the template marks, of the whole text.
        start: Where the answer begins.
        stop_at: Where its stop token begins.
        end: Where that ends.
        number: Of the turn, for messages.

    Raises:
        UserError: The stop token is neither marked nor right behind a mark.
    """
    parts = [(max(start, first), min(last, end)) for first, last in marks if first < end and last > start]
    if parts and parts[-1][1] == stop_at:
        parts[-1] = (parts[-1][0], end)
    if not parts or parts[-1][1] != end:
        raise UserError(
            f"the {{% generation %}} marks of the chat template leave out the stop token of turn {number} (assistant); "
            "put {% endgeneration %} behind it (data.chat_template)"
        )
    return tuple(parts)
