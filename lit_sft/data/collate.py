"""Examples to a batch: laid end to end, labels shifted. This is the only place where labels are
shifted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lit_sft.types import IGNORE_INDEX, Batch

FILLER_LENGTH = 2
"""Tokens of the filler that a rank runs when a step has no rows left for it: it has no target, so
it trains nothing.
"""

Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], int]
"""(input_ids [T], loss_mask [T], row) of one example."""


def collate(examples: Sequence[Tokens]) -> Batch:
    """Lays examples end to end, without padding.

    Args:
        examples: Any number of (input_ids, loss_mask, row); none gives a filler without target.

    Returns:
        A batch of one row (see `Batch`).
    """
    if not examples:
        zeros = np.zeros(FILLER_LENGTH)
        examples = [(zeros.astype(np.int32), zeros.astype(np.uint8), -1)]
    lengths = tuple(len(input_ids) for input_ids, _, _ in examples)
    ends = np.cumsum(lengths)
    input_ids = np.concatenate([input_ids for input_ids, _, _ in examples]).astype(np.int64)
    loss_mask = np.concatenate([loss_mask for _, loss_mask, _ in examples])
    labels = np.full_like(input_ids, IGNORE_INDEX)
    labels[:-1] = np.where(loss_mask[1:], input_ids[1:], IGNORE_INDEX)
    # The token behind the last one belongs to another example.
    labels[ends - 1] = IGNORE_INDEX
    position_ids = np.arange(len(input_ids)) - np.repeat(ends - lengths, lengths)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        target_positions=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
        position_ids=torch.from_numpy(position_ids)[None],
        lengths=lengths,
        rows=tuple(row for _, _, row in examples),
    )
