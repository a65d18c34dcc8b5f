"""Which parameters are trained, and whether a checkpoint fits them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lit_sft.errors import UserError


def freeze_unused(model: Any) -> None:
    """Freezes the parameters that text does not pass through, such as those of a vision tower.

    They would get no gradient, and DDP would wait for it.
    """
    used: set[int] = set()
    modules = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    for module in modules:
        if module is not None:
            used.update(id(parameter) for parameter in module.parameters())
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def set_trainable(model: nn.Module, patterns: Iterable[str]) -> None:
    """Trains the parameters whose name matches an expression, and freezes all others.

    Args:
        model: The model.
        patterns: Regular expressions, which may match anywhere in a name.

    Raises:
        UserError: An expression does not compile, or matches no parameter.
    """
    # A tied weight has several names, and each of them may be asked for.
    named = list(model.named_parameters(remove_duplicate=False))
    for _, parameter in named:
        parameter.requires_grad_(False)
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"model.trainable: {pattern!r} is no regular expression: {error}"
            ) from error
        found = [parameter for name, parameter in named if expression.search(name)]
        if not found:
            examples = ", ".join(name for name, _ in named[:: max(1, len(named) // 4)])
            raise UserError(
                f"model.trainable: {pattern!r} matches no parameter; there are names such as"
                f" {examples}"
            )
        for parameter in found:
            parameter.requires_grad_(True)


def is_frozen(model: nn.Module) -> bool:
    """Whether some parameters of the model are not trained."""
    return not all(parameter.requires_grad for parameter in model.parameters())


def trained(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a state dict that are trained. A tied weight is returned once."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in names}


def check_fits(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Compares names and shapes of saved tensors with those of the model.

    Args:
        model: The model. If a part of it is frozen, only the trained part is compared.
        saved: Tensors by parameter name.

    Raises:
        UserError: A tensor is missing on one side, or has another shape.
    """
    own = model.state_dict()
    if is_frozen(model):
        own = trained(model, own)
    remedy = "set model.* as it was in training (config.yaml beside the checkpoints)"
    strangers = sorted(own.keys() ^ saved.keys())
    if strangers:
        where = "checkpoint" if strangers[0] in saved else "model"
        raise UserError(
            f"the checkpoint does not fit the model: {strangers[0]} is in the {where} only;"
            f" {remedy}"
        )
    for name, value in saved.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"the checkpoint does not fit the model: {name} is {list(value.shape)} in the"
                f" checkpoint and {list(own[name].shape)} in the model; {remedy}"
            )
