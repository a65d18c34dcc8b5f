"""Names in `model.lora` -> modules of the model, and rows of its embedding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lit_sft.errors import UserError
from lit_sft.model.composite import is_tied
from lit_sft.model.experts import expert_parameters, has_experts
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
    hint = ""
    if has_experts(model):
        hint = "; model.lora.target_experts adapts the experts"
    raise UserError(
        f"{key}: no module is named {unknown[0]}; linear modules: {', '.join(sorted(linear))}{hint}"
    )


def _is_among(wanted: str, names: list[str]) -> bool:
    """Whether one of the names is the wanted one, or ends in it after a dot."""
    return any(f".{name}".endswith(f".{wanted}") for name in names)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


class Targets(NamedTuple):
    """What is adapted, as peft's config says it."""

    modules: str | list[str]
    """Names of modules, or one regular expression."""
    parameters: list[str]
    """Names of parameters: of experts, and of linear layers that peft would not find by name."""


def choose(model: Any, config: LoraConfig) -> Targets:
    """Returns what is adapted.

    For some mixtures of experts (DeepSeek-V3, GLM-4 MoE), peft takes `gate_proj`, `up_proj` and
    `down_proj` for the experts of transformers 4, and adapts all experts in place of the shared
    ones and the dense layers that have these names. An expression is taken apart in the same way.
    So there, these layers are named as parameters, and expressions become names. The tensors of the
    adapter are the same.

    Raises:
        UserError: The names do not fit the model.
    """
    modules = config.target_modules
    if modules == "all-linear":
        # peft's own `all-linear` would adapt routers, which cannot be merged.
        modules = all_linear(model)
    parameters = experts(model, config) if config.target_experts else []
    if not has_experts(model):
        return Targets(modules, parameters)
    found = {name: part for name, part in model.named_modules() if _is_target(name, modules)}
    endings = {_last_part(name) for name in found}
    taken = {ending for ending in endings if _is_taken_for_experts(model, ending)}
    kept = [name for name in found if _last_part(name) not in taken]
    moved = {name: part for name, part in found.items() if _last_part(name) in taken}
    if moved:
        _check_moved(moved, kept, config)
    for name in moved:
        if not _is_left_out(name, name, config):
            parameters.append(f"{name}.weight")
    is_changed = bool(moved) or isinstance(modules, str)
    return Targets(kept if is_changed else modules, parameters)


def patterns(wanted: dict[str, int], chosen: Targets) -> dict[str, int]:
    """Returns ranks or alphas by pattern, also for linear layers that are named as parameters.

    Args:
        wanted: Ranks or alphas by name or regular expression of the module.
        chosen: What is adapted.
    """
    if not any(name.endswith(".weight") for name in chosen.parameters):
        return wanted
    return wanted | {rf"{pattern}\.weight": value for pattern, value in wanted.items()}


def _is_target(name: str, modules: str | list[str]) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(_is_among(wanted, [name]) for wanted in modules)


def _is_taken_for_experts(model: Any, ending: str) -> bool:
    """Whether peft takes the modules of a name for experts.

    Args:
        model: The causal LM.
        ending: The last part of the name.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = PeftLoraConfig(target_modules=[ending])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        # It takes `gate_proj` and `up_proj` together only.
        return True
    return ending not in (config.target_modules or ())


def _check_moved(moved: dict[str, nn.Module], kept: list[str], config: LoraConfig) -> None:
    """Refuses what adapters on parameters do not have.

    Args:
        moved: Linear layers that are adapted as parameters.
        kept: Names of the other adapted modules.
        config: `model.lora`.

    Raises:
        UserError: The config has it.
    """
    reasons = {
        f"model.lora.lora_dropout {config.lora_dropout}": config.lora_dropout > 0,
        "model.lora.use_dora": config.use_dora,
        "model.quantization": any(type(part) is not nn.Linear for part in moved.values()),
    }
    for reason, is_given in reasons.items():
        if is_given:
            others = ", ".join(sorted({_last_part(name) for name in kept}))
            raise UserError(
                f"{reason}: peft cannot adapt {min(moved)} of this model with it; leave it out, or"
                f" set model.lora.target_modules to the other layers: [{others}]"
            )


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


def experts(model: Any, config: LoraConfig) -> list[str]:
    """Returns names of the parameters of all experts that text passes through.

    The names are short (`experts.down_proj`) if that names the same parameters, and full otherwise.

    Raises:
        UserError: The model has no such experts.
    """
    in_decoder = {id(module) for module in model.get_decoder().modules()}
    wanted = []
    others = []
    for name, module in model.named_modules():
        for parameter in expert_parameters(module):
            full = f"{name}.{parameter}"
            if id(module) in in_decoder and not _is_left_out(name, full, config):
                wanted.append(full)
            else:
                others.append(full)
    if not wanted:
        raise UserError(
            f"model.lora.target_experts: {type(model).__name__} has no experts to adapt that are"
            " one parameter per layer; set it to false"
        )
    short = {".".join(name.split(".")[-2:]) for name in wanted}
    is_ambiguous = any(_is_among(name, others) for name in short)
    return sorted(wanted if is_ambiguous else short)


def _is_left_out(module: str, parameter: str, config: LoraConfig) -> bool:
    """Whether `exclude_modules` or `layers_to_transform` leaves a layer of experts out.

    Args:
        module: Full name of the layer.
        parameter: Full name of one of its parameters.
        config: `model.lora`.
    """
    if config.layers_to_transform is not None:
        number = re.search(r"\.(\d+)\.", module)
        if number is None or int(number[1]) not in config.layers_to_transform:
            return True
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, name) for name in (module, parameter))
    return any(_is_among(name, [module, parameter]) for name in excluded)


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
