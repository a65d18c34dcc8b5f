"""4-bit base weights (QLoRA, arXiv:2305.14314), through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from lit_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with quantized scales (double quantization); matrices are multiplied in `compute_dtype`.

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
    """Forbids bitsandbytes to change the weights of a model in training.

    On CPUs with bf16 instructions the first forward pass in evaluation mode would repack them with
    scales rounded to bf16, for good: the steps after a validation would see other weights than
    those before it, and a resumed run others than the one that was stopped. Such weights also break
    when they are moved (bitsandbytes #2078).
    """
    from bitsandbytes.nn import modules

    modules.has_avx512bf16 = lambda: False
