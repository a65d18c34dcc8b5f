"""Learning-rate schedules, parameter groups, gradients, and checks of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Adam, AdamW, Muon, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from lit_sft.errors import UserError
from lit_sft.training.muon import MuonWithAdamW

SMALLEST_FP16 = 2.0**-24
"""The smallest positive number of fp16."""


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
    """Rate at the end as a share of `lr`, in [0, 1]."""

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


def check_open_end(options: ScheduleOptions, ends: bool) -> None:
    """Checks a run without a last step, which `trainer.max_epochs` -1 or null makes.

    Args:
        options: The schedule, a share of a number of steps that is not known.
        ends: Whether a time limit or early stopping ends the run.

    Raises:
        UserError: The run would never end, or its schedule needs the number of steps.
    """
    if not ends:
        raise UserError(
            "trainer.max_epochs sets no end: set it to a number, or set trainer.max_steps,"
            " trainer.max_time or early_stopping"
        )
    if options.type != "constant" or (options.warmup_steps is None and options.warmup_ratio):
        raise UserError(
            "trainer.max_epochs sets no number of steps, which the learning rate follows: set"
            " model.lr_schedule.type to constant and model.lr_schedule.warmup_steps to a number, or"
            " set trainer.max_steps or trainer.max_epochs"
        )


def lr_factor(options: ScheduleOptions, total_steps: int | None) -> Callable[[int], float]:
    """Returns the function from the number of finished optimizer steps to the factor on `lr`.

    In a warm-up of n steps, the first step has 1 / n of the rate and step n has all of it.

    Args:
        options: The schedule.
        total_steps: Optimizer steps of the run; None if no number ends it (`check_open_end`).
    """
    warmup = options.warmup_steps
    # A run without a number of steps has no share of them, and a constant rate.
    total_steps = total_steps or 0
    if warmup is None:
        warmup = math.ceil(options.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if options.type == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        decay = 1.0 - progress
        if options.type == "cosine":
            decay = 0.5 * (1.0 + math.cos(math.pi * progress))
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
    """Groups the trained parameters by weight decay: norms and biases (one dimension) get none."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for _, parameter in parameters:
        if parameter.requires_grad:
            (decay if parameter.ndim > 1 else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


UNSUITABLE: dict[type[Optimizer], str] = {
    LBFGS: "computes the loss several times per step, and has one parameter group",
    SparseAdam: "takes sparse gradients only",
}
"""Optimizers of torch that do not train a language model, and why."""


def build(
    make: Callable[[Iterable], Optimizer],
    groups: Iterable[dict[str, Any]],
    dtype: torch.dtype,
    embeddings: Collection[int] = (),
) -> Optimizer:
    """Makes the optimizer.

    Args:
        make: `model.optimizer`.
        groups: Parameter groups.
        dtype: Dtype of the parameters.
        embeddings: `id` of the weights of embeddings and head, which Muon does not train.

    Raises:
        UserError: The optimizer does not train a language model, or refuses the parameters.
    """
    try:
        kind = type(make([nn.Parameter(torch.ones(1, 1, dtype=dtype))]))
        for unsuitable, reason in UNSUITABLE.items():
            if issubclass(kind, unsuitable):
                raise UserError(
                    f"model.optimizer {kind.__name__} {reason}: set it to another, such as"
                    " torch.optim.AdamW"
                )
        if kind is Muon:
            return MuonWithAdamW(make, groups, embeddings)
        return make(groups)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.optimizer: {error}: change its init_args, or set it to another, such as"
            " torch.optim.AdamW"
        ) from error


def use_training_weights(optimizer: Optimizer) -> None:
    """Gives the model the weights at which gradients are computed, before a step.

    Schedule-free optimizers (arXiv:2405.15682) train other weights than those that are evaluated
    and saved. They have methods `train` and `eval`, which exchange the two; other optimizers have
    none.
    """
    exchange = getattr(optimizer, "train", None)
    if exchange is not None:
        exchange()


def use_evaluation_weights(optimizer: Optimizer) -> None:
    """Gives the model the weights that are evaluated and saved, after a step."""
    exchange = getattr(optimizer, "eval", None)
    if exchange is not None:
        exchange()


def prefer_fused(optimizer: Optimizer) -> None:
    """Sets `fused` for Adam and AdamW, unless the user chose another implementation.

    The default on a CPU is a loop over parameters with a dozen passes over memory. The fused kernel
    reads and writes every number once and takes a quarter of the time.
    """
    if type(optimizer) not in (Adam, AdamW):
        return
    chosen = ("foreach", "fused", "differentiable", "capturable")
    if any(optimizer.defaults[key] for key in chosen):
        return
    optimizer.defaults["fused"] = True
    for group in optimizer.param_groups:
        group["fused"] = True


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiplies all gradients by a number, in place.

    Args:
        parameters: Parameters; some may have no gradient.
        factor: [] on any device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Private, but it is what torch's own clipping uses: one kernel for many tensors, instead of one
    # for each. Offloaded gradients are on the CPU.
    torch._foreach_mul_(gradients, factor.to(gradients[0].device, torch.float32))


def clip_by_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Returns the norm of all gradients, and scales them down if the norm exceeds `limit`.

    With sharded gradients this is a collective call, and every rank gets the whole norm.

    Args:
        parameters: Parameters; some may have no gradient.
        limit: Largest norm; infinity: no clipping.
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
    """Frees the gradients; gradients inside DDP's buffers are set to 0 instead.

    DDP's buffers stay allocated, so freeing saves nothing. With accumulation it costs memory:
    micro-batches without a reduction would allocate gradients beside the buffers. If DDP looks for
    unused parameters, gradients are freed all the same: the optimizer would update an unused
    parameter with a gradient of 0 (by momentum or weight decay).

    Args:
        optimizer: The optimizer after its step.
        model: The model as the strategy wraps it.
    """
    keep = isinstance(model, DistributedDataParallel) and model.gradient_as_bucket_view
    optimizer.zero_grad(set_to_none=not keep or bool(model.find_unused_parameters))  # type: ignore[union-attr]


def restored(optimizer: Optimizer) -> list[str]:
    """Lists settings of a resumed optimizer that keep the value of the checkpoint, in words."""
    group = optimizer.param_groups[0]
    kept = {"lr": group.get("initial_lr"), "weight_decay": group.get("weight_decay")}
    asked = {name: optimizer.defaults.get(name) for name in kept}
    lines = []
    for name, value in kept.items():
        if value not in (None, asked[name]):
            lines.append(f"{name} {value}, not {asked[name]}")
    return lines


def name_of(optimizer: Optimizer) -> str:
    """Returns class and package of an optimizer, which decide what its state means."""
    kind = type(optimizer)
    return f"{kind.__name__} of {kind.__module__.partition('.')[0]}"


def check_same(make: Callable[[Iterable], Optimizer], saved: str | None) -> None:
    """Refuses to resume with another optimizer than the checkpoint's.

    Args:
        make: `model.optimizer`.
        saved: `name_of` the optimizer in the checkpoint; None if the checkpoint does not say.

    Raises:
        UserError: The optimizers differ.
    """
    weight = nn.Parameter(torch.ones(1, 1))
    asked = name_of(build(make, [{"params": [weight]}], weight.dtype))
    if saved not in (None, asked):
        raise UserError(
            f"model.optimizer is {asked}, and the checkpoint holds the state of {saved}: set it to"
            " that, or begin another run (without --ckpt_path) from the exported weights"
        )


def bytes_per_parameter(make: Callable[[Iterable], Optimizer], dtype: torch.dtype) -> float:
    """Measures the optimizer state by one step on a small matrix.

    Args:
        make: `model.optimizer`.
        dtype: Dtype of the parameters.

    Returns:
        Bytes per parameter: 8 for Adam in fp32, about 2 for an 8-bit Adam, 0 for SGD.
    """
    parameter = nn.Parameter(torch.ones(512, 512, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = build(make, [{"params": [parameter]}], dtype)
    use_training_weights(optimizer)
    optimizer.step()
    tensors = [
        value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in tensors) / parameter.numel()


def check_weights(optimizer: Optimizer, sharded: bool, scaled: bool) -> None:
    """Refuses an optimizer that cannot train its weights.

    Args:
        optimizer: The optimizer with its weights.
        sharded: Whether the weights are sharded over ranks.
        scaled: Whether gradients are scaled for fp16.

    Raises:
        UserError: The optimizer's kernels cannot read shards; or it unscales gradients itself,
            after they were clipped; or its eps is 0 in the fp16 of the weights, so a gradient of
            0 gives NaN.
    """
    name = type(optimizer).__name__
    # Private, but torch's GradScaler and Lightning read it, and other packages set it.
    unscales_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    if scaled and unscales_itself:
        raise UserError(
            f"model.optimizer {name} with fused: true would clip gradients that are still scaled "
            "for fp16: leave fused out, or set trainer.precision to bf16-mixed"
        )
    if sharded and isinstance(optimizer, MuonWithAdamW):
        raise UserError(
            "model.optimizer Muon does not take sharded weights: set trainer.strategy to ddp or"
            " auto, or model.optimizer to torch.optim.AdamW"
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
