import time
from dataclasses import replace

import numpy as np
import pytest

from lit_sft.data import packing
from lit_sft.data.packing import (
    TOKEN_COST,
    Packs,
    best_fit_decreasing,
    one_per_pack,
    pack_examples,
    reshuffle,
)


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
def test_same_packs_as_the_textbook_and_every_example_once(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, size=200)
    packs = best_fit_decreasing(lengths, 64)
    assert np.array_equal(np.sort(packs.examples), np.arange(200))
    assert sorted(packs.num_tokens(lengths).tolist()) == reference_best_fit(lengths.tolist(), 64)


def test_empty_and_single():
    assert len(best_fit_decreasing(np.array([], dtype=np.int64), 8)) == 0
    for length in (1, 8):
        assert best_fit_decreasing(np.array([length]), 8)[0].tolist() == [0]
    assert [one_per_pack(3)[i].tolist() for i in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_no_pack_can_hold(length):
    """The loop over the examples would divide by zero, or not end."""
    with pytest.raises(AssertionError):
        best_fit_decreasing(np.array([length, 8]), 8)


def test_a_million_lengths_in_ten_seconds():
    lengths = np.minimum(
        2048, np.random.default_rng(0).lognormal(5.5, 0.8, 1_000_000).astype(np.int64) + 1
    )
    started = time.monotonic()
    packs = best_fit_decreasing(lengths, 2048)
    assert time.monotonic() - started < 10
    assert packs.num_tokens(lengths).mean() / 2048 > 0.99


@pytest.mark.parametrize(
    ("lengths", "max_length", "sizes"),
    [
        ([5, 7], 16, [8, 8]),
        ([1, 3], 6, [2, 4]),
        ([3, 5, 8], 16, [3, 5, 8]),  # any rounding would need a second pack
        ([9, 10], 10, [10, 10]),
    ],
)
def test_lengths_are_rounded_as_coarsely_as_no_pack_is_added(lengths, max_length, sizes):
    assert pack_examples(np.array(lengths), max_length).sizes.tolist() == sizes


@pytest.mark.parametrize(("many", "sizes"), [(2, [5, 7]), (3, [8, 8])])
def test_many_lengths_are_not_rounded(many, sizes, monkeypatch):
    monkeypatch.setattr(packing, "MANY", many)
    assert pack_examples(np.array([5, 7]), 16).sizes.tolist() == sizes


def test_cost_of_a_pack_is_linear_in_tokens_and_in_squares_of_examples():
    packs = Packs(np.array([2, 0, 1]), np.array([0, 1, 3]))
    lengths = np.array([3, 4, 10])
    costs = [50 + 10 * TOKEN_COST, 4.5 + 8 + 7 * TOKEN_COST]
    assert packs.costs(lengths).tolist() == costs
    rounded_up = replace(packs, sizes=lengths)
    assert rounded_up.costs(lengths - 1).tolist() == costs
    assert one_per_pack(1).costs(np.array([2])).tolist() == [2 + 2 * TOKEN_COST]
    assert one_per_pack(0).costs(np.array([], dtype=np.int64)).tolist() == []


def test_fingerprint_changes_with_all_that_decides_a_pack():
    packs = pack_examples(np.array([5, 7, 3]), 16)
    others = [
        packs,
        replace(packs, examples=packs.examples[::-1]),
        replace(packs, bounds=packs.bounds + 1),
        replace(packs, sizes=packs.sizes + 1),
        replace(packs, sizes=None),
    ]
    assert len({other.fingerprint for other in others}) == len(others)
    assert pack_examples(np.array([5, 7, 3]), 16).fingerprint == packs.fingerprint


def test_reshuffled_packs_have_the_same_sizes_and_other_contents():
    lengths = np.random.default_rng(0).integers(5, 200, 400)
    packs = pack_examples(lengths, 512)
    assert len(packs) == len(best_fit_decreasing(lengths, 512)) and (packs.sizes >= lengths).all()
    contents = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        again = reshuffle(packs, seed, epoch)
        assert sorted(again.examples) == list(range(400))
        assert again.num_tokens(lengths).max() <= 512
        assert np.array_equal(again.num_tokens(packs.sizes), packs.num_tokens(packs.sizes))
        contents.append({frozenset(again[pack].tolist()) for pack in range(len(again))})
    assert contents[0] == contents[3]
    assert all(len(contents[0] & other) < 0.1 * len(packs) for other in contents[1:3])


def test_without_packing_there_is_nothing_to_reshuffle():
    packs = one_per_pack(5)
    assert reshuffle(packs, 0, 1) is packs
