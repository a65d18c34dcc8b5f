"""What is trained is kept in fp32, where small updates are not lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel


def train_in_fp32(model: PeftModel) -> None:
    """Lifts the trained parameters of an adapted model to fp32; peft does so for its own matrices
    only.
    """
    from peft.utils import ModulesToSaveWrapper

    lift_trained(model)
    for wrapper in model.modules():
        if (
            isinstance(wrapper, ModulesToSaveWrapper)
            and wrapper.original_module.weight.dtype != torch.float32
        ):
            for module in wrapper.modules_to_save.values():
                _cast_around(module, wrapper.original_module.weight.dtype)


def lift_trained(model: nn.Module) -> None:
    """Makes fp32 of the trained parameters that something has cast, as Lightning does with
    `bf16-true`.
    """
    # The public `to` and `float` would cast what is frozen, too. `_apply`, on which they are built,
    # chooses tensor by tensor; FSDP2 extends it, so that its shards follow the parameters.
    model._apply(lambda tensor: tensor.float() if tensor.requires_grad else tensor)


def _cast_around(module: nn.Module, dtype: torch.dtype) -> None:
    """Lets an fp32 module work between modules of another type, also without autocast."""

    def to_module(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(module.weight.dtype) if x.is_floating_point() else x for x in inputs)

    module.register_forward_pre_hook(to_module)
    module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
