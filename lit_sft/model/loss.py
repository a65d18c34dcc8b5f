"""A causal LM and its loss in one plain module: backbone, then head and cross-entropy on the target
positions only.

Letters: B rows, T tokens, N targets, C targets of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.errors import UserError
from lit_sft.model.attention.packed import pack_kwargs
from lit_sft.model.evaluation_mode import evaluation_mode
from lit_sft.types import IGNORE_INDEX, LossOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**26
"""Logits held at once (C x V) in compute type, 128 MiB in bf16. Every chunk adds to the whole
gradient of the head, which costs as much as its product for 128 targets (V 49,152, a CPU), so
chunks are few.
"""
PIECE_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
"""Logits of a chunk that become gradients at once, in fp32: 8 MiB stay in a CPU's cache, a GPU
wants few launches.
"""


@dataclass
class LossOptions:
    """What is minimized for every target token."""

    type: Literal["nll", "dft"] = "nll"
    """`nll`: negative log likelihood. `dft`: times the (detached) probability of the target
    (arXiv:2508.05629).
    """
    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(
                f"model.loss.label_smoothing is {self.label_smoothing}, it must be in [0, 1)"
            )
        if self.type == "dft" and self.label_smoothing:
            raise UserError(
                "model.loss.label_smoothing has no meaning with type dft: set it to 0, or type"
                " to nll"
            )


@dataclass(frozen=True)
class Head:
    """How logits come from hidden states: `softcap(scale * (hidden @ weight.T + bias))`."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    scale: float
    softcap: float | None

    def project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[C, D] and the weight in compute type [V, D] -> [C, V], before scale and cap."""
        return F.linear(hidden, weight, None if self.bias is None else self.bias.to(hidden.dtype))

    def logits(self, projected: Tensor) -> Tensor:
        """What `project` gave -> fp32 logits of the same shape."""
        logits = projected.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return (
            logits if self.softcap is None else torch.tanh(logits / self.softcap).mul_(self.softcap)
        )

    def backward_through_logits_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient by the fp32 logits -> gradient by `hidden @ weight.T`, both [C, V], in place."""
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap).square()
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


@dataclass(frozen=True)
class _Task:
    """What the chunked cross-entropy computes, beside the tensors that gradients flow to."""

    head: Head
    options: LossOptions
    count_correct: bool
    needs_grad: bool
    """Whether gradients are enabled. In validation torch says of the inputs that they need one, all
    the same.
    """


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of token losses; the gradients are made in the forward pass, chunk by chunk, so that no
    logits are kept.

    Three matrix products per chunk, where recomputing the logits in the backward pass would take
    four. The method is that of Liger's fused linear cross-entropy (arXiv:2410.10989), in plain
    torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        # [N, D] in compute type.
        hidden: Tensor,
        # [V, D].
        weight: Tensor,
        # [V].
        bias: Tensor | None,
        # [N].
        targets: Tensor,
        task: _Task,
    ) -> tuple[Tensor, Tensor]:
        needed = [task.needs_grad and needs for needs in ctx.needs_input_grad[:3]]
        sums = _Sums(task, hidden, weight.to(hidden.dtype), needed)
        for chunk in _slices(len(targets), CHUNK_ELEMENTS // len(weight)):
            # [C, V].
            projected = task.head.project(hidden[chunk], sums.compute_weight)
            sums.add_losses_(projected, targets[chunk])
            sums.add_products(chunk, projected, hidden[chunk])
        ctx.save_for_backward(sums.grad_hidden, sums.grad_weight, sums.grad_bias)
        ctx.mark_non_differentiable(sums.num_correct)
        return sums.loss_sum, sums.num_correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Each is used once, so it is scaled in place, without a second copy.
        grads = (grad if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return (*grads, None, None)


class _Sums:
    """The loss and the gradients of the chunks so far. A gradient that nobody needs is None.

    Args:
        task: What is computed.
        hidden: [N, D] in compute type.
        compute_weight: [V, D], the weight in compute type.
        needed: Whether hidden states, weight and bias need a gradient.
    """

    def __init__(
        self, task: _Task, hidden: Tensor, compute_weight: Tensor, needed: list[bool]
    ) -> None:
        needs_hidden, self.needs_weight, needs_bias = needed
        self.task = task
        self.compute_weight = compute_weight
        self.needs_grad = any(needed)
        vocabulary = len(compute_weight)
        self.piece = max(1, PIECE_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS) // vocabulary)
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        self.grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        self.grad_bias = hidden.new_zeros(vocabulary, dtype=torch.float32) if needs_bias else None
        # The first chunk makes it, so that no zeros are written before. Without a target there is
        # no chunk.
        self.grad_weight: Tensor | None = None
        if self.needs_weight and not len(hidden):
            self.grad_weight = torch.zeros_like(compute_weight, dtype=torch.float32)

    def add_losses_(self, projected: Tensor, targets: Tensor) -> None:
        """Adds the losses of a chunk; its logits [C, V] become their own gradient, piece by
        piece.
        """
        for rows, aims in zip(projected.split(self.piece), targets.split(self.piece), strict=True):
            self._add_piece_(rows, aims)

    def _add_piece_(self, rows: Tensor, targets: Tensor) -> None:
        head = self.task.head
        logits = head.logits(rows)
        if self.task.count_correct:
            self.num_correct += (logits.argmax(-1) == targets).sum()
        losses, grad = _losses_and_gradient(logits, targets, self.task.options, self.needs_grad)
        self.loss_sum += losses.sum()
        if grad is None:
            return
        grad = head.backward_through_logits_(grad, logits)
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0)
        rows.copy_(grad)

    def add_products(self, chunk: slice, grad: Tensor, hidden: Tensor) -> None:
        """Adds what a chunk gives to the gradients of the hidden states and of the weight.

        Args:
            chunk: Its place among the N targets.
            grad: [C, V] by `hidden @ weight.T`, in compute type.
            hidden: [C, D].
        """
        if self.grad_hidden is not None:
            torch.mm(grad, self.compute_weight, out=self.grad_hidden[chunk])
        if not self.needs_weight:
            return
        product = grad.T @ hidden
        if self.grad_weight is None:
            self.grad_weight = product.float()
        else:
            # In fp32, as a sum of chunks.
            self.grad_weight += product


def _slices(length: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, length, size):
        yield slice(start, start + size)


def _losses_and_gradient(
    logits: Tensor, targets: Tensor, options: LossOptions, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """fp32 logits [C, V] and targets [C] -> losses [C] and their gradient by the logits [C, V]."""
    index = targets[:, None]
    log_probs = torch.log_softmax(logits, dim=-1)
    nll = -log_probs.gather(1, index).squeeze(1)
    smoothing = options.label_smoothing
    losses = nll * torch.exp(-nll) if options.type == "dft" else nll
    if smoothing:
        losses = (1 - smoothing) * nll - smoothing * log_probs.mean(-1)
    if not needs_grad:
        return losses, None
    grad = log_probs.exp_()
    grad.scatter_add_(1, index, torch.full_like(index, -(1 - smoothing), dtype=grad.dtype))
    if smoothing:
        grad -= smoothing / logits.shape[1]
    if options.type == "dft":
        grad *= torch.exp(-nll)[:, None]
    return losses, grad


class CausalLMLoss(nn.Module):
    """A Hugging Face causal LM together with its loss, so that sharding gathers the head where it
    is used.

    Logits exist for target positions only, a chunk at a time. Where the head is not a plain linear
    layer (an adapted head, say) or `check_head` finds that the model computes its logits
    differently, its own logits are used instead.

    Args:
        lm: Causal LM, adapters already injected.
        options: What is minimized.
    """

    def __init__(self, lm: PreTrainedModel, options: LossOptions | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.trained_options = options or LossOptions()
        self.fused: list[str] = []
        """Modules of the LM whose forward pass was replaced (see `fused_layers`)."""
        self.separate_rows = False
        """Set where the model would mix examples of a pack: each becomes a padded row of its
        own.
        """
        head = lm.get_output_embeddings()
        # what peft trains as a whole, or some rows of it, it wraps around the original
        if (
            type(head).__name__ == "TrainableTokensWrapper"
            and head.original_module.bias is not None
        ):
            left_out = (
                f"the head of {type(lm).__name__} has a bias, which peft drops where rows of it are"
                " trained"
            )
            raise UserError(
                f"{left_out}: leave out model.add_tokens and trainable_token_indices, or model.lora"
            )
        self.own_logits = (
            type(getattr(head, "original_module", head)) is not nn.Linear or lm.base_model is lm
        )
        if self.own_logits:
            log.warning(
                "The head of %s is not a plain linear layer: its own full logits are used.",
                type(lm).__name__,
            )

    @property
    def options(self) -> LossOptions:
        """What is minimized; without gradients nll, by which models compare: the loss of dft rises
        before it falls.
        """
        return self.trained_options if torch.is_grad_enabled() else LossOptions()

    @property
    def head(self) -> Head:
        """The output head as the model's config describes it."""
        linear = self.lm.get_output_embeddings()
        config = self.lm.config.get_text_config()
        # Cohere.
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        # Granite.
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        # Gemma.
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(linear.weight, getattr(linear, "bias", None), scale, softcap)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        lengths: tuple[int, ...] | None = None,
        count_correct: bool = False,
        target_positions: Tensor | None = None,
    ) -> LossOutput:
        """Sums the losses of all targets; labels are already shifted.

        Args:
            input_ids: [B, T].
            labels: [B, T], the id that each position must predict, or IGNORE_INDEX.
            position_ids: [B, T], restarting with every example.
            lengths: Lengths of the examples that lie end to end in the one row; None where rows are
                not packed.
            count_correct: Also count the targets that are the arg max.
            target_positions: [N] flat positions of these ids; None: they are looked for, and a GPU
                is waited for.
        """
        if lengths is not None and self.separate_rows:
            input_ids, labels, position_ids = _rows_of_one(input_ids, labels, lengths)
            lengths = target_positions = None
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if lengths is not None:
            # Reach attention through the layers' kwargs.
            inputs |= pack_kwargs(lengths, input_ids.device)
        if target_positions is None:
            target_positions = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        # [N].
        targets = labels.flatten().index_select(0, target_positions)
        if self.own_logits:
            logits = self.lm(**inputs).logits.flatten(0, 1).index_select(0, target_positions)
            loss_sum, num_correct = self._from_logits(logits, targets)
        else:
            hidden = (
                self.lm.base_model(**inputs)
                .last_hidden_state.flatten(0, 1)
                .index_select(0, target_positions)
            )
            loss_sum, num_correct = self._from_hidden(hidden, targets, count_correct)
        return LossOutput(loss_sum, torch.tensor(len(targets)), num_correct)

    def generate(self, **arguments: Any) -> Tensor:
        """`lm.generate`, as a method of the module that sharding gathers the weights for."""
        return self.lm.generate(**arguments)  # type: ignore[operator]

    def _from_hidden(
        self, hidden: Tensor, targets: Tensor, count_correct: bool
    ) -> tuple[Tensor, Tensor]:
        """[N, D], [N] -> sum of losses, number of correct."""
        head = self.head
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        else:
            # Not that of the hidden states: a norm that is kept in fp32 must not lift the head to
            # it.
            dtype = head.weight.dtype
        task = _Task(head, self.options, count_correct, needs_grad=torch.is_grad_enabled())
        return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return]
            hidden.to(dtype), head.weight, head.bias, targets, task
        )

    def _from_logits(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[N, V], [N] -> sum of losses, number of correct."""
        logits = logits.float()
        losses = F.cross_entropy(
            logits, targets, reduction="none", label_smoothing=self.options.label_smoothing
        )
        if self.options.type == "dft":
            losses = losses * torch.exp(-losses.detach())
        return losses.sum(), (logits.argmax(-1) == targets).sum()

    @torch.no_grad()
    def check_head(self) -> None:
        """Compares both paths to the logits on a few tokens: where they differ the model's own are
        used, and said.
        """
        if self.own_logits:
            return
        device = self.lm.get_output_embeddings().weight.device
        input_ids = (
            torch.arange(8, device=device)[None] % self.lm.config.get_text_config().vocab_size
        )
        with evaluation_mode(self):
            own = self.lm(input_ids=input_ids, use_cache=False).logits[0]
            hidden = self.lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        head = self.head
        ours = head.logits(head.project(hidden.to(head.weight.dtype), head.weight))
        tolerance = 1e-4 if own.dtype == torch.float32 else 2e-2
        self.own_logits = not torch.allclose(
            own.float(), ours, rtol=tolerance, atol=tolerance * float(own.abs().max())
        )
        if self.own_logits:
            why = (
                "does not compute its logits as scale * hidden @ head: its own full logits are used"
                " (more memory)"
            )
            log.warning("%s %s.", type(self.lm).__name__, why)


def _rows_of_one(
    input_ids: Tensor, labels: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """[1, T] with S examples -> input_ids, labels, position_ids [S, T of the longest], padded on
    the right.

    What is padded has no target, and a causal model reads nothing to the right, so no mask is
    needed.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    rows = pad(list(input_ids[0].split(lengths)), batch_first=True)
    row_labels = pad(list(labels[0].split(lengths)), batch_first=True, padding_value=IGNORE_INDEX)
    return rows, row_labels, torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
