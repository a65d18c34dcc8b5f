"""Merges adapters into the weights of their base, and measures the rounding error."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_sft.errors import UserError
from lit_sft.model.experts import has_experts
from lit_sft.model.random_state import own_random_state

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@torch.no_grad()
def merge(
    model: PeftModel, probe_ids: Tensor | None = None, trained: Tensor | None = None
) -> PreTrainedModel:
    """Adds the adapters to the weights. `model` cannot be used afterwards.

    The sums are computed in fp32, one layer at a time, and rounded once to the dtype of the base. A
    4-bit base must be dequantized first (`dequantized`), because its sum with an update would be
    rounded to 4 bits again.

    Args:
        model: An adapted model that is not quantized.
        probe_ids: [B, T] token ids without padding, on which the logits before and after merging
            are compared. None skips the comparison.
        trained: [B, T, V] logits before merging, if not those of `model` (see `dequantized`).

    Returns:
        The model without adapters.

    Raises:
        UserError: The logits change by more than rounding explains.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    before = trained
    if trained is None and probe_ids is not None:
        before = logits(model, probe_ids)
    dtype = _base_dtype(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            stored = _adapted_weight(module).dtype
            _cast_(_adapted_weight(module), torch.float32)
            module.merge(safe_merge=True)
            _cast_(_adapted_weight(module), stored)
        elif isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(module.original_module.weight.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged: PreTrainedModel = model.merge_and_unload()
    if before is not None and probe_ids is not None:
        is_routed = dtype != torch.float32 and has_experts(merged)
        _check_logits(before, logits(merged, probe_ids), dtype, is_routed)
    return merged


def _adapted_weight(layer: Any) -> nn.Parameter:
    """The weight that a layer of peft adapts: of a linear layer, or of a layer of experts."""
    from peft.tuners.lora import ParamWrapper

    if isinstance(layer, ParamWrapper):
        return layer.get_param()  # type: ignore[no-any-return]
    return layer.get_base_layer().weight  # type: ignore[no-any-return]


def _cast_(weight: nn.Parameter, dtype: torch.dtype) -> None:
    weight.data = weight.data.to(dtype)


def _check_logits(before: Tensor, after: Tensor, dtype: torch.dtype, is_routed: bool) -> None:
    """Compares the logits before and after merging in a base of some dtype.

    Args:
        before: [B, T, V].
        after: [B, T, V].
        dtype: That of the base.
        is_routed: See `merge_error`.

    Raises:
        UserError: They differ by more than rounding explains.
    """
    error = merge_error(before, after, is_routed)
    limit = 1e-4 if dtype == torch.float32 else 0.1
    # Also refuses NaN.
    if not error <= limit:
        raise UserError(
            f"merging changes the logits by {error:.2g} of their size; rounding explains {limit:g}"
        )
    log.info(
        "merged in %s: the logits differ by %.2g of their size",
        str(dtype).removeprefix("torch."),
        error,
    )


def merge_error(before: Tensor, after: Tensor, is_routed: bool = False) -> float:
    """Returns the largest difference of two [B, T, V] logits, as a share of the largest logit.

    Args:
        before: Logits.
        after: Other logits.
        is_routed: Whether rounding may send a token to another expert, which changes its logits.
            Then the largest difference of the median token is returned.
    """
    before, after = before.float(), after.float()
    by_token = (after - before).abs().amax(-1)
    difference = by_token.median() if is_routed else by_token.max()
    return float(difference / before.abs().max())


@torch.no_grad()
def dequantized(model: PeftModel) -> PeftModel:
    """Moves the adapters over the dequantized values of their 4-bit base.

    These values, and not those before quantization, are the weights that the adapters were trained
    over. They are stored in the dtype in which they were computed with (bf16). `model` cannot be
    used afterwards.
    """
    from peft import get_peft_model

    config: Any = model.peft_config["default"]
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    dtype = _base_dtype(model)
    base: Any = model.unload()
    base.dequantize(dtype)
    for parameter in base.parameters():
        # peft leaves modules that were trained as a whole in the model, in fp32. Buffers are not
        # cast: rotary frequencies would change.
        parameter.data = parameter.data.to(dtype)
    # The start values are overwritten below. Some other kinds would change the base.
    config.init_lora_weights = True
    with own_random_state(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="You are trying to modify a model with PEFT for a second time"
        )
        again: Any = get_peft_model(base, config)
    own = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert own.keys() == trained.keys()
    for name, value in trained.items():
        is_whole_module = ".modules_to_save." in name
        own[name].data = value.to(dtype) if is_whole_module else value
    return again  # type: ignore[no-any-return]


def _base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the frozen weights."""
    return next(
        p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()
    )


@torch.no_grad()
def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Token ids [B, T] -> logits [B, T, V]. Leaves the model in evaluation mode."""
    found: Tensor = model.eval()(input_ids=input_ids, use_cache=False).logits
    return found
