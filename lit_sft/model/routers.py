"""The routers of a mixture-of-experts model: the loss that balances experts, and statistics.

The loss is that of transformers (`load_balancing_loss_func`, after arXiv:2101.03961):
E * sum_e F_e * P_e. F_e is the number of tokens that are sent to expert e, P_e the sum of its
probabilities, both divided by the number of tokens, over all layers together. F has no gradient.

F and P are averages over a batch, and their product is no sum over parts of it. So P and F of a
micro-batch are taken over all ranks, and F also over the earlier micro-batches of the optimizer
step (arXiv:2501.11873). The losses of the micro-batches are averaged by their numbers of targets.
With one micro-batch per step and rank, this is exactly the loss of the global batch. With
accumulation it is not: the backward pass of a micro-batch is over before F of the next is known.

Letters: T tokens, L layers with routers, E experts, K experts per token.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_sft.errors import UserError
from lit_sft.model.experts import has_experts
from lit_sft.types import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names of the coefficient in configs."""
OTHER_COEFFICIENTS = re.compile(r".*aux_loss.*|moe_loss_weight")
"""Names in configs of models for which transformers has no such loss, or another one."""
PLACES = re.compile(r"\.(experts|gate|router)\.")
"""What parameters of routers and experts have in their names."""


def has_loss(lm: PreTrainedModel) -> bool:
    """Whether transformers has the loss that balances the experts of this model."""
    # Each family has a copy of it beside its classes. Some of their models are dense.
    is_known = "load_balancing_loss_func" in vars(sys.modules[type(lm).__module__])
    return is_known and has_experts(lm) and _own_coefficient(lm) is not None


def _own_coefficient(lm: PreTrainedModel) -> float | None:
    """The coefficient in the model's config. None if it has none."""
    config = lm.config.get_text_config().to_dict()
    for name in COEFFICIENTS:
        if config.get(name) is not None:
            return float(config[name])
    return None


def choose_coefficient(lm: PreTrainedModel, wanted: float | None) -> float:
    """Returns the weight of the loss that balances the experts, 0 for none, and logs it.

    Args:
        lm: The causal LM. Its parameters are marked as trained or frozen.
        wanted: `model.loss.router_aux_loss_coef`. None takes that of the model's config, if routers
            or experts are trained.

    Raises:
        UserError: A weight is wanted, but cannot be applied.
    """
    key = "model.loss.router_aux_loss_coef"
    if not has_loss(lm):
        if wanted:
            raise UserError(
                f"{key} is {wanted}, but transformers has no such loss for {type(lm).__name__}: set"
                " it to null"
            )
        _log_left_out(lm)
        return 0.0
    is_trained = any(
        PLACES.search(name) and parameter.requires_grad for name, parameter in lm.named_parameters()
    )
    if not is_trained:
        if wanted:
            raise UserError(
                f"{key} is {wanted}, but neither routers nor experts are trained: set it to null,"
                " or model.lora.target_experts to true"
            )
        return 0.0
    own = _own_coefficient(lm)
    coefficient = own if wanted is None else wanted
    assert coefficient is not None
    if coefficient:
        source = "the model's config" if wanted is None else key
        log.info("the loss that balances the experts is added, times %g (%s)", coefficient, source)
    elif own:
        log.warning("the loss that balances the experts is left out (%s 0)", key)
    return coefficient


def _log_left_out(lm: PreTrainedModel) -> None:
    """Warns if the config asks for a loss that balances the experts, which we do not have."""
    asked = []
    for name, value in lm.config.get_text_config().to_dict().items():
        is_number = isinstance(value, int | float)
        is_weight = OTHER_COEFFICIENTS.fullmatch(name) and is_number and value > 0
        if is_weight or (name == "output_router_logits" and value):
            asked.append(f"{name} {value}")
    if asked:
        log.warning(
            "the loss that balances the experts is left out, for which the model's config has %s",
            ", ".join(asked),
        )


def routing(
    logits: Sequence[Tensor],
    top_k: int,
    *,
    is_token: Tensor | None,
    num_tokens: int,
    needs_grad: bool,
) -> Routing:
    """Sums up where tokens are sent.

    Args:
        logits: L router logits, each [T, E].
        top_k: K.
        is_token: [T] False for padding. None if there is none.
        num_tokens: Tokens without padding.
        needs_grad: Whether the probabilities get a gradient.
    """
    counts, probabilities, entropies = [], [], []
    for layer in logits:
        with torch.set_grad_enabled(needs_grad):
            probs = torch.softmax(layer, dim=-1, dtype=torch.float32)
            if is_token is not None:
                probs = probs * is_token[:, None]
            probabilities.append(probs.sum(0))
        with torch.no_grad():
            entropies.append(torch.special.entr(probs).sum())
            chosen = torch.zeros_like(probs).scatter_(1, layer.topk(top_k, dim=-1).indices, 1.0)
            if is_token is not None:
                chosen *= is_token[:, None]
            counts.append(chosen.sum(0))
    return Routing(
        counts=torch.stack(counts),
        probs=torch.stack(probabilities).sum(0),
        entropy=torch.stack(entropies).sum(),
        num_tokens=num_tokens,
    )


class RouterSums:
    """What the routers did in the current optimizer step.

    Args:
        coefficient: Weight of the loss that balances the experts. 0 for none.
        num_ranks: Number of ranks.
    """

    def __init__(self, coefficient: float, num_ranks: int) -> None:
        self.coefficient = coefficient
        self.num_ranks = num_ranks
        self.clear()

    def clear(self) -> None:
        """Begins an optimizer step."""
        self.all_ranks: Tensor | None = None
        """[E + 1] tokens per expert and tokens, times layers, of the micro-batches so far and of
        all ranks.
        """
        self.this_rank: dict[str, Tensor] = {}
        """Sums of this rank, for the metrics."""

    def add(self, found: Routing, num_targets: Tensor, is_filler: bool) -> Tensor | None:
        """Adds a micro-batch. With a coefficient, a collective call.

        Args:
            found: Where its tokens were sent.
            num_targets: [] int64, its targets.
            is_filler: Whether its tokens do not count, because they are no data.

        Returns:
            The term to add to the *sum* of its token losses, [] fp32. It is divided by the targets
            of the global batch later, as that sum is. None without a coefficient.
        """
        share = 0.0 if is_filler else 1.0
        rows = share * found.num_tokens * len(found.counts)
        sums = {
            "counts": share * found.counts,
            "probs": share * found.probs.detach(),
            "entropy": share * found.entropy,
            "rows": found.entropy.new_full((), rows),
        }
        for name, value in sums.items():
            self.this_rank[name] = self.this_rank.get(name, 0) + value
        if not self.coefficient:
            return None
        # [E + 2] of this micro-batch: tokens per expert, tokens times layers, targets.
        now = torch.cat([sums["counts"].sum(0), found.entropy.new_full((2,), rows)])
        now[-1:].fill_(0).add_(num_targets)
        if self.num_ranks > 1:
            dist.all_reduce(now)
        so_far = now[:-1] if self.all_ranks is None else self.all_ranks + now[:-1]
        self.all_ranks = so_far
        frequencies = so_far[:-1] / so_far[-1].clamp(min=1)
        # Each rank has a part of the sum of the probabilities. The loss counts once per target of
        # all ranks.
        probs = share * found.probs / now[-2].clamp(min=1)
        return self.coefficient * now[-1] * len(frequencies) * (frequencies * probs).sum()

    def metrics(self) -> dict[str, Tensor]:
        """Returns the statistics of the step over all ranks, by name. A collective call.

        Empty for a model without routers.
        """
        if not self.this_rank:
            return {}
        sums = list(self.this_rank.values())
        flat = torch.cat([value.flatten() for value in sums])
        if self.num_ranks > 1:
            dist.all_reduce(flat)
        counts, probs, entropy, rows = (
            part.view_as(value)
            for part, value in zip(flat.split([v.numel() for v in sums]), sums, strict=True)
        )
        rows = rows.clamp(min=1)
        num_experts = counts.shape[1]
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        found = {
            "expert_load_max": shares.max() * num_experts,
            "router_entropy": entropy / rows,
        }
        if self.coefficient:
            balance = (counts.sum(0) / rows * (probs / rows)).sum() * num_experts
            found["router_aux_loss"] = balance
        return found


def logits_of(outputs: Any) -> list[Tensor]:
    """The router logits of a forward pass, L times [T, E]."""
    return [layer.flatten(0, -2) for layer in outputs.router_logits]
