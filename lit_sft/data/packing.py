"""Lengths to packs: which examples share a row of `max_length` tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

ROUNDINGS = (64, 32, 16, 8, 4, 2)
"""Tokens."""
MANY = 100_000
"""Examples, of which nearly all have others of their very length."""


TOKEN_COST = 8192
"""What a token costs outside of attention, in units of attending to one token: 6 times the hidden
size, which is not known here; it matters only among packs of unequal numbers of tokens.
"""


@dataclass(frozen=True, slots=True)
class Packs:
    """P packs over N examples, as two flat arrays so that memory stays linear in the number of
    examples.

    examples  4 0 2 | 3 1      pack 0 holds examples 4, 0 and 2; pack 1 holds 3 and 1
    bounds    0       3     5
    """

    examples: npt.NDArray[np.int64]
    """[N] indices of examples, pack by pack."""
    bounds: npt.NDArray[np.int64]
    """[P + 1] pack p holds `examples[bounds[p]:bounds[p + 1]]`."""
    sizes: npt.NDArray[np.int64] | None = None
    """[N] room that each example was given, at least its length: examples of one size can change
    places.
    """

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> npt.NDArray[np.int64]:
        return self.examples[self.bounds[pack] : self.bounds[pack + 1]]

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what shares a pack in any epoch."""
        digest = hashlib.blake2b(digest_size=12)
        for array in (self.examples, self.bounds, self.sizes):
            digest.update(b"" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def num_tokens(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens in each pack, [P]."""
        ends: npt.NDArray[np.int64] = np.concatenate(
            [[0], np.cumsum(lengths[self.examples], dtype=np.int64)]
        )
        return np.diff(ends[self.bounds])

    def costs(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Relative cost of computing each pack, [P]: linear in its tokens, and in the squares of
        its examples' lengths.

        The same for each `refill`, but for the rounding of sizes.
        """
        sizes = (lengths if self.sizes is None else self.sizes)[self.examples].astype(np.float64)
        return (
            np.add.reduceat(sizes * (sizes / 2 + TOKEN_COST), self.bounds[:-1])
            if len(self)
            else sizes
        )


def refill(packs: Packs, seed: int, epoch: int) -> Packs:
    """Packs of the same sizes for one epoch: the examples of each size change places at random.

    So the number of packs and their fill stay, while what is trained together changes, as it does
    without packing. Depends on (seed, epoch) only.
    """
    if packs.sizes is None:
        return packs
    order = np.random.default_rng([seed, epoch, 1]).permutation(len(packs.examples))
    places = np.argsort(packs.sizes[packs.examples], kind="stable")
    examples = np.empty_like(packs.examples)
    examples[places] = order[np.argsort(packs.sizes[order], kind="stable")]
    return replace(packs, examples=examples)


def pack_examples(lengths: npt.NDArray[np.int64], max_length: int) -> Packs:
    """Best-fit decreasing; lengths are rounded up as coarsely as that costs no pack, for `refill`
    to have a choice.

    Args:
        lengths: [N] tokens per example, each in 1..max_length.
        max_length: Tokens that fit in a pack.
    """
    packs = best_fit_decreasing(lengths, max_length)
    if len(lengths) >= MANY:
        return replace(packs, sizes=lengths)
    for step in ROUNDINGS:
        sizes = np.minimum(-(-lengths // step) * step, max_length)
        coarse = best_fit_decreasing(sizes, max_length)
        if len(coarse) <= len(packs):
            return replace(coarse, sizes=sizes)
    return replace(packs, sizes=lengths)


def one_per_pack(num_examples: int) -> Packs:
    """Every example is a pack of its own (`packing: false`)."""
    return Packs(
        np.arange(num_examples, dtype=np.int64), np.arange(num_examples + 1, dtype=np.int64)
    )


def best_fit_decreasing(lengths: npt.NDArray[np.int64], max_length: int) -> Packs:
    """Packs all examples at once, each into the fullest pack that still has room for it, the
    longest first.

    Examples of one length are placed together, and the free room of the open packs is a bit set, so
    a million lengths take seconds. Source: best-fit decreasing bin packing (Johnson 1973), as in
    "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv:2404.10830), here over
    the whole data set rather than a buffer.

    Args:
        lengths: [N] tokens per example, each in 1..max_length.
        max_length: Tokens that fit in a pack.

    Returns:
        The packs. Within a pack the examples are in the order they were placed, the longest first.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= max_length)
    order = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    # Free tokens -> packs with exactly that much room.
    packs_with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    # Bit r is set if some pack has exactly r tokens free.
    occupied = 0
    num_packs = 0
    sizes, counts = np.unique(-lengths[order], return_counts=True)
    start = 0
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        end = start + count
        while start < end:
            fitting = occupied >> size
            if fitting:
                # The lowest set bit is the tightest fit.
                room = size + (fitting & -fitting).bit_length() - 1
                pack = packs_with_room[room].pop()
                if not packs_with_room[room]:
                    occupied ^= 1 << room
            else:
                room = max_length
                pack = num_packs
                num_packs += 1
            # After one placement, the same pack is the tightest fit again.
            take = min(room // size, end - start)
            pack_of[order[start : start + take]] = pack
            start += take
            room -= take * size
            packs_with_room[room].append(pack)
            occupied |= 1 << room
    position = np.empty(len(lengths), dtype=np.int64)
    position[order] = np.arange(len(lengths))
    examples = np.lexsort((position, pack_of)).astype(np.int64)
    bounds = np.searchsorted(pack_of[examples], np.arange(num_packs + 1)).astype(np.int64)
    return Packs(examples, bounds)
