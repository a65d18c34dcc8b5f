"""The trained part of a model: chosen by name, and compared with what a checkpoint holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lit_sft.errors import UserError


def freeze_unread(model: Any) -> None:
    """Freezes what text does not pass through, a vision tower say: it gets no gradient, which DDP
    would wait for.
    """
    modules = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    read = {
        id(parameter)
        for module in modules
        if module is not None
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


def set_trainable(model: nn.Module, patterns: Iterable[str]) -> None:
    """Trains the parameters whose name one of the regular expressions finds, and freezes all
    others.

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
    """Whether a part of the model is not trained."""
    return not all(parameter.requires_grad for parameter in model.parameters())


def trained(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state that are trained; a tied weight once."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in names}


def check_fits(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Compares names and shapes of what is saved with those of the model.

    Args:
        model: All of it was saved, or, where a part is frozen, what is trained.
        saved: Tensors by parameter name.

    Raises:
        UserError: One is in one of them only, or has another shape.
    """
    own = model.state_dict()
    if is_frozen(model):
        own = trained(model, own)
    remedy = "set model.* as it was in training (config.yaml beside the checkpoints)"
    if strangers := sorted(own.keys() ^ saved.keys()):
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
