"""The experts of a mixture-of-experts model, computed by grouped matrix products.

transformers keeps the experts of a layer as three-dimensional parameters, and lets other code
compute them (`ExpertsInterface`). The functions here follow its `grouped_mm`, with two differences:

- They compute in autocast's dtype, as linear layers do. transformers computes in that of the
  stored weights, fp32 in full fine-tuning, for which GPUs have no grouped product.
- Adapters are computed low-rank. peft computes the updated weights of all experts, and keeps them
  for the backward pass.

Letters: T tokens, K experts per token, S = T * K rows, E experts, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK_MULTIPLE = 8
"""Grouped products need rows of a multiple of 16 bytes, 8 numbers in 16 bits. Ranks are padded."""


class LowRank(NamedTuple):
    """The adapters of one parameter of a layer of experts."""

    a: Tensor
    """[E, R, in]."""
    b: Tensor
    """[E, out, R]."""
    scaling: float


def expert_parameters(module: nn.Module) -> list[str]:
    """Returns the names of the three-dimensional parameters of a layer of experts.

    Args:
        module: Any module. One that is no layer of experts has none.
    """
    if not type(module).__name__.endswith("Experts"):
        return []
    return [name for name, value in module.named_parameters(recurse=False) if value.dim() == 3]


def has_experts(model: nn.Module) -> bool:
    """Whether tokens are sent to experts. In 16 bits, rounding may then change where to."""
    return any(expert_parameters(module) for module in model.modules())


def group_experts(lm: PreTrainedModel) -> None:
    """Replaces the forward passes of the experts and of their adapters, in place.

    Layers of experts that transformers does not let others compute (Llama 4) are left alone.

    Args:
        lm: The causal LM, with its adapters.
    """
    for module in lm.modules():
        if _has_interface(module):
            module.forward = _forward_of(module, {})  # type: ignore[method-assign, assignment]
        # By its name, because the import of peft takes seconds.
        elif type(module).__name__ == "ParamWrapper" and _has_interface(_experts_in(module)):
            module.forward = _adapted_forward(module)  # type: ignore[method-assign, assignment]


def _has_interface(module: nn.Module) -> bool:
    """Whether transformers lets other code compute these experts."""
    # Its decorator `use_experts_implementation` sets these.
    return {"has_gate", "has_bias", "is_transposed"} <= vars(module).keys()


def _experts_in(wrapper: Any) -> Any:
    """The layer of experts within the wrappers of peft, one for each adapted parameter."""
    return wrapper.get_base_layer()


def _forward_of(experts: Any, adapters: Mapping[str, LowRank]) -> Callable[..., Tensor]:
    """Makes the forward pass of a layer of experts.

    Args:
        experts: The layer.
        adapters: Its adapters by the name of the parameter.
    """

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _grouped(experts, adapters, hidden_states, top_k_index, top_k_weights)

    return forward


def _adapted_forward(wrapper: Any) -> Callable[..., Tensor]:
    """Makes the forward pass of peft's wrapper; one that is merged or disabled is left to peft."""
    own_forward = wrapper.forward

    def forward(*inputs: Tensor, **kwargs: Any) -> Tensor:
        adapters = _adapters(wrapper)
        if adapters is None:
            return own_forward(*inputs, **kwargs)  # type: ignore[no-any-return]
        return _forward_of(_experts_in(wrapper), adapters)(*inputs, **kwargs)

    return forward


def _adapters(wrapper: Any) -> dict[str, LowRank] | None:
    """The adapters of a layer of experts by the name of the parameter; None if one is not active.

    Args:
        wrapper: The outermost of peft's wrappers. Each wraps the next, and the last one the layer.
    """
    experts = _experts_in(wrapper)
    found = {}
    while wrapper is not experts:
        names = wrapper.active_adapters
        if len(names) != 1 or wrapper.disable_adapters or wrapper.merged:
            return None
        # [R * E, in] with the experts outside, and [out, R * E] with the experts inside.
        a, b = wrapper.lora_A[names[0]].weight, wrapper.lora_B[names[0]].weight
        a = a.unflatten(0, (wrapper.num_experts, -1))
        b = b.unflatten(1, (-1, wrapper.num_experts)).permute(2, 0, 1)
        found[wrapper.parameter_name] = LowRank(a, b, wrapper.scaling[names[0]])
        wrapper = wrapper.base_layer
    return found


def _grouped(
    experts: Any,
    adapters: Mapping[str, LowRank],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Computes a layer of experts; source: `grouped_mm_experts_forward` of transformers.

    Args:
        experts: The layer.
        adapters: Its adapters by the name of the parameter.
        hidden_states: [T, D].
        top_k_index: [T, K] the experts of each token.
        top_k_weights: [T, K] their weights in the sum.

    Returns:
        [T, D] in the dtype of `hidden_states`.
    """
    num_tokens, top_k = top_k_index.shape
    # The rows are sorted by expert.
    expert_of_row, order = top_k_index.flatten().sort()
    ends = _ends(expert_of_row, experts.num_experts)
    x = hidden_states[order // top_k]
    inner = "gate_up_proj" if experts.has_gate else "up_proj"
    x = _product(experts, adapters, inner, x, expert_of_row, ends)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    x = _product(experts, adapters, "down_proj", x, expert_of_row, ends)
    if experts.has_post_expert_norm:
        x = experts.post_expert_norm(x)
    x = x * top_k_weights.flatten()[order, None]
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    return x[rows].view(num_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _ends(expert_of_row: Tensor, num_experts: int) -> Tensor:
    """The position after the last row of each expert, [S] -> [E] int32."""
    # `bincount` would synchronize a GPU. On a CPU, `histc` takes no integers.
    is_on_cpu = expert_of_row.device.type == "cpu"
    counted = expert_of_row.float() if is_on_cpu else expert_of_row.int()
    counts = torch.histc(counted, bins=num_experts, min=0, max=num_experts - 1)
    return counts.cumsum(0, dtype=torch.int32)


def _product(
    experts: Any,
    adapters: Mapping[str, LowRank],
    name: str,
    x: Tensor,
    expert_of_row: Tensor,
    ends: Tensor,
) -> Tensor:
    """Multiplies each row with the matrix of its expert, and adds bias and adapter.

    Args:
        experts: The layer.
        adapters: Its adapters by the name of the parameter.
        name: The parameter.
        x: [S, in] sorted by expert.
        expert_of_row: [S].
        ends: [E].

    Returns:
        [S, out].
    """
    from transformers.integrations.moe import _grouped_linear

    weight = getattr(experts, name)
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    x = x.to(dtype)
    out = _grouped_linear(x, weight.to(dtype), ends, is_transposed=experts.is_transposed)
    if experts.has_bias:
        out = out + getattr(experts, f"{name}_bias")[expert_of_row].to(dtype)
    if name not in adapters:
        return out
    a, b, scaling = adapters[name]
    padding = -a.shape[1] % RANK_MULTIPLE
    a = F.pad(a.to(dtype), (0, 0, 0, padding))
    b = F.pad(b.to(dtype), (0, padding)).contiguous()
    low = _grouped_linear(x, a, ends)
    return out + _grouped_linear(low, b, ends) * scaling
