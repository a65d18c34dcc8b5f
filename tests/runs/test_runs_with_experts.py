"""Runs of mixtures of experts: the loss that balances experts, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from running import arguments, chat_rows, final_weights, run, scalars, version, write_rows
from terminal import log_lines, refused
from tiny import save_tiny, tiny_qwen3_moe, tiny_tokenizer

ON_EXPERTS = {"model__lora": {"r": 4, "target_experts": True}}
SGD = {"model__optimizer": "torch.optim.SGD", "model__optimizer__lr": 0.3}
STATISTICS = ("train/expert_load_max", "train/router_entropy", "train/router_aux_loss")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    lm = tiny_qwen3_moe(router_aux_loss_coef=0.5)
    model = save_tiny(folder / "model", lm, tiny_tokenizer())
    return model, write_rows(folder / "train.jsonl", chat_rows(16))


def fit(place, root, **options):
    settings = {"data__global_batch_size": 4, "data__micro_batch_size": 4, **SGD, **options}
    several = settings.get("trainer__devices", 1) > 1
    run("fit", arguments(*place, root, **settings), subprocesses=several)
    return final_weights(root)


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """What one process and one micro-batch per step leave."""
    done = {}

    def get(**options):
        key = str(options)
        if key not in done:
            root = tmp_path_factory.mktemp("alone") / "runs"
            done[key] = root, fit(place, root, **options)
        return done[key]

    return get


def assert_same(root, weights, expected):
    expected_root, expected_weights = expected
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-6)
    for name in STATISTICS:
        found, wanted = (scalars(folder, name) for folder in (root, expected_root))
        assert len(wanted) == 2
        assert found == pytest.approx(wanted, rel=1e-5)


WAYS = {
    "ddp": {"trainer__devices": 2, "trainer__strategy": "ddp"},
    "fsdp2": {"trainer__devices": 2, "trainer__strategy": "fsdp2"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, ON_EXPERTS], ids=str)
def test_two_ranks_are_one(way, options, place, alone, tmp_path):
    settings = WAYS[way] | {"data__micro_batch_size": 2} | options
    weights = fit(place, tmp_path / "runs", **settings)
    assert_same(tmp_path / "runs", weights, alone(**options))


@pytest.mark.parametrize(
    "way",
    [
        {"model__gradient_checkpointing": True},
        {"model__gradient_checkpointing": "selective"},
        pytest.param({"model__compile": True}, marks=pytest.mark.slow),
        WAYS["fsdp2"] | {"data__micro_batch_size": 2, "model__gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_same_run(way, place, alone, tmp_path):
    weights = fit(place, tmp_path / "runs", **way)
    assert_same(tmp_path / "runs", weights, alone())


def test_the_loss_balances_experts(place, alone, tmp_path):
    root, weights = alone()
    with log_lines() as lines:
        without = fit(place, tmp_path / "runs", model__loss__router_aux_loss_coef=0)
    assert any("balances the experts is left out" in line for line in lines)
    gate = "model.lm.model.layers.0.mlp.gate.weight"
    assert (weights[gate] - without[gate]).abs().max() > 1e-3
    assert scalars(tmp_path / "runs", "train/router_aux_loss") == []
    # The token loss alone is logged as the loss.
    assert scalars(tmp_path / "runs", "train/loss")[0] == scalars(root, "train/loss")[0]
    assert scalars(root, "train/router_aux_loss")[0] > 2
    loads = scalars(root, "train/expert_load_max")
    assert all(1 <= load <= 2 for load in loads)


def test_frozen_routers_are_watched(place, tmp_path):
    fit(place, tmp_path / "runs", model__lora={"r": 4})
    assert scalars(tmp_path / "runs", "train/router_aux_loss") == []
    assert len(scalars(tmp_path / "runs", "train/router_entropy")) == 2


def test_a_coefficient_without_routers_is_refused(place, tmp_path, capsys):
    dense = save_tiny(tmp_path / "dense")
    options = {"model__loss__router_aux_loss_coef": 0.1}
    line = refused(capsys, "fit", arguments(dense, place[1], tmp_path / "runs", **options))
    assert "model.loss.router_aux_loss_coef is 0.1, but transformers has no such loss" in line
    assert not version(tmp_path / "runs").exists()
