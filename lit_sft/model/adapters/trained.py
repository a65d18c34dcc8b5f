"""The trained part of a model: chosen by name, and compared with that of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lit_sft.types import UserError


def set_trainable(model: nn.Module, patterns: Iterable[str]) -> None:
    """Trains the parameters whose name one of the regular expressions finds, and freezes all others.

    Raises:
        UserError: If an expression finds nothing or does not compile.
    """
    # A tied weight has several names, and each of them may be asked for.
    named = list(model.named_parameters(remove_duplicate=False))
    for _, parameter in named:
        parameter.requires_grad_(False)
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UserError(f"model.trainable: {pattern!r} is no regular expression: {error}") from error
        found = [parameter for name, parameter in named if expression.search(name)]
        if not found:
            examples = ", ".join(name for name, _ in named[:: max(1, len(named) // 4)])
            raise UserError(f"model.trainable: {pattern!r} matches no parameter; there are names such as {examples}")
        for parameter in found:
            parameter.requires_grad_(True)


def check_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuses trained tensors of a checkpoint that are not those of the model.

    Args:
        model: Its trained parameters are compared, by name and shape.
        state: The trained tensors of a checkpoint; without them a place would keep its start values in silence.

    Raises:
        UserError: A name or a shape differs.
    """
    own = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    if strangers := sorted(own.keys() ^ state.keys()):
        raise UserError(
            f"the checkpoint holds {len(state)} trained tensors and the model {len(own)}; {strangers[0]} is in one of "
            "them only: set model.lora and model.add_tokens as they were in training"
        )
    for name, shape in own.items():
        if shape != state[name].shape:
            raise UserError(
                f"{name} is {list(state[name].shape)} in the checkpoint and {list(shape)} in the model: set "
                "model.lora.r and model.model_name_or_path as they were in training"
            )
