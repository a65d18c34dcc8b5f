"""Lengths -> packs: which examples share `max_length` tokens.

Letters: N examples, P packs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

ROUNDINGS = (64, 32, 16, 8, 4, 2)
"""Multiples of tokens to which `pack_examples` tries to round the lengths up, the coarsest first.
"""
MANY = 100_000
"""From this number of examples on, lengths are not rounded: nearly every example has others of
exactly its length.
"""
TOKEN_COST = 8192
"""Cost of a token outside of attention, in units of attending to one token.

Per layer a token takes about 24 D^2 operations, and 4 D for each token it attends to: 6 D of these
units. D, the hidden size, is unknown here; 8,192 fits a D of about 1,400. The value matters only
for packs with different numbers of tokens.
"""


@dataclass(frozen=True, slots=True)
class Packs:
    """P packs over N examples, stored as flat arrays.

    examples  4 0 2 | 3 1      pack 0 holds examples 4, 0 and 2; pack 1 holds 3 and 1
    bounds    0       3     5
    """

    examples: npt.NDArray[np.int64]
    """[N] indices of examples, pack by pack."""
    bounds: npt.NDArray[np.int64]
    """[P + 1] pack p holds `examples[bounds[p]:bounds[p + 1]]`."""
    sizes: npt.NDArray[np.int64] | None = None
    """[N] tokens reserved for each example, by example index: its length, rounded up. `reshuffle`
    swaps examples of the same size. None forbids swapping.
    """

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> npt.NDArray[np.int64]:
        return self.examples[self.bounds[pack] : self.bounds[pack + 1]]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which examples share a pack, in any epoch."""
        digest = hashlib.blake2b(digest_size=12)
        for array in (self.examples, self.bounds, self.sizes):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def num_tokens(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the number of tokens in each pack, [P].

        Args:
            lengths: [N] tokens per example.
        """
        ends = np.cumsum(lengths[self.examples], dtype=np.int64)
        tokens_before: npt.NDArray[np.int64] = np.concatenate([[0], ends])
        return np.diff(tokens_before[self.bounds])

    def costs(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Returns the relative time that each pack takes to compute, [P].

        An example of L tokens costs L * (L / 2 + TOKEN_COST): causal attention, and all the rest.
        `sizes` are counted instead of lengths, so the costs are the same in every epoch.

        Args:
            lengths: [N] tokens per example, used if the packs have no `sizes`.
        """
        by_example = lengths if self.sizes is None else self.sizes
        sizes = by_example[self.examples].astype(np.float64)
        if len(self) == 0:
            return sizes
        return np.add.reduceat(sizes * (sizes / 2 + TOKEN_COST), self.bounds[:-1])


def reshuffle(packs: Packs, seed: int, epoch: int) -> Packs:
    """Returns the packs of one epoch: examples of the same size swap places at random.

    The number of packs and their fill stay the same, but each epoch combines different examples in
    a pack. The result depends on (seed, epoch) only.
    """
    if packs.sizes is None:
        return packs
    # The 1 separates this stream from the one of `sampler.permutation`.
    drawn = np.random.default_rng([seed, epoch, 1]).permutation(len(packs.examples))
    # Both are sorted by size, so the k-th place gets an example of its own size. The stable sort
    # keeps the random order among examples of one size.
    places = np.argsort(packs.sizes[packs.examples], kind="stable")
    drawn_by_size = drawn[np.argsort(packs.sizes[drawn], kind="stable")]
    examples = np.empty_like(packs.examples)
    examples[places] = drawn_by_size
    return replace(packs, examples=examples)


def pack_examples(lengths: npt.NDArray[np.int64], max_length: int) -> Packs:
    """Packs the examples of a training set, so that `reshuffle` can swap many of them.

    Only examples of the same size can swap places. So lengths are rounded up, as coarsely as
    possible without an additional pack.

    Args:
        lengths: [N] tokens per example, each in 1..max_length.
        max_length: Tokens that fit into a pack.
    """
    packs = best_fit_decreasing(lengths, max_length)
    if len(lengths) >= MANY:
        return replace(packs, sizes=lengths)
    for multiple in ROUNDINGS:
        rounded_up = -(-lengths // multiple) * multiple
        sizes = np.minimum(rounded_up, max_length)
        rounded_packs = best_fit_decreasing(sizes, max_length)
        if len(rounded_packs) <= len(packs):
            return replace(rounded_packs, sizes=sizes)
    return replace(packs, sizes=lengths)


def one_per_pack(num_examples: int) -> Packs:
    """Makes every example a pack of its own (`packing: false`)."""
    examples = np.arange(num_examples, dtype=np.int64)
    bounds = np.arange(num_examples + 1, dtype=np.int64)
    return Packs(examples, bounds)


def best_fit_decreasing(lengths: npt.NDArray[np.int64], max_length: int) -> Packs:
    """Packs the examples, the longest first, each into the fullest pack that has room for it.

    Examples of the same length are placed together, and a bit set holds the free room of all packs,
    so a million lengths take seconds. Source: best-fit decreasing bin packing (Johnson 1973), as in
    "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv:2404.10830), but over the
    whole data set instead of a buffer.

    Args:
        lengths: [N] tokens per example, each in 1..max_length.
        max_length: Tokens that fit into a pack.

    Returns:
        The packs, without `sizes`. Within a pack, the longest example comes first.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= max_length)
    order = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    # Entry r lists the packs with exactly r free tokens.
    packs_with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    # Bit r is set if packs_with_room[r] is not empty.
    occupied = 0
    num_packs = 0
    sizes, counts = np.unique(-lengths, return_counts=True)
    start = 0
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        end = start + count
        while start < end:
            fitting = occupied >> size
            if fitting:
                # The lowest set bit is the smallest room that suffices.
                room = size + (fitting & -fitting).bit_length() - 1
                pack = packs_with_room[room].pop()
                if not packs_with_room[room]:
                    occupied ^= 1 << room
            else:
                room = max_length
                pack = num_packs
                num_packs += 1
            # After one placement, the same pack is the tightest fit again, so fill it up.
            take = min(room // size, end - start)
            pack_of[order[start : start + take]] = pack
            start += take
            room -= take * size
            packs_with_room[room].append(pack)
            occupied |= 1 << room
    # Sort by pack, and within a pack by the order of placement.
    placement = np.empty(len(lengths), dtype=np.int64)
    placement[order] = np.arange(len(lengths))
    examples = np.lexsort((placement, pack_of)).astype(np.int64)
    bounds = np.searchsorted(pack_of[examples], np.arange(num_packs + 1)).astype(np.int64)
    return Packs(examples, bounds)
