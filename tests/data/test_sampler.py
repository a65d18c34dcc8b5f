import numpy as np
import pytest

from lit_sft.data.packing import one_per_pack, pack_examples
from lit_sft.data.sampler import PositionSampler, StepOrder
from lit_sft.errors import UserError
from lit_sft.intervals import check_validations, limited_batches, validation_interval


def order(num_packs=19, global_batch_size=8, micro=1, world=1, seed=0, shuffle=True, costs=None):
    return StepOrder(num_packs, global_batch_size, micro, world, seed, shuffle, costs)


def steps(o, epoch=0):
    """The packs of every optimizer step, over all ranks."""
    result = []
    for batch in range(o.batches_per_epoch):
        step = batch // o.accumulation
        if step == len(result):
            result.append([])
        result[step] += [
            pack for rank in range(o.world_size) for pack in o.packs(epoch, batch, rank)
        ]
    return [sorted(step) for step in result]


@pytest.mark.parametrize(("micro", "world"), [(1, 2), (2, 1), (2, 2), (1, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("costs", [None, np.arange(19.0) % 7])
def test_the_same_steps_for_any_split(micro, world, epoch, costs):
    assert steps(order(micro=micro, world=world, costs=costs), epoch) == steps(order(), epoch)


def packs_of_a_step(**arguments):
    """The packs of every pass of the first step on rank 0, and on rank 1."""
    o = order(num_packs=16, global_batch_size=16, world=2, shuffle=False, **arguments)
    return [[o.packs(0, batch, rank) for batch in range(o.accumulation)] for rank in range(2)]


def test_packs_of_a_step_are_dealt_in_their_order_or_in_a_zigzag_of_their_costs():
    assert packs_of_a_step(micro=4) == [
        [[0, 1, 2, 3], [8, 9, 10, 11]],
        [[4, 5, 6, 7], [12, 13, 14, 15]],
    ]
    assert packs_of_a_step(micro=4, costs=-np.arange(16.0)) == [
        [[0, 3, 4, 7], [8, 11, 12, 15]],
        [[1, 2, 5, 6], [9, 10, 13, 14]],
    ]


def test_what_runs_at_the_same_time_costs_about_the_same():
    """Ranks wait for each other in each micro-batch: the slowest counts."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 4000).astype(np.int64).clip(1, 2048)

    def waited(packs, micro, costs):
        o = order(len(packs), 64, micro, 4, costs=costs)
        work = packs.costs(lengths)
        passes = [
            [work[o.packs(0, batch, rank)].sum() for rank in range(4)]
            for batch in range(o.batches_per_epoch)
        ]
        return 4 * sum(max(one) for one in passes) / work.sum() - 1

    for packs, micro in (
        (pack_examples(lengths, 2048), 1),
        (one_per_pack(len(lengths)), 1),
        (one_per_pack(4000), 4),
    ):
        before, after = waited(packs, micro, None), waited(packs, micro, packs.costs(lengths))
        assert after < 0.25 * before, (before, after)


def test_every_pack_once_and_another_order_every_epoch():
    first, second = steps(order(), 0), steps(order(), 1)
    assert sorted(sum(first, [])) == list(range(19)) == sorted(sum(second, []))
    assert first != second
    assert [len(step) for step in first] == [8, 8, 3]


def test_every_rank_makes_the_same_number_of_passes():
    o = order(num_packs=17, micro=2, world=4)
    last = [o.packs(0, o.batches_per_epoch - 1, rank) for rank in range(4)]
    assert [len(packs) for packs in last] == [1, 0, 0, 0]  # three ranks run a filler


def test_not_divisible_says_what_to_change():
    with pytest.raises(
        UserError,
        match=(
            "data.global_batch_size 8 is not divisible by data.micro_batch_size 3 x 1 devices = 3"
        ),
    ):
        order(micro=3)


@pytest.mark.parametrize("sizes", [{"micro": 0}, {"global_batch_size": 0}], ids=str)
def test_a_batch_has_at_least_one_pack(sizes):
    assert order(micro=1, global_batch_size=1).steps_per_epoch == 19
    with pytest.raises(UserError, match="set both to at least 1"):
        order(**sizes)


def test_an_epoch_that_is_cut_short():
    o = order(num_packs=10)
    assert [limited_batches(o, limit) for limit in (None, 7, 70, 0.5)] == [10, 7, 10, 5]


@pytest.mark.parametrize(
    ("interval", "each_epoch", "expected"),
    [
        (4, True, 4),
        (32, True, 32),
        (36, False, 36),
        (0.5, True, 16),
        (0.3, True, 8),
        (0.01, True, 4),
        (1.0, True, 1.0),
    ],
)
def test_validation_comes_after_whole_steps(interval, each_epoch, expected):
    o = order(num_packs=32, global_batch_size=4)
    assert validation_interval(o, interval, 32, each_epoch) == expected


def test_validation_within_a_step_or_after_the_epoch():
    o = order(num_packs=32, global_batch_size=4)
    with pytest.raises(UserError, match="val_check_interval 6 .* set it to a multiple of 4"):
        validation_interval(o, 6, 32)
    with pytest.raises(UserError, match="val_check_interval 36 .* but an epoch has 32"):
        validation_interval(o, 36, 32)


def test_validation_by_the_clock_or_over_epochs():
    partial_step = order(num_packs=10, global_batch_size=4)
    check_validations(partial_step, by_clock=True, over_epochs=False)
    with pytest.raises(UserError, match="check_val_every_n_epoch null .* 10, no multiple of the 4"):
        check_validations(partial_step, by_clock=False, over_epochs=True)
    two_ranks = order(num_packs=8, global_batch_size=4, world=2)
    check_validations(two_ranks, by_clock=False, over_epochs=True)
    with pytest.raises(UserError, match="trainer.val_check_interval by the clock"):
        check_validations(two_ranks, by_clock=True, over_epochs=False)


def test_sampler_goes_on_in_the_middle_and_then_takes_whole_epochs():
    sampler = PositionSampler(order())
    whole = list(sampler)
    assert len(sampler) == 19
    assert whole == [(0, batch) for batch in range(19)]
    sampler.start = (0, 2)
    assert list(sampler) == whole[16:]
    sampler.set_epoch(1)
    assert list(sampler) == [(1, batch) for batch in range(19)]
