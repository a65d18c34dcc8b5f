"""Tensors that two ranks share: split into their pieces, joined, gathered and copied."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lit_sft.checkpoint import sharded
from lit_sft.errors import UserError

WHOLE = torch.arange(15.0).reshape(5, 3)


def tree_on(mesh):
    return {
        "rows": distribute_tensor(WHOLE, mesh, [Shard(0)]),
        "columns": distribute_tensor(WHOLE, mesh, [Shard(1)]),
        "copies": distribute_tensor(WHOLE, mesh, [Replicate()]),
        # Rank 1 holds nothing of it.
        "one_row": distribute_tensor(WHOLE[:1], mesh, [Shard(0)]),
        "plain": WHOLE,
        "step": 3,
    }


def assert_whole(tree):
    for name in ("rows", "columns", "copies", "plain"):
        assert torch.equal(tree[name], WHOLE), name
    assert torch.equal(tree["one_row"], WHOLE[:1])
    assert tree["step"] == 3


def check_split_and_join(mesh):
    tree = tree_on(mesh)
    assert sharded.is_sharded(tree)
    skeleton, pieces = sharded.split(tree)
    assert not sharded.is_sharded(skeleton)
    parts = [{}, {}]
    distributed.all_gather_object(parts, pieces)
    # What both ranks hold is written once, and nothing is written for an empty part.
    assert parts[0].keys() == {"rows", "columns", "copies", "one_row"}
    assert parts[1].keys() == {"rows", "columns"}
    assert_whole(sharded.whole(sharded.join(skeleton, parts)))


def check_gather(mesh):
    tree = tree_on(mesh)
    assert_whole(sharded.gather(tree, keep=True))
    others = sharded.gather(tree, keep=False)
    assert others["rows"] is None
    assert others["step"] == 3


def check_optimizer_state(mesh):
    parameter = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])
    stored = sharded.StoredTensor((5, 3), torch.float64, [([0, 0], WHOLE.double())])
    state = sharded.shard_like(
        parameter, {"exp_avg": stored, "step": torch.tensor(7.0), "kind": "adam"}
    )
    assert isinstance(state["exp_avg"], DTensor)
    assert state["exp_avg"].placements == parameter.placements
    assert torch.equal(state["exp_avg"].full_tensor(), WHOLE.double())
    assert not isinstance(state["step"], DTensor)
    assert state["step"] == 7
    assert state["kind"] == "adam"
    with pytest.raises(UserError, match=r"checkpoint is \[5, 2\], that of the model \[5, 3\]"):
        sharded.copy_into(parameter, WHOLE[:, :2])


def check_all():
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    check_split_and_join(mesh)
    check_gather(mesh)
    check_optimizer_state(mesh)


def test_two_ranks():
    run_ranks(check_all)


def test_a_state_of_one_process_is_not_sharded():
    assert not sharded.is_sharded({"state_dict": {"w": WHOLE}, "step": 3})
