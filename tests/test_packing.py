import time

import numpy as np
import pytest

from lit_sft.data.packing import best_fit_decreasing, one_per_pack


def reference_best_fit(lengths, max_length):
    """The textbook: the longest first, each into the fullest pack with room."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= max_length]
        best = max(fitting, key=sum, default=None)
        if best is None:
            packs.append([length])
        else:
            best.append(length)
    return sorted(map(sum, packs))  # packs with the same room are interchangeable


@pytest.mark.parametrize("seed", range(5))
def test_same_packs_as_the_textbook(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, size=200)
    packs = best_fit_decreasing(lengths, 64)
    assert sorted(packs.num_tokens(lengths).tolist()) == reference_best_fit(lengths.tolist(), 64)


def test_every_example_once_and_no_pack_too_full():
    lengths = np.random.default_rng(0).integers(1, 2049, size=5000)
    packs = best_fit_decreasing(lengths, 2048)
    assert np.array_equal(np.sort(packs.examples), np.arange(5000))
    assert packs.num_tokens(lengths).max() <= 2048
    assert packs.num_tokens(lengths).sum() == lengths.sum()


def test_empty_and_single():
    assert len(best_fit_decreasing(np.array([], dtype=np.int64), 8)) == 0
    assert best_fit_decreasing(np.array([8]), 8)[0].tolist() == [0]
    assert [one_per_pack(3)[i].tolist() for i in range(3)] == [[0], [1], [2]]


def test_a_million_lengths_in_ten_seconds():
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(5.5, 0.8, 1_000_000).astype(np.int64) + 1)
    started = time.monotonic()
    packs = best_fit_decreasing(lengths, 2048)
    assert time.monotonic() - started < 10
    assert packs.num_tokens(lengths).mean() / 2048 > 0.99
