"""Keeps trained weights over a 16-bit base in fp32, where small updates are not rounded away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel


def train_in_fp32(model: PeftModel) -> None:
    """Casts all trained parameters of an adapted model to fp32.

    peft does so for its own matrices only, not for modules that are trained as a whole.
    """
    from peft.utils import ModulesToSaveWrapper

    lift_trained(model)
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        base_dtype = wrapper.original_module.weight.dtype
        if base_dtype != torch.float32:
            for module in wrapper.modules_to_save.values():
                _cast_inputs_and_outputs(module, base_dtype)


def lift_trained(model: nn.Module) -> None:
    """Casts the trained parameters to fp32, for example after Lightning's cast for `bf16-true`."""
    # The public `to` and `float` would cast frozen parameters, too. They are built on `_apply`,
    # which can choose tensor by tensor. FSDP2 extends it, so that its shards follow the parameters.
    model._apply(lambda tensor: tensor.float() if tensor.requires_grad else tensor)


def _cast_inputs_and_outputs(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes an fp32 module work between modules of another dtype, also without autocast."""

    def cast_inputs(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(module.weight.dtype) if x.is_floating_point() else x for x in inputs)

    module.register_forward_pre_hook(cast_inputs)
    module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
