"""Questions -> batches of prompts of similar length, equally many on every rank."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lit_sft.data.formats.parse import conversation_to_prompt
from lit_sft.data.tokenize import Renderer
from lit_sft.errors import UserError, located
from lit_sft.model.decode import decode_completion
from lit_sft.model.generate import GenerationOptions, left_pad
from lit_sft.types import Conversation, Prompts

TOKENS_PER_BATCH = 16_384
"""Tokens of all prompts and answers of a batch, with padding.

This is 2 GB of keys and values for an 8B Llama in 16 bits, 0.8 GB for SmolLM2-135M in fp32.
"""
PROMPTS_PER_BATCH = 64
"""Upper limit: a batch runs until its longest answer ends."""


class Asked(NamedTuple):
    """A question of the data."""

    conversation: Conversation
    """If the last turn is the assistant's, it is the reference and not part of the prompt."""
    where: str
    """File and row, or the setting, for messages."""


class Prompt(NamedTuple):
    """A tokenized question."""

    ids: list[int]
    text: str
    """The last user turn."""
    reference: str | None
    """The expected answer of the data, as the model would write it."""
    where: str
    """As in `Asked`."""
    num_reference_tokens: int = 0
    """Length of the reference, without the stop token."""


def encode(asked: Iterable[Asked], renderer: Renderer) -> list[Prompt]:
    """Renders and tokenizes questions, and their references.

    Raises:
        UserError: The template cannot write one of them.
    """
    prompts = []
    for conversation, where in asked:
        with located(where):
            ids = renderer.prompt(conversation)
        answer = _answer_ids(conversation, ids, renderer)
        reference = decode_completion(renderer.tokenizer, answer, ()) or None
        prompts.append(Prompt(ids, _last_user_text(conversation), reference, where, len(answer)))
    return prompts


def _answer_ids(conversation: Conversation, prompt_ids: list[int], renderer: Renderer) -> list[int]:
    """Returns the ids that training would have behind a prompt, without the stop token.

    These can differ from the ids of the message's text: a template may trim it, and add reasoning,
    channels and tool calls. Only if the row cannot be trained, the text itself is tokenized.

    Returns:
        Token ids; none if the data has no answer.
    """
    content = conversation_to_prompt(conversation)[1]
    if content is None:
        return []
    [examples] = replace(renderer, train_on="last_completion").render([conversation], [0])
    if isinstance(examples, UserError):
        return list(renderer.tokenizer(content, add_special_tokens=False)["input_ids"])
    ids = examples[-1].input_ids
    mask = examples[-1].loss_mask
    # The prompt is a whole prefix of the example, except with data.unproved: lenient.
    begin = len(os.path.commonprefix([ids, prompt_ids]))
    last_trained = len(mask) - 1 - mask[::-1].index(1)
    return ids[begin:last_trained]


def fits(prompt: Prompt, max_new_tokens: int, context: int | None) -> bool:
    """Whether prompt and answer fit into the model's context (None: no limit)."""
    return context is None or len(prompt.ids) + max_new_tokens <= context


def check_room(prompts: Iterable[Prompt], max_new_tokens: int, context: int | None) -> None:
    """Refuses prompts that leave no room for an answer, before any answer is generated.

    Raises:
        UserError: Names the place of the first.
    """
    for prompt in prompts:
        if not fits(prompt, max_new_tokens, context):
            raise UserError(
                f"{prompt.where}: a prompt of {len(prompt.ids)} tokens and"
                f" model.generation.max_new_tokens {max_new_tokens} exceed the model's context of"
                f" {context} tokens: shorten the prompt, or set a smaller max_new_tokens"
            )


def make_batches(
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    pad_id: int,
    rank: int = 0,
    world_size: int = 1,
    done: Collection[int] = (),
) -> list[Prompts]:
    """Makes the batches of one rank. A batch has prompts of similar length.

    Args:
        prompts: All prompts. `Prompts.index` is the position in this list.
        options: `max_new_tokens` and `num_return_sequences` limit the size of a batch.
        pad_id: Pads shorter prompts on the left.
        rank: The rank whose batches to return.
        world_size: Number of ranks.
        done: Indices that are answered already. A batch is left out if all of it is done. The
            others stay whole, because in 16 bits an answer may depend on its neighbours.

    Returns:
        Equally many batches on every rank: a rank without a batch in the last round gets a
        filler. Index -1 marks answers that are thrown away.
    """
    done = set(done)
    batches = []
    for batch in _batches(prompts, options, world_size):
        if not done.issuperset(batch):
            batches.append(batch)
    rounds = max(bool(prompts), -(-len(batches) // world_size))
    mine = batches[rank::world_size]
    fillers: list[list[int]] = [[]] * (rounds - len(mine))
    return [_padded(prompts, batch, done, pad_id) for batch in [*mine, *fillers]]


def _batches(
    prompts: Sequence[Prompt], options: GenerationOptions, world_size: int
) -> list[list[int]]:
    """Groups the indices of prompts, the longest prompts first."""
    # Few prompts are spread over the ranks.
    most = min(PROMPTS_PER_BATCH, -(-len(prompts) // world_size))
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids)):
        if room == 0:
            row = (len(prompts[index].ids) + options.max_new_tokens) * options.num_return_sequences
            room = max(1, min(most, TOKENS_PER_BATCH // row))
            batches.append([])
        batches[-1].append(index)
        room -= 1
    return batches


def _padded(
    prompts: Sequence[Prompt], batch: Sequence[int], done: set[int], pad_id: int
) -> Prompts:
    """Pads the prompts of a batch. An empty batch becomes a filler with the shortest prompt."""
    chosen = [prompts[index] for index in batch]
    if not chosen:
        chosen = [min(prompts, key=lambda prompt: len(prompt.ids))]
    input_ids, attention_mask = left_pad([prompt.ids for prompt in chosen], pad_id)
    return Prompts(
        input_ids=input_ids,
        attention_mask=attention_mask,
        index=[-1 if index in done else index for index in batch] or [-1],
        texts=[prompt.text for prompt in chosen],
        references=[prompt.reference for prompt in chosen],
        number=batch[0] if batch else -1,
    )


def _last_user_text(conversation: Conversation) -> str:
    for message in reversed(conversation.messages):
        if message.role == "user":
            return message.content
    return conversation.text or ""
