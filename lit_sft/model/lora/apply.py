"""Puts new adapters into a model, through peft."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lit_sft.errors import UserError
from lit_sft.model.composite import is_tied
from lit_sft.model.lora import targets
from lit_sft.model.lora.lora_config import LoraConfig
from lit_sft.model.lora.precision import train_in_fp32
from lit_sft.model.random_state import devices_of, own_random_state

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def apply_lora(
    model: PreTrainedModel, config: LoraConfig, *, new_token_ids: Sequence[int] = (), seed: int = 0
) -> PeftModel:
    """Freezes the model and puts trainable fp32 adapters into it.

    The start values depend on `seed` only, and the caller's random state is kept. Gradient
    checkpointing must be the non-reentrant variant, whose gradients reach adapters over a frozen
    embedding.

    Args:
        model: The base, which may be quantized to 4 bits.
        config: `model.lora`.
        new_token_ids: Ids whose rows in the embedding and in the head are trained, too.
        seed: Seed of the start values.

    Raises:
        UserError: The config does not fit the model.
    """
    from peft import get_peft_model

    targets.check_names(model, config)
    peft_config = _peft_config(model, config, new_token_ids)
    try:
        with own_random_state(seed, devices_of(model)), warnings.catch_warnings():
            # peft corrects this setting by itself, and warns.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            # peft does not count adapted parameters here. `_check_patterns` does.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            # What peft calls in transformers is not for users to change.
            warnings.filterwarnings("ignore", category=FutureWarning)
            adapted: Any = get_peft_model(model, peft_config)
    except ValueError as error:
        raise _refused(error) from error
    names = list(adapted.targeted_module_names)
    for parameter in adapted.base_model.targeted_parameter_names:
        names += [parameter, parameter.removesuffix(".weight")]
    _check_patterns(config, names)
    train_in_fp32(adapted)
    return adapted  # type: ignore[no-any-return]


def _peft_config(model: PreTrainedModel, config: LoraConfig, new_token_ids: Sequence[int]) -> Any:
    """`model.lora` as a config of peft, with names that fit this model."""
    from peft import LoraConfig as PeftLoraConfig

    tied = is_tied(model)
    if tied and targets.embeddings_among(model, config.target_modules):
        # The one weight would get two adapters, and merging would add both updates to it.
        raise UserError(
            "model.lora.target_modules names the embedding or the head, which share one weight in"
            " this model; put them into model.lora.modules_to_save instead"
        )
    options = asdict(config)
    del options["target_experts"]
    chosen = targets.choose(model, config)
    options["target_modules"] = chosen.modules
    options["target_parameters"] = chosen.parameters or None
    for key in ("rank_pattern", "alpha_pattern"):
        options[key] = targets.patterns(options[key], chosen)
    options["trainable_token_indices"] = targets.token_rows(model, config, new_token_ids)
    options["ensure_weight_tying"] = tied and targets.embeddings_among(
        model, config.modules_to_save or []
    )
    try:
        return PeftLoraConfig(task_type="CAUSAL_LM", **options)
    except ValueError as error:
        raise _refused(error) from error


def _check_patterns(config: LoraConfig, adapted: Sequence[str]) -> None:
    """Refuses rank and alpha patterns that match no adapted module, by peft's own rule."""
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
            raise UserError(f"model.lora: the pattern {pattern!r} is the name of no adapted module")


def _refused(error: ValueError) -> UserError:
    return UserError(f"model.lora: {str(error).splitlines()[0]}")
