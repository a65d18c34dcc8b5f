"""Weights that were published in MXFP4 or FP8 -> plain weights, while they are loaded.

transformers has the formulas. For FP8 with one scale for each block it takes rows / scales as the
height of a block (5.24, `Fp8Dequantize`), which is wrong if the last block is not whole: 192 rows
in blocks of 128 would get blocks of 96, and 576 rows would be refused. So these are computed here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

METHODS = ("mxfp4", "fp8")
"""Formats that are dequantized, by transformers' names."""


def method_of(config: PretrainedConfig) -> str | None:
    """Returns the name of the quantization of a model's files in lower case, or None."""
    source = _quantization_of(config)
    if source is None:
        return None
    method = source.get("quant_method", "an unknown method")
    # transformers may have replaced the name by an enumeration.
    return str(getattr(method, "value", method)).rpartition(".")[2].lower()


def is_dequantized(config: PretrainedConfig) -> bool:
    """Whether the files of a model are dequantized while they are loaded."""
    return method_of(config) in METHODS


def loading_arguments(config: PretrainedConfig) -> dict[str, Any]:
    """Returns arguments of `from_pretrained` that load the files of a model as plain weights."""
    from transformers.quantizers import AutoQuantizationConfig

    if not is_dequantized(config):
        return {}
    log.info("the weights are in %s, and are dequantized while they are loaded", method_of(config))
    source = {**(_quantization_of(config) or {}), "dequantize": True}
    return {"quantization_config": AutoQuantizationConfig.from_dict(source)}


def forget_quantization(config: PretrainedConfig) -> None:
    """Removes the quantization of the files from the config of a model that is built without."""
    if is_dequantized(config):
        del config.quantization_config


@contextmanager
def whole_and_partial_blocks(path: str) -> Iterator[None]:
    """Makes transformers read blocks of FP8 by their size, in a `with` block.

    Args:
        path: The directory that is read, for errors.

    Raises:
        UserError: The scales of a weight do not fit its blocks.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    kind: Any = Fp8Dequantize
    theirs = kind._dequantize_one
    refused: list[str] = []

    def dequantize_one(
        self: Any, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        is_fp8 = quantized.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        # One scale for the whole tensor, and other formats beside FP8, are transformers'.
        if block is None or not is_fp8 or scales.numel() == 1:
            return theirs(self, quantized, scales, output_dtype)  # type: ignore[no-any-return]
        if scales.shape[-2:] != _grid(quantized, block):
            refused.append(f"{tuple(quantized.shape)} with scales {tuple(scales.shape)}")
            raise ValueError(refused[-1])
        return dequantize_blocks(quantized, scales, block, output_dtype or torch.bfloat16)

    kind._dequantize_one = dequantize_one
    try:
        yield
    except RuntimeError as error:
        # transformers collects the errors of all weights in one of its own.
        if refused:
            raise UserError(
                f"{path}: a weight {refused[0]} does not fit the blocks in FP8 that config.json"
                " names; take a version of the model in bf16"
            ) from error
        raise
    finally:
        kind._dequantize_one = theirs


def dequantize_blocks(
    quantized: Tensor, scales: Tensor, block: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Multiplies each block of a weight by its scale; the last blocks may be smaller.

    Args:
        quantized: [..., rows, columns] in FP8.
        scales: [..., row blocks, column blocks]: numbers, or exponents + 127 as uint8.
        block: Rows and columns of a block.
        dtype: Dtype of the result.

    Returns:
        [..., rows, columns].
    """
    rows, columns = quantized.shape[-2:]
    if scales.dtype == torch.uint8:
        factors = torch.exp2(scales.float() - 127)
    else:
        factors = scales.float()
    factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
    factors = factors.repeat_interleave(block[1], -1)[..., :columns]
    return (quantized.float() * factors).to(dtype)


def dequantize_left_out(file: Any, name: str, block: Sequence[int] | None) -> Tensor:
    """Reads a weight that the model does not have, as a plain one.

    Args:
        file: A safetensors file that is open.
        name: The name of the weight. Its scale is in the same file.
        block: Rows and columns of a block, from `fp8_block`.

    Returns:
        The weight as it is, or in bf16 if it is in FP8.
    """
    weight: Tensor = file.get_tensor(name)
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    scales = file.get_tensor(f"{name}_scale_inv")
    if block is None or scales.numel() == 1:
        return (weight.float() * scales.float()).bfloat16()
    return dequantize_blocks(weight, scales, block, torch.bfloat16)


def fp8_block(config: PretrainedConfig) -> Sequence[int] | None:
    """Returns rows and columns of a block of a model's FP8 weights, None if there are no blocks."""
    block: Sequence[int] | None = (_quantization_of(config) or {}).get("weight_block_size")
    return block


def _grid(weight: Tensor, block: Sequence[int]) -> tuple[int, int]:
    """Returns the number of blocks in rows and in columns."""
    rows, columns = weight.shape[-2:]
    return -(-rows // block[0]), -(-columns // block[1])


def _quantization_of(config: PretrainedConfig) -> dict[str, Any] | None:
    source: Any = getattr(config, "quantization_config", None)
    if source is None or isinstance(source, dict):
        return source
    found: dict[str, Any] = source.to_dict()
    return found
