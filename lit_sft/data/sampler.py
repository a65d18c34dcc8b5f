"""The order of the training data: which pack is in which optimizer step.

Each epoch has one permutation of the P packs. Given the packs and the global batch size, it depends
on (seed, epoch) only. Optimizer step s
takes the entries [s * G, (s + 1) * G) of it, where G is the global batch size. So the content of a
step does not depend on the number of ranks, workers or micro-batches, and a position (epoch,
optimizer steps done in it) is valid for any number of ranks.

A micro-batch is one forward pass of one rank. The ranks compute theirs together, and divide the G
packs of a step in such rounds. With G = 8, 2 ranks and
micro-batches of 2:

    packs of the step   p0 p1 | p2 p3 | p4 p5 | p6 p7
    round                 0   |   0   |   1   |   1
    rank                  0   |   1   |   0   |   1

In every round the ranks wait for the slowest one. So if costs are given, the packs of a step are
first sorted by cost, and each round is dealt in a zigzag: p0 p3 to rank 0, p1 p2 to rank
1. That makes their costs about equal, and the step still has the same packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lit_sft.errors import UserError


@lru_cache(maxsize=2)
def permutation(num_packs: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Returns the order of all packs in an epoch, [P]."""
    return np.random.default_rng([seed, epoch]).permutation(num_packs)


@dataclass(frozen=True, slots=True)
class StepOrder:
    """Assigns P packs to optimizer steps, micro-batches and ranks."""

    num_packs: int
    global_batch_size: int
    """Packs per optimizer step, over all ranks."""
    micro_batch_size: int
    """Packs per forward pass on one rank."""
    world_size: int
    """Number of ranks."""
    seed: int
    shuffle: bool = True
    """Whether each epoch has a permutation of its own. False keeps the order of the packs."""
    costs: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    """[P] from `Packs.costs`, the same in every epoch. None deals the packs in their order."""

    def __post_init__(self) -> None:
        per_pass = self.micro_batch_size * self.world_size
        if self.micro_batch_size < 1 or self.global_batch_size < 1:
            raise UserError(
                f"data.micro_batch_size {self.micro_batch_size} and data.global_batch_size"
                f" {self.global_batch_size}: set both to at least 1"
            )
        if self.global_batch_size % per_pass:
            raise UserError(
                f"data.global_batch_size {self.global_batch_size} is not divisible by"
                f" data.micro_batch_size {self.micro_batch_size} x {self.world_size} devices ="
                f" {per_pass}: set data.global_batch_size to a multiple of {per_pass}, or lower"
                " data.micro_batch_size"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in a full optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch. The last one may have fewer packs."""
        return -(-self.num_packs // self.global_batch_size)

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes of each rank in an epoch. It is the same number on all ranks."""
        full_steps, packs_left = divmod(self.num_packs, self.global_batch_size)
        packs_per_pass = self.micro_batch_size * self.world_size
        partial_step = -(-packs_left // packs_per_pass)
        return full_steps * self.accumulation + partial_step

    def packs(self, epoch: int, batch: int, rank: int) -> list[int]:
        """Returns the packs of one forward pass.

        The list is empty if the last, partial step has no pack left for this rank. The rank must
        still take part in that step, with a filler (see `collate`).

        Args:
            epoch: Number of the epoch, from 0.
            batch: Number of the forward pass of this rank within the epoch, from 0.
            rank: Rank, from 0.
        """
        step, micro_batch = divmod(batch, self.accumulation)
        packs = self._packs_of_step(epoch, step)
        if self.costs is None:
            first = (micro_batch * self.world_size + rank) * self.micro_batch_size
            places = list(range(first, first + self.micro_batch_size))
        else:
            packs = packs[np.argsort(-self.costs[packs], kind="stable")]
            places = self._zigzag_places(micro_batch, rank)
        return [int(packs[place]) for place in places if place < len(packs)]

    def _packs_of_step(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        """The packs of an optimizer step over all ranks, [G], or fewer in the last step."""
        first = step * self.global_batch_size
        end = min(first + self.global_batch_size, self.num_packs)
        if self.shuffle:
            return permutation(self.num_packs, self.seed, epoch)[first:end]
        return np.arange(first, end)

    def _zigzag_places(self, micro_batch: int, rank: int) -> list[int]:
        """Places of a rank's packs among those of a step, dealt in rounds of alternating direction.

        With 2 ranks and micro-batches of 4, rank 0 gets the places 0, 3, 4, 7 of the first
        micro-batch, and rank 1 gets 1, 2, 5, 6.
        """
        first = micro_batch * self.world_size * self.micro_batch_size
        places = []
        for dealt in range(self.micro_batch_size):
            is_backward = dealt % 2 == 1
            seat = self.world_size - 1 - rank if is_backward else rank
            places.append(first + dealt * self.world_size + seat)
        return places

    def batches_in_steps(self, steps: int) -> int:
        """Returns the forward passes of a rank in the first `steps` optimizer steps of an epoch."""
        return min(steps * self.accumulation, self.batches_per_epoch)


class PositionSampler:
    """Yields (epoch, forward pass), from the position where a run was stopped.

    Nothing before that position is replayed. Lightning calls `set_epoch` before each epoch. `len`
    counts the whole epoch, because Lightning's progress counters include the skipped part.
    """

    def __init__(self, order: StepOrder) -> None:
        self.order = order
        self.epoch = 0
        self.start = (0, 0)
        """(epoch, optimizer steps done in it) where training begins."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.batches_per_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, steps = self.start
        is_resumed = epoch == self.epoch
        first = self.order.batches_in_steps(steps) if is_resumed else 0
        return ((self.epoch, batch) for batch in range(first, len(self)))
