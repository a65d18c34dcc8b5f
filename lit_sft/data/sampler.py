"""The global order: which pack is in which optimizer step, whatever the number of ranks, workers
and micro-batches.

The permutation depends on (seed, epoch) only. Optimizer step s of an epoch takes its packs [s * G,
(s + 1) * G); the ranks share that slice micro-batch by micro-batch. With G = 8, 2 ranks and
micro-batches of 2:

    slice         p0 p1 | p2 p3 | p4 p5 | p6 p7
    micro-batch     0   |   0   |   1   |   1
    rank            0   |   1   |   0   |   1

So a position is (epoch, optimizer steps done in it), and holds for any number of ranks. Ranks wait
for each other, so where costs are known the slice is sorted by them first, and each micro-batch
dealt out there and back (p0 p3 to one rank, p1 p2 to the other): what runs at the same time costs
about the same. The sum over the step is that of the slice.
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
    """The order of all packs in an epoch, [P]."""
    return np.random.default_rng([seed, epoch]).permutation(num_packs)


@dataclass(frozen=True, slots=True)
class StepOrder:
    """How P packs fall into optimizer steps, micro-batches and ranks."""

    num_packs: int
    global_batch_size: int
    """Packs per optimizer step over all ranks."""
    micro_batch_size: int
    """Packs per forward pass on one rank."""
    world_size: int
    seed: int
    shuffle: bool = True
    costs: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    """[P] of `Packs.costs`, the same in every epoch; None leaves each slice in its order."""

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
        """Micro-batches per rank in a full optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps, the last of which may be partial."""
        return -(-self.num_packs // self.global_batch_size)

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes of each rank; the same on all."""
        full, rest = divmod(self.num_packs, self.global_batch_size)
        return full * self.accumulation + -(-rest // (self.micro_batch_size * self.world_size))

    def packs(self, epoch: int, batch: int, rank: int) -> list[int]:
        """Packs of one forward pass. Empty where the last step has none left for this rank: it must
        still take part.

        Args:
            epoch: Counts from 0.
            batch: Forward pass of this rank within the epoch, from 0.
            rank: Rank, from 0.
        """
        step, micro = divmod(batch, self.accumulation)
        of_step = slice(
            step * self.global_batch_size, min((step + 1) * self.global_batch_size, self.num_packs)
        )
        if self.shuffle:
            chosen = permutation(self.num_packs, self.seed, epoch)[of_step]
        else:
            chosen = np.arange(of_step.start, of_step.stop)
        if self.costs is None:
            start = (micro * self.world_size + rank) * self.micro_batch_size
            return [int(pack) for pack in chosen[start : start + self.micro_batch_size]]
        chosen = chosen[np.argsort(-self.costs[chosen], kind="stable")]
        start = micro * self.world_size * self.micro_batch_size
        mine = []
        for row in range(self.micro_batch_size):
            # Every second round is dealt backwards.
            seat = self.world_size - 1 - rank if row % 2 else rank
            place = start + row * self.world_size + seat
            if place < len(chosen):
                mine.append(int(chosen[place]))
        return mine

    def limited_batches(self, limit: int | float | None) -> int:
        """Forward passes of each rank in an epoch that ends after `limit` of them, or after that
        share of it.
        """
        if limit is None:
            return self.batches_per_epoch
        return (
            min(self.batches_per_epoch, limit)
            if isinstance(limit, int)
            else int(self.batches_per_epoch * limit)
        )

    def between_steps(
        self, interval: int | float, batches: int, each_epoch: bool = True
    ) -> int | float:
        """When to validate, in whole optimizer steps.

        Args:
            interval: Forward passes (int), or a share of the epoch (float; 1.0 is all of it).
            batches: Forward passes of the epoch.
            each_epoch: Whether the interval is counted anew in each epoch, so that it must fit into
                one.

        Returns:
            Forward passes, or 1.0.

        Raises:
            UserError: It ends within an optimizer step, from where a run could not go on, or after
                the epoch.
        """
        if isinstance(interval, int) and each_epoch and interval > batches:
            raise UserError(
                f"trainer.val_check_interval {interval} counts forward passes, but an epoch has"
                f" {batches}: set it to at most that, or to 1.0 for the end of each epoch"
            )
        if isinstance(interval, int) and interval % self.accumulation:
            raise UserError(
                f"trainer.val_check_interval {interval} counts forward passes, {self.accumulation}"
                f" of which make an optimizer step: set it to a multiple of {self.accumulation}"
            )
        if isinstance(interval, int) or interval == 1.0:
            return interval
        return max(1, round(interval * batches / self.accumulation)) * self.accumulation

    def check_validations(self, by_clock: bool, over_epochs: bool) -> None:
        """Refuses validations that would come on one rank before the other, or, other than by the
        clock, within an optimizer step.

        Args:
            by_clock: They come after some time.
            over_epochs: They come after some forward passes, counted over all epochs.

        Raises:
            UserError: They would.
        """
        if by_clock and self.world_size > 1:
            raise UserError(
                "trainer.val_check_interval by the clock would come on each rank at another time:"
                " set it to a number of forward passes"
            )
        if over_epochs and self.batches_per_epoch % self.accumulation:
            raise UserError(
                "trainer.check_val_every_n_epoch null counts forward passes over epochs, but one"
                f" has {self.batches_per_epoch}, no multiple of the {self.accumulation} of an"
                " optimizer step: leave it out"
            )

    def batches_in_steps(self, steps: int) -> int:
        """Forward passes of a rank in the first `steps` optimizer steps of an epoch."""
        return min(steps * self.accumulation, self.batches_per_epoch)


class PositionSampler:
    """A sampler of (epoch, forward pass) that starts where a run was stopped, without replaying
    what came before.

    Lightning calls `set_epoch` before each epoch. `len` is the whole epoch, as Lightning's progress
    counters expect it.
    """

    def __init__(self, order: StepOrder) -> None:
        self.order = order
        self.epoch = 0
        self.start = (0, 0)
        """(epoch, optimizer steps done in it) to go on from."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the coming epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.batches_per_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, steps = self.start
        first = self.order.batches_in_steps(steps) if epoch == self.epoch else 0
        return ((self.epoch, batch) for batch in range(first, len(self)))
