"""Conversations to batches of prompts, the same number of batches on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from lit_sft.data.render import Renderer
from lit_sft.model.generate import left_pad
from lit_sft.types import Conversation, Prompts

PROMPTS_PER_BATCH = 16
"""Prompts answered together; sorted by length first, so that little is padding."""

Asked = tuple[Conversation, str | None]
"""What is asked (a last assistant turn is left out of the prompt), and the answer the data has for it."""


def prompt_batches(asked: Sequence[Asked], renderer: Renderer, rank: int = 0, world_size: int = 1) -> list[Prompts]:
    """Renders prompts, sorts them by length and deals them to the ranks.

    Args:
        asked: All prompts, in the order in which their answers are wanted (`Prompts.index` is the position in it).
        renderer: Tokenizer and template.
        rank: Which share to return; with `world_size` 1 all of them.
        world_size: Number of shares.

    Returns:
        This rank's batches. A rank that has none left in the last round gets a filler with index -1.
    """
    ids = [renderer.prompt(conversation) for conversation, _ in asked]
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    batches = []
    for start in range(0, len(order), PROMPTS_PER_BATCH * world_size):
        share = order[start : start + PROMPTS_PER_BATCH * world_size][rank::world_size]
        indices = share or [order[start]]  # answered for company, and thrown away
        input_ids, attention_mask = left_pad([ids[index] for index in indices], renderer.tokenizer.pad_token_id)
        batches.append(
            Prompts(
                input_ids=input_ids,
                attention_mask=attention_mask,
                index=indices if share else [-1],
                texts=[_last_user_text(asked[index][0]) for index in indices],
                references=[asked[index][1] for index in indices],
            )
        )
    return batches


def _last_user_text(conversation: Conversation) -> str:
    return next((m.content for m in reversed(conversation.messages) if m.role == "user"), conversation.text or "")
