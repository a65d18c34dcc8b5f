from functools import partial

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

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
