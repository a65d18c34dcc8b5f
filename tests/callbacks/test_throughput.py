"""Speed and cost that a run logs, and the counts behind them."""

import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from running import arguments, chat_rows, run, scalars, write_rows
from tiny import save_tiny, tiny_llama

from lit_sft import trainer
from lit_sft.cli import main as main_module
from lit_sft.training.flops import peak_flops, step_cost


def test_a_run_logs_speed_and_cost(tmp_path):
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(24))
    root = tmp_path / "run"
    run("fit", arguments(model, rows, root, data__packing=False, data__global_batch_size=8))
    speed = {
        name: scalars(root, f"train/{name}")
        for name in (
            "tokens_per_second",
            "trained_tokens_per_second",
            "mfu",
            "data_wait",
            "peak_memory_gb",
        )
    }
    assert all(len(values) == 3 for values in speed.values()), speed
    assert all(0 < part < whole for part, whole in zip(*list(speed.values())[1::-1], strict=True))
    assert all(0 < share < 1 for share in speed["mfu"] + speed["data_wait"])
    assert all(0.1 < size < 50 for size in speed["peak_memory_gb"])
    tokens = scalars(root, "train/num_tokens")
    assert tokens == sorted(tokens) and tokens[0] > 0


class Slow(Callback):
    """Takes a while between steps."""

    def on_train_start(self, trainer, pl_module):
        time.sleep(1)

    def on_validation_end(self, trainer, pl_module):
        time.sleep(1)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        time.sleep(1)


def test_what_is_no_training_does_not_count(tmp_path, monkeypatch):
    """Answers before the run, validations with what follows them, and saves."""
    add = trainer.run_callbacks
    monkeypatch.setattr(main_module, "run_callbacks", lambda *args: [*add(*args), Slow()])
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(24))
    settings = {
        "data__val_size": 4,
        "trainer__val_check_interval": 0.5,
        "checkpoint__every_n_train_steps": 1,
    }
    root = tmp_path / "run"
    run(
        "fit",
        arguments(model, rows, root, data__packing=False, data__global_batch_size=5, **settings),
    )
    num_tokens, speeds = (
        scalars(root, f"train/{name}") for name in ("num_tokens", "tokens_per_second")
    )
    tokens = [now - before for now, before in zip(num_tokens, [0, *num_tokens], strict=False)]
    seconds = [count / speed for count, speed in zip(tokens, speeds, strict=True)]
    assert len(seconds) == 4 and max(seconds) < 0.9, seconds


@pytest.mark.slow
def test_ranks_log_their_spread(tmp_path):
    model, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", chat_rows(24))
    root = tmp_path / "run"
    settings = {
        "data__packing": False,
        "data__global_batch_size": 8,
        "trainer__devices": 2,
        "trainer__strategy": "ddp",
    }
    run("fit", arguments(model, rows, root, **settings), subprocesses=True)
    least, most, wait = (
        scalars(root, f"train/{name}")
        for name in ("tokens_per_second_min", "tokens_per_second_max", "data_wait_max")
    )
    assert len(least) == len(most) == len(wait) == 3
    assert all(0 < a <= b for a, b in zip(least, most, strict=True)) and all(
        0 < share < 1 for share in wait
    )
    assert max(b / a for a, b in zip(least, most, strict=True)) > 1.001  # rows of other lengths


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
    ],
)
def test_peak_of_the_datasheet(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak_flops.cache_clear()
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    peak_flops.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_no_datasheet_by_half_of_a_name(name, monkeypatch):
    """An L40 is no L4, and a part of a device is not the device: their peaks are measured."""

    def measures(*args, **kwargs):
        raise LookupError

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "ones", measures)
    with pytest.raises(LookupError):
        peak_flops(torch.device("cuda"), torch.bfloat16)


def test_operations_are_those_of_the_products():
    """Against torch's own counter: forward and backward of plain logits, where every position has a
    target.
    """
    from torch.utils.flop_counter import FlopCounterMode

    lm = tiny_llama()
    lm.set_attn_implementation("eager")
    length = 24
    input_ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        lm(input_ids=input_ids, use_cache=False).logits.sum().backward()
    # Eager attention computes the whole square, and we count its causal half.
    cost = step_cost(lm)
    rotary = 2 * length * lm.config.head_dim // 2  # transformers 5.17 makes its angles by a product
    counted = counter.get_total_flops()
    assert cost.of(length, length, 2 * length**2) == pytest.approx(counted, abs=rotary, rel=1e-6)
    assert cost.head == 320 * 32 and cost.frozen == 0


def test_frozen_weights_cost_two_thirds():
    lm = tiny_llama()
    full = step_cost(lm).of(100, 50, 1000)
    lm.requires_grad_(False)
    frozen = step_cost(lm)
    assert frozen.trained == 0 and not frozen.head_is_trained
    assert 0.6 < frozen.of(100, 50, 1000) / full < 0.75


def test_peak_is_measured_once():
    first = peak_flops(torch.device("cpu"), torch.float32)
    assert first > 1e8 and peak_flops(torch.device("cpu"), torch.float32) == first
