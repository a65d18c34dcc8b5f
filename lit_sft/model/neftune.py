"""Noise on the embeddings in training (NEFTune, arXiv:2310.05914): longer and better liked answers,
little data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_sft.errors import UserError


def apply_neftune(loss: nn.Module, embedding: nn.Module, alpha: float) -> None:
    """Adds uniform noise of size `alpha / sqrt(L * D)` to what the embedding returns, in training
    mode only.

    L is the length of each example and not of the row it is packed in, so packing does not change
    the noise. The noise comes from torch's random state, which is set anew in each optimizer step:
    a resumed run draws the same.

    Args:
        loss: Module whose forward is given `input_ids` and `lengths` by name.
        embedding: The input embedding within it, [B, T] -> [B, T, D].
        alpha: Strength; 5 is the paper's usual value.

    Raises:
        UserError: `alpha` is not positive.
    """
    if not alpha > 0:
        raise UserError(
            f"model.neftune_noise_alpha is {alpha}; set a positive number, often 5, or null for no"
            " noise"
        )
    lengths: list[tuple[int, ...] | None] = [None]

    def remember(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        lengths[0] = kwargs.get("lengths")

    def add_noise(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        batch, width, size = embedded.shape
        of_example = torch.tensor(lengths[0] or (width,) * batch, dtype=torch.float32)
        if len(of_example) == batch:
            # An example to a row, maybe padded.
            length = of_example[:, None, None]
        else:
            length = of_example.repeat_interleave(of_example.long())[None, :, None]
        noise = torch.empty(embedded.shape, dtype=torch.float32, device=embedded.device).uniform_(
            -1, 1
        )
        strength = (alpha / (length * size).sqrt()).to(noise.device, non_blocking=True)
        return embedded + (noise * strength).to(embedded.dtype)

    loss.register_forward_pre_hook(remember, with_kwargs=True)
    embedding.register_forward_hook(add_noise)
