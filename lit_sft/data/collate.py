"""Examples -> Batch: examples are laid end to end, and labels are shifted.

This is the only place where labels are shifted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lit_sft.types import IGNORE_INDEX, Batch

FILLER_LENGTH = 2
"""Tokens of a filler: the batch of a rank for which the step has no pack left. It has no target, so
it trains nothing.
"""

Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], int]
"""(input_ids [T], loss_mask [T], row) of one example, as the cache stores it."""


def collate(examples: Sequence[Tokens]) -> Batch:
    """Lays examples end to end, without padding, and shifts the labels.

    Args:
        examples: The examples of one forward pass. Without any, the batch is a filler.

    Returns:
        A batch of one row, in which `labels[t]` is the id after `input_ids[t]` (see `Batch`).
    """
    if not examples:
        zeros = np.zeros(FILLER_LENGTH)
        examples = [(zeros.astype(np.int32), zeros.astype(np.uint8), -1)]
    input_ids = np.concatenate([ids for ids, _, _ in examples]).astype(np.int64)
    loss_mask = np.concatenate([mask for _, mask, _ in examples])
    lengths = tuple(len(ids) for ids, _, _ in examples)
    # [S], the position after the last token of each example.
    ends = np.cumsum(lengths)

    # Position t predicts token t + 1, if that token is a target.
    labels = np.full_like(input_ids, IGNORE_INDEX)
    labels[:-1] = np.where(loss_mask[1:], input_ids[1:], IGNORE_INDEX)
    # The last token of an example must not predict the first token of the next one.
    labels[ends - 1] = IGNORE_INDEX

    starts = np.repeat(ends - lengths, lengths)
    position_ids = np.arange(len(input_ids)) - starts
    target_positions = np.flatnonzero(labels != IGNORE_INDEX)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        target_positions=torch.from_numpy(target_positions),
        position_ids=torch.from_numpy(position_ids)[None],
        lengths=lengths,
        rows=tuple(row for _, _, row in examples),
    )
