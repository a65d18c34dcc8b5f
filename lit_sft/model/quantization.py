"""4-bit weights of a frozen base (QLoRA, arXiv:2305.14314), through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from lit_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


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


def _keep_weights() -> None:
    """Keeps bitsandbytes from changing the weights during training.

    On a CPU with bf16 instructions, the first forward pass in evaluation mode repacks the weights
    for good, with scales rounded to bf16. Then the steps after a validation would use other weights
    than those before it, and a resumed run would differ from an uninterrupted one. Repacked weights
    also break when they are moved (bitsandbytes #2078).
    """
    from bitsandbytes.nn import modules

    modules.has_avx512bf16 = lambda: False
