import math
from functools import partial

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from lit_sft.errors import UserError
from lit_sft.training import optim
from lit_sft.training.optim import (
    ScheduleOptions,
    bytes_per_parameter,
    lr_factor,
    parameter_groups,
    prefer_fused,
)


def factors(total=10, **options):
    factor = lr_factor(ScheduleOptions(**options), total)
    return [round(factor(step), 4) for step in range(total)]


def test_linear_with_warmup_and_floor():
    assert factors(total=6, type="linear", warmup_steps=2, min_lr_ratio=0.2) == [
        0.5,
        1.0,
        1.0,
        0.8,
        0.6,
        0.4,
    ]


def test_cosine_is_half_way_in_the_middle():
    values = factors(total=8, warmup_ratio=0.0)
    assert values[0] == 1.0 and values[4] == 0.5 and values == sorted(values, reverse=True)


def test_warmup_steps_win_over_ratio():
    assert factors(type="constant", warmup_ratio=0.5)[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors(type="constant", warmup_ratio=0.5, warmup_steps=1) == [1.0] * 10


@pytest.mark.parametrize(
    "options", [{"warmup_ratio": 1.0}, {"warmup_steps": -1}, {"min_lr_ratio": 2.0}]
)
def test_bad_values_name_their_key(options):
    with pytest.raises(UserError, match=f"model.lr_schedule.{next(iter(options))}"):
        ScheduleOptions(**options)


@pytest.mark.parametrize("options", [{"warmup_steps": 0}, {"min_lr_ratio": 1.0}])
def test_the_bounds_are_good_values(options):
    assert factors(**{"warmup_ratio": 0.0, **options})[0] == 1.0


def test_the_rate_after_the_last_step_is_the_floor():
    """Also where a single step is left for the decay, and beyond the planned steps."""
    for warmup in (0, 1, 2):
        options = ScheduleOptions(type="linear", warmup_steps=warmup, min_lr_ratio=0.25)
        factor = lr_factor(options, total_steps=2)
        assert factor(5) == 0.25
        assert factor(2) == (1.0 if warmup == 2 else 0.25)


def test_the_rate_of_the_config_replaces_that_of_the_checkpoint():
    groups = [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)]
    optimizer = AdamW(groups, lr=0.5)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    for group in optimizer.param_groups:
        group["lr"] = 9.0
    assert optim.restore_lr(schedule) == (9.0, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_settings_that_the_checkpoint_decides_are_listed():
    optimizer = AdamW([nn.Parameter(torch.ones(2))], lr=0.5, weight_decay=0.1)
    group = optimizer.param_groups[0]
    # Without a schedule there is no initial_lr.
    assert optim.restored(optimizer) == []
    group["initial_lr"] = 0.5
    assert optim.restored(optimizer) == []
    group.update(initial_lr=0.25, weight_decay=0.0)
    assert optim.restored(optimizer) == ["lr 0.25, not 0.5", "weight_decay 0.0, not 0.1"]
    # An optimizer that has neither.
    bare = SGD([nn.Parameter(torch.ones(2))])
    del bare.param_groups[0]["weight_decay"]
    assert optim.restored(bare) == []


def test_another_optimizer_is_refused():
    optim.check_same(AdamW, "AdamW of torch")
    optim.check_same(AdamW, None)
    with pytest.raises(UserError, match="is AdamW of torch, and .* state of AdamW of bitsandbytes"):
        optim.check_same(AdamW, "AdamW of bitsandbytes")


def test_gradients_are_scaled_and_clipped():
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    used.grad = torch.tensor([3.0, 4.0])
    optim.scale_gradients([unused, used], torch.tensor(2.0))
    assert used.grad.tolist() == [6.0, 8.0]
    for limit in (math.inf, 20.0):
        assert optim.clip_by_norm([unused, used], limit) == 10.0
        assert used.grad.tolist() == [6.0, 8.0]
    assert optim.clip_by_norm([unused, used], 5.0) == 10.0
    assert used.grad.tolist() == pytest.approx([3.0, 4.0])


def test_no_weight_decay_for_norms_and_frozen_parameters_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    decay, no_decay = parameter_groups(model.named_parameters())
    assert [p.ndim for p in decay["params"]] == [2] and "weight_decay" not in decay
    assert [p.ndim for p in no_decay["params"]] == [1, 1, 1] and no_decay["weight_decay"] == 0.0


def test_adam_runs_as_one_kernel_unless_the_user_chose():
    parameters = [nn.Parameter(torch.ones(2))]
    for make, fused in (
        (torch.optim.AdamW, True),
        (torch.optim.Adam, True),
        (partial(torch.optim.AdamW, foreach=True), None),
        (partial(torch.optim.AdamW, differentiable=True), None),
        (torch.optim.SGD, None),
    ):
        optimizer = make(parameters)
        prefer_fused(optimizer)
        assert optimizer.param_groups[0]["fused"] == optimizer.defaults["fused"] == fused, make


def test_a_fused_optimizer_unscales_too_late_for_clipping():
    optimizer = AdamW([nn.Parameter(torch.ones(2, 2))], fused=True)
    optim.check_weights(optimizer, sharded=False, scaled=False)
    with pytest.raises(UserError, match="leave fused out, or set trainer.precision to bf16-mixed"):
        optim.check_weights(optimizer, sharded=False, scaled=True)


def test_kernels_that_cannot_read_shards_are_refused():
    weights = [nn.Parameter(torch.ones(2, 2))]
    optim.check_weights(AdamW8bit(weights), sharded=False, scaled=False)
    optim.check_weights(AdamW(weights), sharded=True, scaled=False)
    with pytest.raises(UserError, match="AdamW8bit of bitsandbytes does not take sharded weights"):
        optim.check_weights(AdamW8bit(weights), sharded=True, scaled=False)


def test_an_eps_that_is_0_in_fp16_is_refused():
    def check(make, dtype):
        weights = [nn.Parameter(torch.ones(2, 2, dtype=dtype))]
        optim.check_weights(make(weights), sharded=False, scaled=False)

    check(AdamW, torch.bfloat16)
    check(partial(AdamW, eps=optim.SMALLEST_FP16), torch.float16)
    # These kernels compute in fp32, and SGD has no eps.
    check(AdamW8bit, torch.float16)
    check(SGD, torch.float16)
    with pytest.raises(UserError, match="eps 1e-08 is 0 in the fp16"):
        check(AdamW, torch.float16)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        (torch.optim.AdamW, torch.float32, 8),
        (torch.optim.AdamW, torch.bfloat16, 4),
        (AdamW8bit, torch.float32, 2),
        (torch.optim.SGD, torch.float32, 0),
        (partial(torch.optim.SGD, momentum=0.9), torch.float32, 4),
    ],
)
def test_bytes_per_parameter(optimizer, dtype, expected):
    assert bytes_per_parameter(optimizer, dtype) == pytest.approx(expected, abs=0.05)


def check_gradients_of_ddp():
    """They stay where they are reduced, also over micro-batches that are not; what is not used has
    none.
    """
    for unused in (False, True):
        torch.manual_seed(0)
        layers = nn.ModuleDict({"used": nn.Linear(3, 3, bias=False)})
        if unused:
            layers["unused"] = nn.Linear(3, 3, bias=False)
        layers.forward = layers["used"].forward
        ddp = DistributedDataParallel(
            layers, gradient_as_bucket_view=True, find_unused_parameters=unused
        )
        optimizer = AdamW(ddp.parameters(), lr=0.1)
        weight, places, gradients = layers["used"].weight, [], []
        for _ in range(4):
            with ddp.no_sync():
                ddp(torch.ones(2, 3)).sum().backward()
            ddp(torch.ones(2, 3)).sum().backward()
            gradients.append(weight.grad.clone())
            optimizer.step()
            optim.clear_gradients(optimizer, ddp)
            places.append(None if weight.grad is None else weight.grad.data_ptr())
        assert all(torch.equal(gradient, torch.full((3, 3), 4.0)) for gradient in gradients)
        if unused:
            assert places == [None] * 4
            assert layers["unused"].weight not in optimizer.state
        else:
            assert torch.count_nonzero(weight.grad) == 0
            assert (
                len(set(places[1:])) == 1
            )  # DDP orders its buffers anew when the second step begins


def test_gradients_stay_in_the_buffers_of_ddp():
    run_ranks(check_gradients_of_ddp)


def test_gradients_are_freed():
    layer = nn.Linear(3, 3)
    layer(torch.ones(2, 3)).sum().backward()
    optim.clear_gradients(AdamW(layer.parameters()), layer)
    assert layer.weight.grad is None
