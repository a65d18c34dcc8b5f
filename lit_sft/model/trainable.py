"""The trained part of a model, chosen by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lit_sft.errors import UserError


def freeze_unread(model: Any) -> None:
    """Freezes what text does not pass through, a vision tower say: it gets no gradient, which DDP would wait for."""
    modules = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    read = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


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
