import numpy as np
import pytest

from lit_sft.data.packing import TOKEN_COST, Packs, one_per_pack, pack_examples
from lit_sft.data.sampler import PositionSampler, StepOrder
from lit_sft.errors import UserError


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


def test_cost_of_a_pack_is_linear_in_tokens_and_in_squares_of_examples():
    packs = Packs(np.array([2, 0, 1]), np.array([0, 1, 3]))
    assert list(packs.costs(np.array([3, 4, 10]))) == [
        50 + 10 * TOKEN_COST,
        4.5 + 8 + 7 * TOKEN_COST,
    ]
    assert len(one_per_pack(0).costs(np.array([], dtype=np.int64))) == 0


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


def test_sampler_goes_on_in_the_middle_and_then_takes_whole_epochs():
    sampler = PositionSampler(order())
    whole = list(sampler)
    assert len(sampler) == len(whole) == 19
    sampler.start = (0, 2)
    assert list(sampler) == whole[16:]
    sampler.set_epoch(1)
    assert list(sampler) == [(1, batch) for batch in range(19)]


def test_in_order_without_shuffle():
    assert order(shuffle=False).packs(0, 3, 0) == [3]
