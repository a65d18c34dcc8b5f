"""The records that travel between the stages. Nothing here computes; every field states its
alignment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not trained (the value `torch.nn.functional.cross_entropy` skips by
default).
"""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, named as chat templates name it."""

    role: str
    """`system`, `developer`, `user`, `assistant` or `tool`."""
    content: str
    """The text of the turn; empty where an assistant only calls tools."""
    reasoning_content: str | None = None
    """What an assistant thought before it answered, without the `<think>` marks."""
    tool_calls: tuple[dict[str, Any], ...] | None = None
    """Calls in OpenAI's shape: `{"type": "function", "function": {"name", "arguments": {...}}}`."""
    name: str | None = None
    tool_call_id: str | None = None
    train: bool | None = None
    """None: `data.train_on` decides. True or False: this turn's own flag, which wins."""

    def to_dict(self) -> dict[str, Any]:
        """The message as a chat template reads it: only the keys that are set."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning_content", "name", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        if self.tool_calls is not None:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of the data set, whatever its format was."""

    messages: tuple[Message, ...]
    """In order. Empty only where `text` is set."""
    tools: tuple[dict[str, Any], ...] | None = None
    """JSON schemas of the functions the assistant may call, passed to the template."""
    text: str | None = None
    """Plain text without turns (`format: text`): all of it is trained."""
    blank: tuple[str, ...] = ()
    """Fields of `data.prompt_template` that are empty in this row."""
    notes: tuple[str, ...] = ()
    """What of the row is not read although it changes how a conversation is written, to be counted
    in the log.
    """


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """One assistant turn and its place in the text that the chat template writes. Positions count
    characters of `text`.
    """

    number: int
    """From 1, over all messages of the row."""
    prompt: str
    """What a server feeds before the turn."""
    text: str
    """The rendered messages up to and with the turn's stop token; begins with `prompt` unless the
    turn is lenient.
    """
    stop: str
    """The stop token, with which `text` ends."""
    start: int
    """Where the answer begins: the end of `prompt`, or of what `text` has in common with it."""
    anchor: int
    """Where the last special token of `prompt` begins: no token before it depends on the text
    behind it. 0 if there is none, if the turn is lenient, or if the tokenizer does not tell where
    its tokens lie.
    """
    parts: tuple[tuple[int, int], ...]
    """The trained ranges: from `start` to the end, or what the template marks of that."""
    whole: str
    """`text` and what the template writes behind the stop token."""
    switch: tuple[tuple[str, bool], ...] = ()
    """Variables that were added for this turn."""
    notes: tuple[str, ...] = ()
    """As in `Example`."""


@dataclass(frozen=True, slots=True)
class Example:
    """What the model sees of one conversation (or of one of its turns, where the template rewrites
    history).
    """

    input_ids: list[int]
    """Token ids, T of them."""
    loss_mask: list[int]
    """T entries, 1 = this token is a target (it is predicted from the tokens before it), 0 = it is
    only read.
    """
    row: int
    """Index of the conversation in its source."""
    part: int = 0
    """Counts the examples that came from one row."""
    stop_ids: tuple[int, ...] = ()
    """Ids of the stop tokens that end this example's trained turns."""
    notes: tuple[str, ...] = field(default=())
    """What had to be done to prove the mask, to be counted in the log: `per_turn`,
    `switch:enable_thinking=false`, ...
    """


class Batch(TypedDict):
    """One forward pass on one device. Letters: B rows, T tokens, S examples.

    Examples lie one behind the other without padding; nothing attends across them. Two examples of
    3 and 2 tokens, the first
    two tokens of each a prompt:

        input_ids     a b c d e
        labels        . c . . .      (labels[t] follows input_ids[t]; shifted in `collate` only)
        position_ids  0 1 2 0 1
        lengths       3 2
    """

    input_ids: Tensor
    """[1, T] int64."""
    labels: Tensor
    """[1, T] int64, already shifted: the id that position t must predict, or IGNORE_INDEX."""
    target_positions: Tensor
    """[N] int64: where labels are ids; found on the host, as a GPU would have to stop and tell
    their number.
    """
    position_ids: Tensor
    """[1, T] int64, restarting at 0 with every example."""
    lengths: tuple[int, ...]
    """S example lengths, sum T. They stay on the host, so that attention can split without a device
    sync.
    """
    rows: tuple[int, ...]
    """S row numbers in the data set, -1 for filler; for messages about this batch."""


class Prompts(TypedDict):
    """Prompts to be answered together. Letters: B prompts, T tokens of the longest."""

    input_ids: Tensor
    """[B, T] int64, padded on the left."""
    attention_mask: Tensor
    """[B, T] int64, 0 on the padding."""
    index: list[int]
    """B positions in the list of prompts, -1 for a filler whose answer is thrown away."""
    texts: list[str]
    """B user-facing prompts: the last user turn, not the rendered template."""
    references: list[str | None]
    """B expected answers where the data has them."""
    number: int
    """Position of the first prompt, -1 for a filler: tells batches apart where tokens are drawn."""


class LossOutput(NamedTuple):
    """Sums over the targets of one forward pass, so that any averaging can be done later and
    once.
    """

    loss_sum: Tensor
    """[] fp32, carries the gradient."""
    num_targets: Tensor
    """[] int64, on the host."""
    num_correct: Tensor
    """[] int64: targets that are the arg max of the logits; 0 where it was not asked for."""
