"""NEFTune: noise on the embeddings in training (arXiv:2310.05914)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_sft.errors import UserError


def apply_neftune(loss: nn.Module, embedding: nn.Module, alpha: float) -> None:
    """Adds uniform noise in +- `alpha / sqrt(L * D)` to the embeddings, in training mode only.

    L is the length of the example and not of the row that it is packed into, so packing does not
    change the noise. The noise comes from torch's random state, which is seeded in each optimizer
    step, so a resumed run draws the same.

    Args:
        loss: Module whose forward gets `input_ids` and `lengths` as keyword arguments.
        embedding: The input embedding within it, [B, T] -> [B, T, D].
        alpha: Strength of the noise. 5 is the paper's usual value.

    Raises:
        UserError: `alpha` is not positive.
    """
    if not alpha > 0:
        raise UserError(
            f"model.neftune_noise_alpha is {alpha}; set a positive number, often 5, or null for no"
            " noise"
        )
    # The lengths of the batch that is in the forward pass.
    lengths: list[tuple[int, ...] | None] = [None]

    def remember(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        lengths[0] = kwargs.get("lengths")

    def add_noise(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        batch, width, size = embedded.shape
        known = lengths[0]
        if known is None or (batch == 1 and sum(known) != width):
            # Rows are not packed; or this is one example of several that are embedded one by one.
            known = (width,) * batch
        example_lengths = torch.tensor(known, dtype=torch.float32)
        if len(example_lengths) == batch:
            # Each row is one example, maybe padded.
            length = example_lengths[:, None, None]
        else:
            length = example_lengths.repeat_interleave(example_lengths.long())[None, :, None]
        noise = torch.empty(embedded.shape, dtype=torch.float32, device=embedded.device)
        noise.uniform_(-1, 1)
        strength = (alpha / (length * size).sqrt()).to(noise.device, non_blocking=True)
        return embedded + (noise * strength).to(embedded.dtype)

    loss.register_forward_pre_hook(remember, with_kwargs=True)
    embedding.register_forward_hook(add_noise)
