"""Adapters into the weights: merging, also out of a 4-bit base, and what that costs in
precision.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_sft.errors import UserError
from lit_sft.model.random_state import own_random_state

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@torch.no_grad()
def merge(
    model: PeftModel, probe_ids: Tensor | None = None, trained: Tensor | None = None
) -> PreTrainedModel:
    """Adds the adapters to the weights and returns the plain model; `model` is used up.

    The sums are made in fp32, one layer at a time, and rounded once to the type of the base. A
    4-bit base has to become bf16 first (`dequantized`): it cannot take up an update without being
    rounded to 4 bits once more.

    Args:
        model: An adapted model that is not quantized.
        probe_ids: [B, T] token ids without padding; where given, the logits before and after must
            agree up to rounding.
        trained: [B, T, V] logits of the model that was trained, where it is not `model` (see
            `dequantized`).

    Raises:
        UserError: The logits change by more than rounding explains.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    before = logits(model, probe_ids) if trained is None and probe_ids is not None else trained
    dtype = _base_dtype(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            weight: Any = module.get_base_layer().weight
            stored = weight.dtype
            weight.data = weight.data.float()
            module.merge(safe_merge=True)
            weight = module.get_base_layer().weight
            weight.data = weight.data.to(stored)
        elif isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(module.original_module.weight.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged: PreTrainedModel = model.merge_and_unload()
    if before is not None and probe_ids is not None:
        error = merge_error(before, logits(merged, probe_ids))
        limit = 1e-4 if dtype == torch.float32 else 0.1
        if not error <= limit:
            raise UserError(
                f"merging changes the logits by {error:.2g} of their size; rounding explains"
                f" {limit:g}"
            )
        log.info(
            "merged in %s: the logits differ by %.2g of their size",
            str(dtype).removeprefix("torch."),
            error,
        )
    return merged


def merge_error(before: Tensor, after: Tensor) -> float:
    """The largest difference of two [B, T, V] logits, as a share of the largest logit."""
    before, after = before.float(), after.float()
    return float((after - before).abs().max() / before.abs().max())


@torch.no_grad()
def dequantized(model: PeftModel) -> PeftModel:
    """The same adapters over the 4-bit base's values in the type they are computed in (bf16);
    `model` is used up.

    These are the weights that the adapters were trained over, and not those that were quantized.
    """
    from peft import get_peft_model

    config: Any = model.peft_config["default"]
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    dtype = _base_dtype(model)
    base: Any = model.unload()
    base.dequantize(dtype)
    for parameter in base.parameters():
        # Peft leaves what is trained whole in its place, in fp32.
        # And not buffers: rotary frequencies in bf16 are others.
        parameter.data = parameter.data.to(dtype)
    # Values that follow; other starts would change the base.
    config.init_lora_weights = True
    with own_random_state(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="You are trying to modify a model with PEFT for a second time"
        )
        again: Any = get_peft_model(base, config)
    own = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert own.keys() == trained.keys()
    for name, value in trained.items():
        own[name].data = value.to(dtype) if ".modules_to_save." in name else value
    return again  # type: ignore[no-any-return]


def _base_dtype(model: nn.Module) -> torch.dtype:
    return next(
        p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()
    )


@torch.no_grad()
def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """[B, T] -> [B, T, V]; leaves the model in evaluation mode."""
    found: Tensor = model.eval()(input_ids=input_ids, use_cache=False).logits
    return found
