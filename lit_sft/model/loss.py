"""A causal LM together with its loss.

The backbone runs over all tokens. The head and the cross-entropy run over the target positions
only, chunk by chunk. Labels arrive shifted (see `data/collate`). The loss is a sum; the average
over targets is made once per optimizer step (see `SFTModule.on_before_optimizer_step`).

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
from lit_sft.model.attention.packed import chunk_size, pack_kwargs
from lit_sft.model.evaluation_mode import evaluation_mode
from lit_sft.model.long_rope import choose_by_example
from lit_sft.model.routers import logits_of, routing
from lit_sft.types import IGNORE_INDEX, LossOutput, Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**26
"""Logits of a chunk (C x V), in compute dtype: 128 MiB in bf16.

Each chunk reads and writes the head's whole gradient. On a CPU (V = 49,152) this costs as much as
the matrix product for 128 targets. So chunks are large, and few.
"""
PIECE_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
"""Logits of a piece, by device. A chunk is split into pieces for its copies in fp32: on a CPU 8 MiB
stay in the cache, a GPU wants few kernel launches.
"""


@dataclass
class LossOptions:
    """The loss of a target token."""

    type: Literal["nll", "dft"] = "nll"
    """`nll`: the negative log likelihood of the target. `dft`: the same, multiplied by the target's
    probability, which gets no gradient (arXiv:2508.05629).
    """
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the vocabulary, in [0, 1)."""
    router_aux_loss_coef: float | None = None
    """Weight of the loss that balances the experts of a mixture of experts. null takes that of the
    model's config if routers or experts are trained; 0 leaves the loss out.
    """

    def __post_init__(self) -> None:
        coefficient = self.router_aux_loss_coef
        # Also false for nan.
        if coefficient is not None and not coefficient >= 0:
            raise UserError(
                f"model.loss.router_aux_loss_coef is {coefficient}, it must be 0 or more, or null"
            )
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
class RouterOptions:
    """How the routers of a mixture of experts are watched."""

    top_k: int
    """Experts per token."""
    needs_grad: bool
    """Whether the loss that balances the experts is computed."""


@dataclass(frozen=True)
class Head:
    """The output head. The logits are `softcap(scale * (hidden @ weight.T + bias))`."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    scale: float
    """1.0 for no scaling."""
    softcap: float | None
    """Logits are capped to (-softcap, softcap) by tanh. None for no cap."""

    def project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Multiplies hidden states with the weight; scale and cap come later, in `logits`.

        Args:
            hidden: [C, D] in compute dtype.
            weight: [V, D] the head's weight, in compute dtype.

        Returns:
            [C, V] in compute dtype.
        """
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, weight, bias)

    def logits(self, projected: Tensor) -> Tensor:
        """Scales and caps the output of `project`, [C, V] -> fp32 logits [C, V]."""
        logits = projected.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap).mul_(self.softcap)

    def backward_through_logits_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Backward pass of `logits`, in place.

        Args:
            grad: [C, V] fp32, the gradient with respect to the logits. It is overwritten.
            logits: [C, V] fp32, the output of `logits`.

        Returns:
            [C, V], the gradient with respect to the output of `project`.
        """
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap).square()
        if self.scale != 1.0:
            grad *= self.scale
        return grad


@dataclass(frozen=True)
class _Task:
    """The arguments of the chunked cross-entropy that get no gradient."""

    head: Head
    options: LossOptions
    count_correct: bool
    needs_grad: bool
    """Whether gradients are enabled. `ctx.needs_input_grad` alone does not tell: under `no_grad` it
    is still True for trained weights.
    """


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sums the token losses, and computes the gradients in the forward pass.

    So the logits of only one chunk exist at a time. This takes three matrix products per chunk;
    recomputing the logits in the backward pass would take four. Source: the fused linear
    cross-entropy of Liger Kernel (arXiv:2410.10989), here in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        task: _Task,
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss and its gradients.

        Args:
            ctx: Context of autograd.
            hidden: [N, D] hidden states at the target positions, in compute dtype.
            weight: [V, D] the head's weight, as it is stored. Weight and bias are arguments so
                that autograd asks for their gradients.
            bias: [V], or None.
            targets: [N] the ids to predict.
            task: All other arguments.

        Returns:
            The sum of the losses, [] fp32, and the number of correct targets, [] int64.
        """
        needed = [task.needs_grad and needs for needs in ctx.needs_input_grad[:3]]
        sums = _Sums(task, hidden, weight.to(hidden.dtype), needed)
        for chunk in _slices(len(targets), CHUNK_ELEMENTS // len(weight)):
            projected = task.head.project(hidden[chunk], sums.compute_weight)
            # From here on `projected` holds the gradient of the chunk, if one is needed.
            sums.add_losses_(projected, targets[chunk])
            sums.add_products(chunk, projected, hidden[chunk])
        ctx.save_for_backward(sums.grad_hidden, sums.grad_weight, sums.grad_bias)
        ctx.mark_non_differentiable(sums.num_correct)
        return sums.loss_sum, sums.num_correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        for grad in ctx.saved_tensors:
            # Each gradient is used once, so it is scaled in place, without a copy.
            grads.append(None if grad is None else grad.mul_(grad_loss))
        # No gradients of `targets` and `task`.
        return (*grads, None, None)


class _Sums:
    """The loss and the gradients, summed over chunks. A gradient that is not needed is None.

    Args:
        task: Head, options, and what to compute.
        hidden: [N, D] in compute dtype.
        compute_weight: [V, D] the head's weight in compute dtype.
        needed: Whether the hidden states, the weight and the bias need a gradient.
    """

    def __init__(
        self, task: _Task, hidden: Tensor, compute_weight: Tensor, needed: list[bool]
    ) -> None:
        needs_hidden, self.needs_weight, needs_bias = needed
        self.task = task
        self.compute_weight = compute_weight
        self.needs_grad = any(needed)
        vocabulary = len(compute_weight)
        piece_elements = PIECE_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS)
        self.piece = max(1, piece_elements // vocabulary)
        """Targets of a piece."""
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        self.grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        self.grad_bias = hidden.new_zeros(vocabulary, dtype=torch.float32) if needs_bias else None
        # The first chunk creates it, which saves writing zeros. Without targets there is no chunk.
        self.grad_weight: Tensor | None = None
        if self.needs_weight and not len(hidden):
            self.grad_weight = torch.zeros_like(compute_weight, dtype=torch.float32)

    def add_losses_(self, projected: Tensor, targets: Tensor) -> None:
        """Adds the losses of a chunk, and overwrites its projections with their gradient.

        It works in pieces, because the fp32 copies of a whole chunk would be large.

        Args:
            projected: [C, V] the output of `Head.project`.
            targets: [C].
        """
        pieces = zip(projected.split(self.piece), targets.split(self.piece), strict=True)
        for projected_piece, targets_piece in pieces:
            self._add_piece_(projected_piece, targets_piece)

    def _add_piece_(self, projected: Tensor, targets: Tensor) -> None:
        head = self.task.head
        logits = head.logits(projected)
        if self.task.count_correct:
            self.num_correct += (logits.argmax(-1) == targets).sum()
        losses, grad = _losses_and_gradient(logits, targets, self.task.options, self.needs_grad)
        self.loss_sum += losses.sum()
        if grad is None:
            return
        grad = head.backward_through_logits_(grad, logits)
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0)
        projected.copy_(grad)

    def add_products(self, chunk: slice, grad: Tensor, hidden: Tensor) -> None:
        """Adds a chunk to the gradients of the hidden states and of the weight.

        Args:
            chunk: The place of the chunk among the N targets.
            grad: [C, V] the gradient with respect to `hidden @ weight.T`, in compute dtype.
            hidden: [C, D].
        """
        if self.grad_hidden is not None:
            torch.mm(grad, self.compute_weight, out=self.grad_hidden[chunk])
        if not self.needs_weight:
            return
        product = grad.T @ hidden
        if self.grad_weight is None:
            # fp32, because chunks are added to it.
            self.grad_weight = product.float()
        else:
            self.grad_weight += product


def _slices(length: int, size: int) -> Iterator[slice]:
    """Cuts a range into slices of `size` entries, at least one entry each."""
    size = max(1, size)
    for start in range(0, length, size):
        yield slice(start, start + size)


def _losses_and_gradient(
    logits: Tensor, targets: Tensor, options: LossOptions, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the loss of each target, and its gradient with respect to the logits.

    Args:
        logits: [C, V] fp32.
        targets: [C].
        options: The loss.
        needs_grad: Whether the gradient is computed.

    Returns:
        Losses [C], and gradients [C, V] or None.
    """
    index = targets[:, None]
    log_probs = torch.log_softmax(logits, dim=-1)
    nll = -log_probs.gather(1, index).squeeze(1)
    smoothing = options.label_smoothing
    losses = nll
    if options.type == "dft":
        losses = nll * torch.exp(-nll)
    if smoothing:
        losses = (1 - smoothing) * nll - smoothing * log_probs.mean(-1)
    if not needs_grad:
        return losses, None
    # The gradient of the cross-entropy is softmax(logits) minus the target distribution.
    grad = log_probs.exp_()
    minus_target = torch.full_like(index, -(1 - smoothing), dtype=grad.dtype)
    grad.scatter_add_(1, index, minus_target)
    if smoothing:
        grad -= smoothing / logits.shape[1]
    if options.type == "dft":
        grad *= torch.exp(-nll)[:, None]
    return losses, grad


class CausalLMLoss(nn.Module):
    """A Hugging Face causal LM together with its loss.

    Both are one module, so that FSDP2 gathers the head where the loss uses it. Logits exist for
    target positions only, one chunk at a time. If the head is not a plain linear layer (an adapted
    head, for example), or if `check_head` finds that the model computes its logits differently, the
    model's own, full logits are used instead.

    Args:
        lm: The causal LM, with its adapters.
        options: The loss. None for the default.
    """

    def __init__(self, lm: PreTrainedModel, options: LossOptions | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.trained_options = options or LossOptions()
        self.fused: list[str] = []
        """Names of the LM's modules whose forward pass was replaced (see `fused_layers`)."""
        self.separate_rows = False
        """Whether each example becomes a padded row of its own, because the model would mix the
        examples of a pack.
        """
        self.one_by_one = False
        """Whether each example even has a forward pass of its own, because padding would change
        it. Only with `separate_rows`.
        """
        self.routers: RouterOptions | None = None
        """How routers are watched in training. None for a model without."""
        self._router_logits: list[list[Tensor]] = []
        """Those of the forward passes of one call."""
        choose_by_example(lm)
        head = lm.get_output_embeddings()
        _check_bias(lm, head)
        # peft wraps a head that is trained as a whole, or some rows of it.
        unwrapped = getattr(head, "original_module", head)
        has_no_backbone = lm.base_model is lm
        self.own_logits = type(unwrapped) is not nn.Linear or has_no_backbone
        """Whether the model's own, full logits are used."""
        if self.own_logits:
            log.warning(
                "The head of %s is not a plain linear layer: its own full logits are used.",
                type(lm).__name__,
            )

    @property
    def options(self) -> LossOptions:
        """The loss that is computed now: the chosen one with gradients, nll without them.

        The nll makes models comparable. The dft loss rises before it falls.
        """
        return self.trained_options if torch.is_grad_enabled() else LossOptions()

    @property
    def head(self) -> Head:
        """The output head, as the model's config describes it."""
        linear = self.lm.get_output_embeddings()
        config = self.lm.config.get_text_config()
        # Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma has a cap.
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
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
        """Sums the losses of all targets. The labels are already shifted.

        Args:
            input_ids: [B, T].
            labels: [B, T] the id that each position must predict, or IGNORE_INDEX.
            position_ids: [B, T] starting at 0 in every example.
            lengths: [S] tokens of the examples that lie end to end in the one row. None if the rows
                are not packed.
            count_correct: Whether to count the targets that are the arg max of the logits.
            target_positions: [N] positions in the flattened labels that are not IGNORE_INDEX. None
                computes them, which synchronizes a GPU.
        """
        self._router_logits = []
        num_tokens = input_ids.numel() if lengths is None else sum(lengths)
        is_token = None
        if lengths is not None and self.separate_rows and not self.one_by_one:
            input_ids, labels, position_ids, is_token = _unpacked_rows(input_ids, labels, lengths)
            lengths = target_positions = None
        if target_positions is None:
            target_positions = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        targets = labels.flatten().index_select(0, target_positions)
        if self.own_logits:
            logits = self._outputs(self.lm, "logits", input_ids, position_ids, lengths)
            logits = logits.flatten(0, 1).index_select(0, target_positions)
            loss_sum, num_correct = self._from_logits(logits, targets)
        else:
            backbone = self.lm.base_model
            hidden = self._outputs(backbone, "last_hidden_state", input_ids, position_ids, lengths)
            hidden = hidden.flatten(0, 1).index_select(0, target_positions)
            loss_sum, num_correct = self._from_hidden(hidden, targets, count_correct)
        found = self._routing(is_token, num_tokens)
        return LossOutput(loss_sum, torch.tensor(len(targets)), num_correct, found)

    @property
    def _watches_routers(self) -> bool:
        return self.routers is not None and self.training and torch.is_grad_enabled()

    def _routing(self, is_token: Tensor | None, num_tokens: int) -> Routing | None:
        """Where the forward passes of this call sent their tokens; None if nobody watches.

        Args:
            is_token: [B, T] False for padding. None if there is none.
            num_tokens: Tokens without padding.
        """
        if not self._watches_routers:
            return None
        assert self.routers is not None
        passes, self._router_logits = self._router_logits, []
        layers = [torch.cat(parts) for parts in zip(*passes, strict=True)]
        mask = None if is_token is None else is_token.flatten()
        return routing(
            layers,
            self.routers.top_k,
            is_token=mask,
            num_tokens=num_tokens,
            needs_grad=self.routers.needs_grad,
        )

    def generate(self, **arguments: Any) -> Tensor:
        """Calls `lm.generate`. FSDP2 gathers the weights for this method of this module."""
        return self.lm.generate(**arguments)  # type: ignore[operator]

    def _outputs(
        self,
        module: Any,
        name: str,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: tuple[int, ...] | None,
    ) -> Tensor:
        """Returns an output [B, T, ...] of the model or its backbone.

        Args:
            module: The model or its backbone.
            name: Name of the output.
            input_ids: [B, T].
            position_ids: [B, T].
            lengths: [S] tokens of the examples in the one row, or None.
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        if lengths is None:
            return self._output(module, name, inputs)
        if not self.separate_rows:
            # The layers pass these keyword arguments down to attention.
            bounds = pack_kwargs(lengths, input_ids.device, chunk_size(self.lm.config))
            return self._output(module, name, inputs | bounds)
        outputs = []
        for ids, positions in zip(
            input_ids.split(lengths, 1), position_ids.split(lengths, 1), strict=True
        ):
            inputs = {"input_ids": ids, "position_ids": positions}
            outputs.append(self._output(module, name, inputs))
        return torch.cat(outputs, dim=1)

    def _output(self, module: Any, name: str, inputs: dict[str, Any]) -> Tensor:
        """Runs a forward pass, and returns one of its outputs; keeps the logits of routers.

        Args:
            module: The model or its backbone.
            name: Name of the output.
            inputs: Keyword arguments.
        """
        if not self._watches_routers:
            return getattr(module(**inputs, use_cache=False), name)  # type: ignore[no-any-return]
        output = module(**inputs, use_cache=False, output_router_logits=True)
        self._router_logits.append(logits_of(output))
        return getattr(output, name)  # type: ignore[no-any-return]

    def _from_hidden(
        self, hidden: Tensor, targets: Tensor, count_correct: bool
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [N, D], targets [N] -> sum of losses, number of correct targets."""
        head = self.head
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        else:
            # Not the dtype of the hidden states: after a norm in fp32, the head would compute in
            # fp32, too.
            dtype = head.weight.dtype
        task = _Task(head, self.options, count_correct, needs_grad=torch.is_grad_enabled())
        return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return]
            hidden.to(dtype), head.weight, head.bias, targets, task
        )

    def _from_logits(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, V], targets [N] -> sum of losses, number of correct targets."""
        logits = logits.float()
        losses = F.cross_entropy(
            logits, targets, reduction="none", label_smoothing=self.options.label_smoothing
        )
        if self.options.type == "dft":
            losses = losses * torch.exp(-losses.detach())
        return losses.sum(), (logits.argmax(-1) == targets).sum()

    @torch.no_grad()
    def check_head(self) -> None:
        """Compares our logits with the model's own on a few tokens.

        If they differ, the model's own logits are used from then on, with a warning.
        """
        if self.own_logits:
            return
        device = self.lm.get_output_embeddings().weight.device
        vocabulary = self.lm.config.get_text_config().vocab_size
        input_ids = torch.arange(8, device=device)[None] % vocabulary
        with evaluation_mode(self):
            own = self.lm(input_ids=input_ids, use_cache=False).logits[0]
            hidden = self.lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        head = self.head
        ours = head.logits(head.project(hidden.to(head.weight.dtype), head.weight))
        tolerance = 1e-4 if own.dtype == torch.float32 else 2e-2
        atol = tolerance * float(own.abs().max())
        self.own_logits = not torch.allclose(own.float(), ours, rtol=tolerance, atol=atol)
        if self.own_logits:
            log.warning(
                "%s does not compute its logits as scale * hidden @ head: its own full logits are"
                " used (more memory).",
                type(self.lm).__name__,
            )


def _check_bias(lm: PreTrainedModel, head: Any) -> None:
    """Refuses a head with a bias if peft trains single rows of the head.

    Raises:
        UserError: peft would drop the bias.
    """
    has_trained_rows = type(head).__name__ == "TrainableTokensWrapper"
    if has_trained_rows and head.original_module.bias is not None:
        raise UserError(
            f"the head of {type(lm).__name__} has a bias, which peft drops where rows of it are"
            " trained: leave out model.add_tokens and trainable_token_indices, or model.lora"
        )


def _unpacked_rows(
    input_ids: Tensor, labels: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unpacks a row: every example becomes a row, padded on the right.

    No mask is needed: the padding has no target, and a causal model reads nothing to the right.

    Args:
        input_ids: [1, T].
        labels: [1, T].
        lengths: [S] tokens of the examples.

    Returns:
        input_ids, labels, position_ids, and whether a position is no padding, [S, tokens of the
        longest example].
    """
    pad = torch.nn.utils.rnn.pad_sequence
    rows = pad(list(input_ids[0].split(lengths)), batch_first=True)
    row_labels = pad(list(labels[0].split(lengths)), batch_first=True, padding_value=IGNORE_INDEX)
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    ends = torch.tensor(lengths, device=rows.device)[:, None]
    # The padding counts from 0 again: the length of an example is read from its positions.
    position_ids = torch.where(places < ends, places, places - ends)
    return rows, row_labels, position_ids, places < ends
