"""Fused RMS norms, gated MLPs and LoRA layers, which save less for the backward pass.

In transformers and peft these are chains of operations, with many copies in fp32 and bf16 under
autocast. The arithmetic here is the same, and the forward pass rounds where theirs does, or later.
But less is written, cast and saved. `fuse_blocks` compares every module with its replacement on a
few numbers, and leaves a module alone that computes something else.

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
"""The norms of a block in Llama, Mistral and Qwen. If a block has no others, only linear layers
read their output. So they may write it in autocast's dtype, which saves a cast and a copy per
linear layer.
"""


class _RMSNorm(torch.autograd.Function):
    """RMS norm that saves its input and one number per token.

    Autograd would save the input, intermediate results, the normalized input, and a cast copy for
    each linear layer that reads it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        x = hidden.float()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean_square = norm.square_().div_(x.shape[-1])
        scale = torch.rsqrt(mean_square.add_(eps))
        ctx.save_for_backward(hidden, weight, scale)
        return torch.mul((x * scale).to(hidden.dtype), weight).to(out_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        grad = grad.float()
        normed = hidden.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        mean = torch.linalg.vecdot(grad, normed)[..., None].div_(grad.shape[-1])
        grad_hidden = grad.sub_(normed.mul_(mean)).mul_(scale).to(hidden.dtype)
        return grad_hidden, grad_weight, None, None


class _GatedSiLU(torch.autograd.Function):
    """`silu(gate) * up`, which saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        grad_up = F.silu(gate).mul_(grad)
        return grad_gate, grad_up


class _GatedDown(torch.autograd.Function):
    """`(silu(gate) * up) @ weight.T`, which recomputes `silu(gate) * up` in the backward pass.

    That costs two element-wise operations, and saves a third of the activations of an MLP.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        # The cast that autocast makes.
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
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        grad_up = activated.mul_(grad)
        return grad_gate, grad_up, grad_weight


class _LoraLinear(torch.autograd.Function):
    """`x @ weight.T + scaling * x @ A.T @ B.T` over a frozen weight.

    It saves its input without a cast, so that layers with the same input (q, k and v) share it;
    peft saves a copy for each. It adds the adapter within the matrix product; peft writes the
    output three times more.
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
        # The casts that autocast makes.
        weight, a, b = (w.to(x.dtype) for w in (weight, a, b))
        if bias is not None:
            bias = bias.to(x.dtype)
        rows = x.flatten(0, -2)
        # [T, R].
        low = rows @ a.T
        ctx.save_for_backward(x, weight, a, b, low)
        out = F.linear(rows, weight, bias)
        # Not in place: selective checkpointing may save `out`. No view: Llama 4 adds to the output
        # in place, which torch refuses for a view that is made here.
        return torch.addmm(out, low, b.T, alpha=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        rows = x.flatten(0, -2)
        # [T, R].
        grad_low = grad @ b
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a, alpha=ctx.scaling).view_as(x)
        grad_a = (grad_low.T @ rows).to(ctx.adapter_dtype).mul_(ctx.scaling)
        grad_b = (grad.T @ low).to(ctx.adapter_dtype).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


def _norm_forward(norm: Any, feeds_linear: bool) -> Callable[[Tensor], Tensor]:
    """Makes the forward pass of an RMS norm.

    Args:
        norm: The norm.
        feeds_linear: Whether only linear layers read its output (see `PRE_NORMS`).
    """

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
    """Makes the forward pass of an MLP that is gated by SiLU."""

    def forward(x: Tensor) -> Tensor:
        gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
        # Hooks run only if the module itself is called. torch has no public way to ask for them.
        is_observed = bool(down._forward_hooks)
        is_plain = type(down) is nn.Linear and down.bias is None
        if is_plain and not is_observed:
            out: Tensor = _GatedDown.apply(gate, up, down.weight)
        else:
            out = down(_GatedSiLU.apply(gate, up))
        return out

    return forward


def _lora_forward(layer: Any) -> Callable[..., Tensor]:
    """Makes the forward pass of peft's LoRA layer; what is not plain LoRA is left to peft."""
    own_forward = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = layer.base_layer
        name = _plain_adapter(layer)
        if name is None or args or kwargs:
            return own_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif not x.dtype == base.weight.dtype == a.dtype:
            # Without autocast, peft computes fp32 adapters in fp32.
            return own_forward(x)  # type: ignore[no-any-return]
        out: Tensor = _LoraLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[name])
        return out.unflatten(0, x.shape[:-1])

    return forward


def _plain_adapter(layer: Any) -> str | None:
    """Returns the name of the adapter if a layer of peft computes plain LoRA, else None.

    Plain LoRA is one active adapter without dropout, bias or variant (DoRA), over a frozen linear
    layer.
    """
    base = layer.base_layer
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or layer.disable_adapters or layer.merged:
        return None
    name = names[0]
    if name in layer.lora_variant or type(layer.lora_dropout[name]) is not nn.Identity:
        return None
    if layer.lora_B[name].bias is not None or type(base) is not nn.Linear:
        return None
    is_frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return name if is_frozen else None


def fuse_blocks(lm: PreTrainedModel, known: Collection[str] | None = None) -> list[str]:
    """Replaces the forward passes of RMS norms, gated MLPs and LoRA layers, in place.

    The modules and the names of their parameters stay.

    Args:
        lm: The causal LM.
        known: Names of the modules to replace, as rank 0 has found them, if this rank has no
            weights yet. None compares every module with its replacement.

    Returns:
        Names of the modules whose forward pass was replaced.
    """
    feeding_linear = _norms_before_linear(lm)
    replaced = []
    for name, module in lm.named_modules():
        found = _fused_forward(module, feeds_linear=id(module) in feeding_linear)
        if found is None:
            continue
        forward, width = found
        if known is not None:
            is_exact = name in known
        else:
            is_exact = _gives_same_output(module, forward, width)
        if is_exact:
            module.forward = forward  # type: ignore[method-assign, assignment]
            replaced.append(name)
    return replaced


def _norms_before_linear(lm: nn.Module) -> set[int]:
    """The ids of the norms whose output only linear layers read (see `PRE_NORMS`)."""
    found = set()
    for module in lm.modules():
        children = dict(module.named_children())
        norms = {name for name in children if name.endswith("norm")}
        if norms == PRE_NORMS:
            found |= {id(children[name]) for name in norms}
    return found


def _fused_forward(module: Any, feeds_linear: bool) -> tuple[Callable[..., Tensor], int] | None:
    """Returns a fused forward pass for a module, and the width of its input; None for others."""
    kind = type(module)
    children = {name for name, _ in module.named_children()}
    if kind.__name__.endswith("RMSNorm") and "variance_epsilon" in vars(module):
        return _norm_forward(module, feeds_linear), int(module.weight.shape[-1])
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= children:
        return _mlp_forward(module), int(getattr(module.gate_proj, "in_features", 0))
    # By its name, because the import of peft takes seconds. A `ParamWrapper` also adapts experts.
    is_lora = kind.__module__ == "peft.tuners.lora.layer"
    if is_lora and (kind.__name__ == "Linear" or type(module.base_layer) is nn.Linear):
        return _lora_forward(module), int(module.in_features)
    return None


def unfuse_blocks(lm: PreTrainedModel, names: Collection[str]) -> None:
    """Restores the own forward passes of modules, which round differently in 16 bits.

    Args:
        lm: The causal LM.
        names: The result of `fuse_blocks`.
    """
    for name in names:
        del lm.get_submodule(name).forward


@torch.no_grad()
def _gives_same_output(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether a module and its fused forward pass agree on a few numbers.

    Adapters get other values meanwhile: they start at zero, and would hide a difference.
    """
    weight = next(module.parameters())
    if width == 0 or weight.is_meta:
        return False
    # Quantized weights are integers.
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    x = torch.linspace(-2, 2, 2 * width, device=weight.device).view(1, 2, width).to(dtype)
    adapters = [b.weight for b in getattr(module, "lora_B", {}).values()]
    starts = [b.clone() for b in adapters]
    for b in adapters:
        b.copy_(torch.linspace(-1, 1, b.numel(), device=b.device).view_as(b))
    # Adapters of another dtype than their base are fused under autocast only.
    mixed = any(b.dtype != weight.dtype for b in adapters)
    with evaluation_mode(module), torch.autocast(weight.device.type, torch.bfloat16, enabled=mixed):
        own, ours = module(x), forward(x)
    for b, start in zip(adapters, starts, strict=True):
        b.copy_(start)
    tolerance = 1e-5 if own.dtype == torch.float32 else 2e-2
    atol = tolerance * float(own.abs().max())
    return torch.allclose(own.float(), ours.float(), rtol=tolerance, atol=atol)
