"""Norms, gated activations and adapted linear layers of a decoder block, each in one step that
keeps less for backward.

Transformers and peft write them as chains of operations, and under autocast as many copies in fp32
and bf16. The arithmetic here is the same, the forward pass rounds where theirs does or later; only
less is written, cast and kept. A module that computes anything else than expected, by a comparison
on a few numbers, stays as it is.

Letters: T tokens, D hidden size, I size between the gated products, R rank of an adapter.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.model.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PRE_NORMS = {"input_layernorm", "post_attention_layernorm"}
"""A block with these two norms feeds them to linear layers only (Llama, Mistral, Qwen): they may
write the type that autocast computes in, which saves a cast per linear layer, and its copy.
"""


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number per token, where autograd would keep the input, its square
    root chain, the normalized input and a copy in compute type per linear layer that reads it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        x = hidden.float()
        scale = torch.rsqrt(
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps)
        )
        ctx.save_for_backward(hidden, weight, scale)
        return torch.mul((x * scale).to(hidden.dtype), weight).to(out_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        grad, normed = grad.float(), hidden.float() * scale
        grad_weight = (
            (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        grad = grad * weight
        mean = torch.linalg.vecdot(grad, normed)[..., None].div_(grad.shape[-1])
        return grad.sub_(normed.mul_(mean)).mul_(scale).to(hidden.dtype), grad_weight, None, None


class _GatedSiLU(torch.autograd.Function):
    """`silu(gate) * up`; keeps its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _GatedDown(torch.autograd.Function):
    """`(silu(gate) * up) @ weight.T`; makes the product of the two again in the backward pass, for
    two element-wise operations, where the linear layer would keep it: a third of what an MLP keeps.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        # As autocast does.
        compute_weight = weight.to(gate.dtype)
        ctx.save_for_backward(gate, up, compute_weight)
        ctx.weight_dtype = weight.dtype
        return F.linear(F.silu(gate).mul_(up), compute_weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            product = (activated * up).flatten(0, -2)
            grad_weight = (grad.flatten(0, -2).T @ product).to(ctx.weight_dtype)
        grad = grad @ weight
        return torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad), grad_weight


class _LoraLinear(torch.autograd.Function):
    """`x @ weight.T + scaling * x @ A.T @ B.T` over a frozen weight; keeps its input as it came,
    once for all layers that read it (q, k and v), where peft keeps a copy for each, and adds the
    adapter to the output within its product, where peft writes the output three times more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.adapter_dtype, ctx.scaling = a.dtype, scaling
        # As autocast does.
        weight, a, b = (w.to(x.dtype) for w in (weight, a, b))
        rows = x.flatten(0, -2)
        # [T, R].
        low = rows @ a.T
        ctx.save_for_backward(x, weight, a, b, low)
        out = F.linear(rows, weight, None if bias is None else bias.to(x.dtype))
        # not in place: selective checkpointing may keep the product
        return torch.addmm(out, low, b.T, alpha=scaling).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grad.flatten(0, -2)
        # [T, R].
        grad_low = grad @ b
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a, alpha=ctx.scaling).view_as(x)
        grad_a = (grad_low.T @ rows).to(ctx.adapter_dtype).mul_(ctx.scaling)
        grad_b = (grad.T @ low).to(ctx.adapter_dtype).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


def _norm_forward(norm: Any, feeds_linear: bool) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        kind = hidden_states.device.type
        if feeds_linear and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        else:
            dtype = torch.promote_types(hidden_states.dtype, norm.weight.dtype)
        out: Tensor = _RMSNorm.apply(hidden_states, norm.weight, norm.variance_epsilon, dtype)
        return out

    return forward


def _mlp_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
        # torch has no public way to ask whether a module has hooks, which only a call of the module
        # itself runs.
        is_observed = bool(down._forward_hooks)
        if type(down) is nn.Linear and down.bias is None and not is_observed:
            out: Tensor = _GatedDown.apply(gate, up, down.weight)
        else:
            # Adapted, quantized or observed.
            out = down(_GatedSiLU.apply(gate, up))
        return out

    return forward


def _lora_forward(layer: Any) -> Callable[..., Tensor]:
    plain = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, name, autocast = (
            layer.base_layer,
            _plain_adapter(layer),
            torch.is_autocast_enabled(x.device.type),
        )
        if name is None or args or kwargs:
            return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if not autocast and not x.dtype == base.weight.dtype == a.dtype:
            # Fp32 adapters compute in fp32.
            return plain(x)  # type: ignore[no-any-return]
        x = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        out: Tensor = _LoraLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[name])
        return out

    return forward


def _plain_adapter(layer: Any) -> str | None:
    """Name of the one adapter of a layer of peft that computes nothing else than LoRA; None as soon
    as it does.
    """
    base, names = layer.base_layer, layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or layer.disable_adapters or layer.merged:
        return None
    name = names[0]
    adds_only = name not in layer.lora_variant and type(layer.lora_dropout[name]) is nn.Identity
    frozen = type(base) is nn.Linear and not any(p.requires_grad for p in base.parameters())
    return name if adds_only and frozen and layer.lora_B[name].bias is None else None


def fuse_blocks(lm: PreTrainedModel, known: Collection[str] | None = None) -> list[str]:
    """Replaces the forward passes of RMS norms, SiLU-gated MLPs and LoRA layers in place; names of
    parameters stay.

    Args:
        lm: Causal LM.
        known: Names of the modules that another rank has compared, where this one has no weights
            yet.

    Returns:
        Names of the modules that were replaced.
    """
    feeding = {
        id(child)
        for module in lm.modules()
        for name, child in module.named_children()
        if name in PRE_NORMS
        and {n for n, _ in module.named_children() if n.endswith("norm")} == PRE_NORMS
    }
    replaced = []
    for name, module in lm.named_modules():
        if type(module).__name__.endswith("RMSNorm") and "variance_epsilon" in vars(module):
            width, forward = module.weight.shape[-1], _norm_forward(module, id(module) in feeding)
        elif {"gate_proj", "up_proj", "down_proj", "act_fn"} <= {
            child for child, _ in module.named_children()
        }:
            width, forward = getattr(module.gate_proj, "in_features", 0), _mlp_forward(module)
        elif (type(module).__module__, type(module).__name__) == (
            "peft.tuners.lora.layer",
            "Linear",
        ):
            width, forward = module.in_features, _lora_forward(module)
        else:
            continue
        if name in known if known is not None else _same(module, forward, int(width)):
            module.forward = forward  # type: ignore[method-assign, assignment]
            replaced.append(name)
    return replaced


def unfuse_blocks(lm: PreTrainedModel, names: Collection[str]) -> None:
    """Gives the modules that `fuse_blocks` named their own forward passes back, which round
    otherwise in 16 bits.
    """
    for name in names:
        del lm.get_submodule(name).forward


@torch.no_grad()
def _same(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether both give the same for a few numbers; adapters with other numbers than the zeros that
    they start with.
    """
    weight = next(module.parameters())
    if width == 0 or weight.is_meta:
        return False
    x = torch.linspace(-2, 2, 2 * width, device=weight.device).view(1, 2, width)
    x = x.to(weight.dtype if weight.is_floating_point() else torch.get_default_dtype())
    adapters = [b.weight for b in getattr(module, "lora_B", {}).values()]
    starts = [b.clone() for b in adapters]
    for b in adapters:
        b.copy_(torch.linspace(-1, 1, b.numel(), device=b.device).view_as(b))
    # Computes as autocast says, and only there.
    mixed = any(b.dtype != weight.dtype for b in adapters)
    with evaluation_mode(module), torch.autocast(weight.device.type, torch.bfloat16, enabled=mixed):
        own, ours = module(x), forward(x)
    for b, start in zip(adapters, starts, strict=True):
        b.copy_(start)
    tolerance = 1e-5 if own.dtype == torch.float32 else 2e-2
    return torch.allclose(
        own.float(), ours.float(), rtol=tolerance, atol=tolerance * float(own.abs().max())
    )
