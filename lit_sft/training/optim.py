"""Learning-rate schedules and parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_sft.errors import UserError

SMALLEST_FP16 = 2.0**-24
"""The least number above 0."""


@dataclass
class ScheduleOptions:
    """Warm-up, then decay, by optimizer step."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of all optimizer steps over which the rate rises from 0, in [0, 1)."""
    warmup_steps: int | None = None
    """Optimizer steps of warm-up; wins over `warmup_ratio`."""
    min_lr_ratio: float = 0.0
    """What is left of the rate at the end, as a share of `lr`, in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup_ratio < 1.0:
            raise UserError(
                f"model.lr_schedule.warmup_ratio is {self.warmup_ratio}, it must be in [0, 1)"
            )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(
                f"model.lr_schedule.warmup_steps is {self.warmup_steps}, it must not be negative"
            )
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise UserError(
                f"model.lr_schedule.min_lr_ratio is {self.min_lr_ratio}, it must be in [0, 1]"
            )


def lr_factor(options: ScheduleOptions, total_steps: int) -> Callable[[int], float]:
    """The factor on `lr` for the optimizer step that comes after `step` steps are done.

    The first step of a warm-up of n has 1 / n of the rate, step n the whole of it.
    """
    warmup = (
        options.warmup_steps
        if options.warmup_steps is not None
        else math.ceil(options.warmup_ratio * total_steps)
    )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if options.type == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        decay = (
            1.0 - progress
            if options.type == "linear"
            else 0.5 * (1.0 + math.cos(math.pi * progress))
        )
        return options.min_lr_ratio + (1.0 - options.min_lr_ratio) * decay

    return factor


def restore_lr(schedule: LambdaLR) -> tuple[float, float]:
    """Sets the learning rate from the current config after a resume.

    The loaded optimizer state still holds the rate of the earlier config, and the schedule would
    overwrite it one step later. With an unchanged config the rate is the same number, bit for bit.

    Returns:
        The loaded and the new rate of the first parameter group.
    """
    groups = schedule.optimizer.param_groups
    before = groups[0]["lr"]
    for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(schedule.last_epoch)
    return before, groups[0]["lr"]


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Trained parameters in two groups; those with one dimension (norms, biases) take no weight
    decay.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for _, parameter in parameters:
        if parameter.requires_grad:
            (decay if parameter.ndim > 1 else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def prefer_fused(optimizer: Optimizer) -> None:
    """Lets Adam and AdamW run as one kernel, unless the user chose a way.

    The default on a CPU is a loop over parameters and a dozen passes over memory for each; fused
    reads and writes every number once: a quarter of the time of its step.
    """
    if type(optimizer) in (Adam, AdamW) and not any(
        optimizer.defaults[key] for key in ("foreach", "fused")
    ):
        if optimizer.defaults["differentiable"] or optimizer.defaults["capturable"]:
            return
        optimizer.defaults["fused"] = True
        for group in optimizer.param_groups:
            group["fused"] = True


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiplies all gradients by a number, in place.

    Args:
        parameters: Those without a gradient are left out.
        factor: Scalar on any device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Private, but it is what torch's own clipping uses: one kernel for many tensors, instead of one
    # for each. Offloaded gradients are on the CPU.
    torch._foreach_mul_(gradients, factor.to(gradients[0].device, torch.float32))


def clip_by_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients, on every device that has a shard of them; scales them down to
    `limit` if it is finite.

    A collective call where they are sharded.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(
        [parameter.grad for parameter in trained if parameter.grad is not None]
    )
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if limit < math.inf:
        nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm


def clear_gradients(optimizer: Optimizer, model: nn.Module | None) -> None:
    """Frees the gradients; those that lie in DDP's buffers are set to 0 and stay there.

    Freed ones would take no less memory, since the buffers stay, and with accumulation more: the
    micro-batches that are not reduced would make gradients of their own beside them. A parameter
    that a step may not use keeps none, or the optimizer would change it.

    Args:
        optimizer: Has made its step.
        model: What the strategy runs.
    """
    keep = isinstance(model, DistributedDataParallel) and model.gradient_as_bucket_view
    optimizer.zero_grad(set_to_none=not keep or bool(model.find_unused_parameters))  # type: ignore[union-attr]


def restored(optimizer: Optimizer) -> list[str]:
    """What a resumed optimizer goes on with although it was asked for another value, in words."""
    group = optimizer.param_groups[0]
    kept = {"lr": group.get("initial_lr"), "weight_decay": group.get("weight_decay")}
    asked = {name: optimizer.defaults.get(name) for name in kept}
    return [
        f"{name} {kept[name]}, not {asked[name]}"
        for name in kept
        if kept[name] not in (None, asked[name])
    ]


def name_of(optimizer: Optimizer) -> str:
    """Its class and package: what another one keeps of a parameter has other names, or another
    meaning.
    """
    kind = type(optimizer)
    return f"{kind.__name__} of {kind.__module__.partition('.')[0]}"


def check_same(make: Callable[[Iterable], Optimizer], saved: str | None) -> None:
    """Refuses to go on with another optimizer than that of the checkpoint.

    Args:
        make: `model.optimizer`.
        saved: `name_of` that of the checkpoint; None where it does not say.

    Raises:
        UserError: It is another.
    """
    asked = name_of(make([nn.Parameter(torch.ones(1, 1))]))
    if saved not in (None, asked):
        raise UserError(
            f"model.optimizer is {asked}, and the checkpoint holds the state of {saved}: set it to"
            " that, or begin another run (without --ckpt_path) from the exported weights"
        )


def bytes_per_parameter(make: Callable[[Iterable], Optimizer], dtype: torch.dtype) -> float:
    """What an optimizer remembers of each parameter: 8 bytes for Adam in fp32, about 2 for one of 8
    bits, 0 for SGD.

    Found by one step on a small matrix, so that no list of optimizers is needed.

    Args:
        make: `model.optimizer`.
        dtype: Of the parameter.
    """
    parameter = nn.Parameter(torch.ones(512, 512, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    tensors = [
        value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in tensors) / parameter.numel()


def check_weights(optimizer: Optimizer, sharded: bool, scaled: bool) -> None:
    """Refuses an optimizer that cannot train its weights.

    Args:
        optimizer: Holds the weights.
        sharded: Whether the weights are spread over ranks.
        scaled: Whether gradients are scaled for fp16.

    Raises:
        UserError: The kernels of the optimizer do not take shards; or the weights are in fp16,
            where its eps is 0 and a gradient of 0 makes NaN; or it unscales gradients itself, after
            they were clipped.
    """
    name = type(optimizer).__name__
    # Private, but it is what torch's GradScaler and Lightning read, and optimizers of other
    # packages set.
    unscales_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    if scaled and unscales_itself:
        raise UserError(
            f"model.optimizer {name} with fused: true would clip gradients that are still scaled "
            "for fp16: leave fused out, or set trainer.precision to bf16-mixed"
        )
    has_own_kernels = any(
        kind.__module__.partition(".")[0] == "bitsandbytes" for kind in type(optimizer).__mro__
    )
    if sharded and has_own_kernels:
        raise UserError(
            f"model.optimizer {name} of bitsandbytes does not take sharded weights: set "
            "trainer.strategy to ddp or auto, or model.optimizer to torch.optim.AdamW"
        )
    # The kernels of bitsandbytes compute in fp32.
    if not has_own_kernels:
        _check_eps_in_fp16(optimizer)


def _check_eps_in_fp16(optimizer: Optimizer) -> None:
    eps = optimizer.defaults.get("eps")
    if not isinstance(eps, float) or eps >= SMALLEST_FP16:
        return
    if any(p.dtype == torch.float16 for group in optimizer.param_groups for p in group["params"]):
        raise UserError(
            f"model.optimizer's eps {eps:g} is 0 in the fp16 of the trained weights, which become"
            " NaN: set trainer.precision to 16-mixed (and model.dtype to auto), or train adapters"
            " (model.lora)"
        )
