import pytest

from lit_sft.data.sampling import PositionSampler, StepOrder
from lit_sft.types import UserError


def order(num_packs=19, global_batch_size=8, micro=1, world=1, seed=0, shuffle=True):
    return StepOrder(num_packs, global_batch_size, micro, world, seed, shuffle)


def steps(o, epoch=0):
    """The packs of every optimizer step, over all ranks."""
    result = []
    for batch in range(o.batches_per_epoch):
        step = batch // o.accumulation
        if step == len(result):
            result.append([])
        result[step] += [pack for rank in range(o.world_size) for pack in o.packs(epoch, batch, rank)]
    return [sorted(step) for step in result]


@pytest.mark.parametrize(("micro", "world"), [(1, 2), (2, 1), (2, 2), (1, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_same_steps_for_any_split(micro, world, epoch):
    assert steps(order(micro=micro, world=world), epoch) == steps(order(), epoch)


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
        UserError, match="data.global_batch_size 8 is not divisible by data.micro_batch_size 3 x 1 devices = 3"
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
