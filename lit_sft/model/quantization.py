"""4-bit weights of a frozen base (QLoRA, arXiv:2305.14314), through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from lit_sft.errors import UserError
from lit_sft.model.dequantize import METHODS, method_of

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

NOT_IN_4_BITS = ("mamba", "rwkv")
"""Model types whose code reads the weights of linear layers, which 4 bits do not hold as a matrix.
transformers multiplies with `dt_proj.weight` in Mamba, and rescales weights in place in RWKV.
"""


def check_source(config: PretrainedConfig, path: str, requested: str | None) -> None:
    """Refuses weights that are quantized already and not dequantized while they are loaded.

    Args:
        config: The model's config.
        path: Its directory, for the error.
        requested: `model.quantization`.

    Raises:
        UserError: The weights are quantized in another way, or `requested` does not fit them.
    """
    if requested is not None and config.model_type in NOT_IN_4_BITS:
        raise UserError(
            f"model.quantization {requested}: the code of {config.model_type} models does not work"
            " with 4-bit weights: set it to null"
        )
    method = method_of(config)
    if method is None:
        return
    if method in METHODS:
        return
    if method != "bitsandbytes":
        raise UserError(
            f"{path} holds weights that are quantized ({method}), which cannot be trained here,"
            " also not with model.quantization: set model.model_name_or_path to a version of the"
            " model in bf16"
        )
    source: Any = config.quantization_config
    if not isinstance(source, dict):
        source = source.to_dict()
    if not source.get("load_in_4bit"):
        raise UserError(
            f"{path} holds weights in 8 bits (bitsandbytes), which cannot be trained here: set"
            " model.model_name_or_path to a version of the model in bf16"
        )
    if requested is None:
        raise UserError(
            f"{path} holds weights in 4 bits (bitsandbytes): set model.quantization to nf4 and"
            " train adapters (model.lora)"
        )


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns the config of NF4 with double quantization.

    Args:
        compute_dtype: Dtype in which matrices are multiplied.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization nf4 needs bitsandbytes: `pip install bitsandbytes`, or set it to"
            " null"
        )
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    _keep_weights()
    config: BitsAndBytesConfig = make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return config


@torch.no_grad()
def quantize_loaded(lm: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Quantizes a model that is loaded already, weight by weight, where it is.

    transformers quantizes weights while it loads them, but not those that it dequantizes.

    Args:
        lm: The model. Its linear layers are replaced, except for the head.
        config: The config from `nf4`.
    """
    from bitsandbytes.nn import Params4bit
    from transformers.quantizers import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    plain = dict(lm.named_modules())
    quantizer.preprocess_model(model=lm, device_map={"": "cpu"})
    for name, module in lm.named_modules():
        before: Any = plain[name]
        if module is before:
            continue
        # The new one is on the meta device, and says how it is quantized.
        how = vars(module.weight)
        weight: Any = Params4bit(before.weight.data, requires_grad=False, **how)
        module.weight = weight.to(lm.device)
        module.bias = before.bias
        before.weight = None
    quantizer.postprocess_model(lm)
    lm.hf_quantizer = quantizer


def _keep_weights() -> None:
    """Keeps bitsandbytes from changing the weights during training.

    On a CPU with bf16 instructions, the first forward pass in evaluation mode repacks the weights
    for good, with scales rounded to bf16. Then the steps after a validation would use other weights
    than those before it, and a resumed run would differ from an uninterrupted one. Repacked weights
    also break when they are moved (bitsandbytes #2078).
    """
    from bitsandbytes.nn import modules

    modules.has_avx512bf16 = lambda: False
