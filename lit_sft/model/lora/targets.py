"""Names in `model.lora` -> modules and rows of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_sft.errors import UserError
from lit_sft.model.lora.lora_config import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def token_rows(
    model: Any, config: LoraConfig, new_token_ids: Sequence[int]
) -> dict[str, list[int]] | None:
    """Which rows of which matrix are trained: of the embedding and, where it is another matrix, of
    the head.

    A matrix that `modules_to_save` trains as a whole is left out. peft itself wraps the head where
    it is tied.
    """
    ids = sorted({*(config.trainable_token_indices or ()), *new_token_ids})
    rows = model.get_input_embeddings().weight.shape[0]
    if ids and not 0 <= ids[0] <= ids[-1] < rows:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise UserError(
            f"model.lora.trainable_token_indices: there is no token {wrong}, only 0 to {rows - 1}"
        )
    tied = model.config.get_text_config().tie_word_embeddings
    ends = (
        [model.get_input_embeddings()]
        if tied
        else [model.get_input_embeddings(), model.get_output_embeddings()]
    )
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    whole = config.modules_to_save or []
    if tied and embeddings_among(model, whole):
        return None
    found = {name: ids for name in names if not any(f".{name}".endswith(f".{w}") for w in whole)}
    return found if ids and found else None


def check_names(model: PreTrainedModel, config: LoraConfig) -> None:
    """Refuses names that fit nothing: for peft it is enough if one target of a list is found.

    Raises:
        UserError: A name is that of no module or layer, or an expression does not compile.
    """
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = getattr(config, key)
        if wanted is not None and wanted != "all-linear":
            _check_modules(model, wanted, f"model.lora.{key}")
    layers = model.config.get_text_config().num_hidden_layers
    for number in config.layers_to_transform or []:
        if not 0 <= number < layers:
            raise UserError(
                f"model.lora.layers_to_transform: there is no layer {number}, only 0 to"
                f" {layers - 1}"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            _compiled(pattern, f"model.lora.{key}")


def _check_modules(model: PreTrainedModel, wanted: str | list[str], key: str) -> None:
    """Refuses one regular expression that matches no module, or a list in which a name is that of
    no module.
    """
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    if isinstance(wanted, str):
        expression = _compiled(wanted, key)
        unknown = [] if any(expression.fullmatch(name) for name in names) else [wanted]
    else:
        unknown = [name for name in wanted if not _is_among(name, names)]
    if unknown:
        linear = {
            name.rpartition(".")[2]
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear | Conv1D)
        }
        raise UserError(
            f"{key}: no module is named {unknown[0]}; linear modules: {', '.join(sorted(linear))}"
        )


def _is_among(wanted: str, names: list[str]) -> bool:
    """Whether one of the names is the wanted one, or ends in it after a dot."""
    return any(f".{name}".endswith(f".{wanted}") for name in names)


def all_linear(model: Any) -> list[str]:
    """Names of the linear layers that text passes through, but the head: as short as they can
    be.
    """
    from transformers.pytorch_utils import Conv1D

    read = {id(module) for module in model.get_decoder().modules()}
    head = model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if module is not head]
    wanted = {name for name, m in modules if isinstance(m, nn.Linear | Conv1D) and id(m) in read}
    short = {name.rpartition(".")[2] for name in wanted}
    named = {name for name, _ in modules if name.rpartition(".")[2] in short}
    return sorted(short if named == wanted else wanted)


def embeddings_among(model: Any, wanted: str | list[str]) -> bool:
    """Whether input or output embedding are among the named modules (`all-linear` leaves both
    out).
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    if isinstance(wanted, str):
        return wanted != "all-linear" and any(re.fullmatch(wanted, name) for name in names)
    return any(_is_among(name, names) for name in wanted)


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression: {error}") from error
