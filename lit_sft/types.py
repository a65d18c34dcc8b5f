"""The records that travel between the stages.

They hold data and compute nothing. The comment below a field states its shape and its alignment:
whether entry t describes token t or the token after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not trained: what `torch.nn.functional.cross_entropy` ignores."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. The fields have the names that chat templates use."""

    role: str
    """`system`, `developer`, `user`, `assistant` or `tool`."""
    content: str
    """The text of the turn. Empty if an assistant turn only calls tools."""
    reasoning_content: str | None = None
    """The reasoning before the answer, without `<think>` tags."""
    tool_calls: tuple[dict[str, Any], ...] | None = None
    """Tool calls in OpenAI's format:
    `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.
    """
    name: str | None = None
    """Name of the speaker, or of the tool that answers."""
    tool_call_id: str | None = None
    """Id of the call that a `tool` turn answers."""
    train: bool | None = None
    """Whether an assistant turn is trained; ignored for other roles. None leaves the decision to
    `data.train_on`.
    """

    def to_dict(self) -> dict[str, Any]:
        """Returns the message as a chat template reads it, with only the keys that are set."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning_content", "name", "tool_call_id"):
            value = getattr(self, key)
            if value is not None:
                message[key] = value
        if self.tool_calls is not None:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of the data set, after its format was parsed."""

    messages: tuple[Message, ...]
    """The turns, in order. Empty only if `text` is set."""
    tools: tuple[dict[str, Any], ...] | None = None
    """JSON schemas of the functions that the assistant may call. The template writes them."""
    text: str | None = None
    """Plain text without turns (`format: text`). All of its tokens are trained."""
    blank: tuple[str, ...] = ()
    """Fields of `data.prompt_template` that are empty in this row."""
    notes: tuple[str, ...] = ()
    """Parts of the row that we ignore although they would change the rendered text. The log counts
    them.
    """


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """One assistant turn and its place in the rendered text.

    All positions are character offsets in `text`.
    """

    number: int
    """Number of the turn among all messages of the row, from 1."""
    prompt: str
    """The text that a server would feed to the model to get this turn."""
    text: str
    """The rendered conversation up to and including the turn's stop token, which is added if the
    template writes it only before a next message. It begins with `prompt` unless the turn is
    lenient (`data.unproved: lenient`).
    """
    stop: str
    """The stop token. `text` ends with it."""
    start: int
    """Where the answer begins: the end of `prompt`, or for a lenient turn where `text` leaves it,
    but never before the end of the message before the turn.
    """
    anchor: int
    """Where the last special token of `prompt` begins. The tokens before it do not depend on the
    text after it. 0 if there is no such token, if the turn is lenient, or if the tokenizer reports
    no offsets.
    """
    parts: tuple[tuple[int, int], ...]
    """Ranges [begin, end) of the answer whose mask the draft sets.

    All from `start` on, or the parts that the template marks with `{% generation %}`. With
    `train_on: all` these are the ranges that are not trained.
    """
    whole: str
    """`text`, followed by what the template writes after the stop token."""
    switch: tuple[tuple[str, bool], ...] = ()
    """Template variables that were set to prove this turn, such as (`enable_thinking`, False)."""
    notes: tuple[str, ...] = ()
    """The log counts them, as in `Example`. `lenient` also changes how `tokenize` works."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized conversation, or its text up to one trained turn.

    There is one example per turn if the template rewrites earlier turns, or if prompt and answer
    share a token.

    Letter: T tokens.
    """

    input_ids: list[int]
    """[T] token ids."""
    loss_mask: list[int]
    """[T] entry t describes token t itself: 1 if it is trained, 0 if it is only read. Nothing is
    shifted yet. The first token has nothing before it, so `collate` drops it as a target.
    """
    row: int
    """Index of the conversation in its source."""
    part: int = 0
    """Number of the example among those of its row, from 0."""
    stop_ids: tuple[int, ...] = ()
    """Ids of the stop tokens that end the trained turns."""
    notes: tuple[str, ...] = ()
    """What was needed to prove the mask: `per_turn`, `switch:enable_thinking=false`, ... The log
    counts them.
    """


class Batch(TypedDict):
    """The input of one forward pass on one device. Letters: T tokens, S examples, N targets.

    The examples lie end to end without padding, and no token attends to another example. Two
    examples of 3 and 2 tokens; in each, the last token is the only target:

        input_ids         a b c d e
        loss_mask         0 0 1 0 1     (of `Example`: about token t itself)
        labels            . c . e .     (about the token after t; `collate` shifts, nobody else)
        target_positions  1 3
        position_ids      0 1 2 0 1
        lengths           3 2
    """

    input_ids: Tensor
    """[1, T] int64."""
    labels: Tensor
    """[1, T] int64, already shifted: the id that position t must predict, or IGNORE_INDEX."""
    target_positions: Tensor
    """[N] int64, the positions whose label is not IGNORE_INDEX. Computed on the host: a GPU would
    have to synchronize to report N.
    """
    position_ids: Tensor
    """[1, T] int64, starting at 0 in every example."""
    lengths: tuple[int, ...]
    """[S] tokens of each example, T in total. On the host, so that attention can split the row
    without synchronizing the device.
    """
    rows: tuple[int, ...]
    """[S] row numbers in the data set, for error messages. -1 for a filler."""


class Prompts(TypedDict):
    """Prompts that are answered together. Letters: B prompts, T tokens of the longest one."""

    input_ids: Tensor
    """[B, T] int64, padded on the left."""
    attention_mask: Tensor
    """[B, T] int64, 0 on the padding."""
    index: list[int]
    """[B] positions in the list of prompts. -1 for a filler, whose answer is discarded."""
    texts: list[str]
    """[B] last user turns, as they are shown to the user. Not the rendered templates."""
    references: list[str | None]
    """[B] expected answers. None if the data has none."""
    number: int
    """Position of the first prompt, which seeds the sampling. -1 for a filler."""


class Routing(NamedTuple):
    """Where the routers of a forward pass sent its tokens. Letters: L layers, E experts."""

    counts: Tensor
    """[L, E] fp32, the tokens that each expert got."""
    probs: Tensor
    """[E] fp32, the probabilities of each expert, summed over tokens and layers. It may carry a
    gradient.
    """
    entropy: Tensor
    """[] fp32, the entropy of the probabilities in nats, summed over tokens and layers."""
    num_tokens: int
    """Tokens without padding."""


class LossOutput(NamedTuple):
    """Sums over the targets of one forward pass. Whoever needs an average divides once, later."""

    loss_sum: Tensor
    """[] fp32, the sum of the token losses. It carries the gradient."""
    num_targets: Tensor
    """[] int64, on the host."""
    num_correct: Tensor
    """[] int64, the targets that are the arg max of the logits. May be 0 if nobody asked for it."""
    routing: Routing | None = None
    """Where tokens were sent, if the model has routers that are watched."""
