"""Names in `model.lora` -> modules of the model, and rows of its embedding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_sft.errors import UserError
from lit_sft.model.composite import is_tied
from lit_sft.model.lora.lora_config import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KERNELS_READ_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types whose `out_proj` peft 0.21 refuses to adapt: kernels of Mamba read its weight past
the adapter.
"""


def token_rows(
    model: Any, config: LoraConfig, new_token_ids: Sequence[int]
) -> dict[str, list[int]] | None:
    """Returns the rows to train in the embedding, and in the head if it has a weight of its own.

    A matrix that `modules_to_save` trains as a whole is left out. If embedding and head are tied,
    peft itself wraps the head.

    Args:
        model: The causal LM.
        config: `trainable_token_indices` names tokens of the user.
        new_token_ids: Ids of tokens that were added.

    Returns:
        Token ids by name of the matrix, as peft's `trainable_token_indices` expects them. None if
        no rows are trained.

    Raises:
        UserError: There is no such token.
    """
    ids = sorted({*(config.trainable_token_indices or ()), *new_token_ids})
    if not ids:
        return None
    _check_token_ids(ids, num_rows=model.get_input_embeddings().weight.shape[0])
    tied = is_tied(model)
    trained_whole = config.modules_to_save or []
    if tied and embeddings_among(model, trained_whole):
        return None
    matrices = [model.get_input_embeddings()]
    if not tied:
        matrices.append(model.get_output_embeddings())
    rows = {}
    for name in _names_of(model, matrices):
        if not any(_is_among(whole, [name]) for whole in trained_whole):
            rows[name] = ids
    return rows or None


def _check_token_ids(ids: Sequence[int], num_rows: int) -> None:
    """Refuses ids for which the embedding has no row. The ids are sorted."""
    if 0 <= ids[0] and ids[-1] < num_rows:
        return
    wrong = ids[0] if ids[0] < 0 else ids[-1]
    raise UserError(
        f"model.lora.trainable_token_indices: there is no token {wrong}, only 0 to {num_rows - 1}"
    )


def _names_of(model: Any, wanted: Sequence[Any]) -> list[str]:
    """The names of some modules of the model, in the order of `named_modules`."""
    ids = {id(module) for module in wanted}
    return [name for name, module in model.named_modules() if id(module) in ids]


def check_names(model: PreTrainedModel, config: LoraConfig) -> None:
    """Refuses names in `model.lora` that match nothing.

    peft is content if one name of a list matches.

    Raises:
        UserError: A name matches no module, a number no layer, or an expression does not compile.
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
    """Refuses an expression that matches no module, or a list with a name that matches none.

    Args:
        model: The causal LM.
        wanted: One regular expression, or a list of names.
        key: The setting, for messages.
    """
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    if isinstance(wanted, str):
        expression = _compiled(wanted, key)
        is_found = any(expression.fullmatch(name) for name in names)
        unknown = [] if is_found else [wanted]
    else:
        unknown = [name for name in wanted if not _is_among(name, names)]
    if not unknown:
        return
    linear = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            linear.add(_last_part(name))
    raise UserError(
        f"{key}: no module is named {unknown[0]}; linear modules: {', '.join(sorted(linear))}"
    )


def _is_among(wanted: str, names: list[str]) -> bool:
    """Whether one of the names is the wanted one, or ends in it after a dot."""
    return any(f".{name}".endswith(f".{wanted}") for name in names)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def all_linear(model: Any) -> list[str]:
    """Returns names of all linear layers that text passes through and peft adapts, except the head.

    The names are short (`q_proj`) if no other module has the same short name, and full otherwise.
    """
    in_decoder = {id(module) for module in model.get_decoder().modules()}
    head = model.get_output_embeddings()
    others = []
    wanted = []
    for name, module in model.named_modules():
        if module is head:
            continue
        if _is_adaptable(model, name, module) and id(module) in in_decoder:
            wanted.append(name)
        else:
            others.append(name)
    short = {_last_part(name) for name in wanted}
    is_ambiguous = any(_last_part(name) in short for name in others)
    return sorted(wanted if is_ambiguous else short)


def _is_adaptable(model: Any, name: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer that peft can adapt."""
    from transformers.pytorch_utils import Conv1D

    if _last_part(name) == "out_proj" and model.config.model_type in KERNELS_READ_OUT_PROJ:
        return False
    # Some routers are a kind of linear layer that returns more than a product, and those of groups
    # in DeepSeek V4 multiply each group by a part of the weight.
    is_other = type(module).__name__.endswith(("Router", "GroupedLinear"))
    return isinstance(module, nn.Linear | Conv1D) and not is_other


def embeddings_among(model: Any, wanted: str | list[str]) -> bool:
    """Whether the embedding or the head is among the named modules.

    Args:
        model: The causal LM.
        wanted: `all-linear` (which excludes both), one regular expression, or a list of names.
    """
    names = _names_of(model, [model.get_input_embeddings(), model.get_output_embeddings()])
    if wanted == "all-linear":
        return False
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, name) for name in names)
    return any(_is_among(name, names) for name in wanted)


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression: {error}") from error
