"""One data set, one seed, many ways to split the work: the same losses, gradient norms and weights.

Plain SGD without clipping shows a gradient that is wrong by a constant factor; AdamW with clipping would hide it, and
is run too. fp32 on a CPU, relative difference at most 1e-5.
"""

import pytest
import torch
from running import arguments, chat_rows, final_weights, run, scalars, write_rows
from tiny import save_tiny

SGD = {"model__optimizer": "torch.optim.SGD", "model__optimizer__lr": 0.1, "trainer__gradient_clip_val": None}
ADAMW = {"model__optimizer": "torch.optim.AdamW", "model__optimizer__lr": 1e-3, "trainer__gradient_clip_val": 0.5}
STEPS = 3
ROWS = 39  # global batches of 16, 16 and 7: the last window is partial, and leaves ranks without rows
RUNS = {
    "4x4": {"data__micro_batch_size": 4},
    "1x16": {"data__micro_batch_size": 1},
    "ddp": {"data__micro_batch_size": 2, "trainer__devices": 2, "trainer__strategy": "ddp"},
    "fsdp2": {"data__micro_batch_size": 2, "trainer__devices": 2, "trainer__strategy": "fsdp2"},
    "sdpa": {"model__attn_implementation": "sdpa"},  # with the mask that transformers makes for packs
    "gradient checkpointing": {"model__gradient_checkpointing": True},
    "selective checkpointing": {"model__gradient_checkpointing": "selective"},
    "2 workers": {"data__num_workers": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(ROWS))


@pytest.fixture(scope="module")
def reference(place):
    """Runs the whole step in one forward pass, once per optimizer."""
    done = {}

    def get(optimizer_name, optimizer):
        if optimizer_name not in done:
            done[optimizer_name] = train(place, f"reference {optimizer_name}", data__micro_batch_size=16, **optimizer)
        return done[optimizer_name]

    return get


def train(place, name, **overrides):
    """(losses, gradient norms, weights) of a run."""
    folder, model, rows = place
    root = folder / name.replace(" ", "_")
    options = {
        "data__packing": False,
        "data__global_batch_size": 16,
        "model__lr_schedule__type": "constant",
        "model__lr_schedule__warmup_ratio": 0.0,
    }
    args = arguments(model, rows, root, **{**options, **overrides})
    run("fit", args, subprocesses=overrides.get("trainer__devices", 1) > 1)
    return scalars(root, "train/loss"), scalars(root, "train/grad_norm"), final_weights(root)


def assert_same(result, expected, tolerance=1e-5):
    for name, ours, theirs in zip(("loss", "grad_norm"), result[:2], expected[:2], strict=True):
        assert len(ours) == len(theirs), name
        torch.testing.assert_close(
            torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert result[2].keys() == expected[2].keys()
    for key, weight in expected[2].items():
        difference = (result[2][key] - weight).norm() / weight.norm()
        assert difference <= tolerance, (key, float(difference))


@pytest.mark.parametrize(
    ("name", "optimizer_name"),
    # the optimizer sees the same gradients whatever made them, so AdamW is run for a few of the ways only
    [(name, "sgd") for name in RUNS] + [(name, "adamw") for name in ("4x4", "1x16", "ddp", "gradient checkpointing")],
)
def test_the_same_run(place, reference, name, optimizer_name):
    optimizer = {"sgd": SGD, "adamw": ADAMW}[optimizer_name]
    expected = reference(optimizer_name, optimizer)
    assert len(expected[0]) == STEPS
    assert_same(
        train(place, f"{name} {optimizer_name}", **{"data__micro_batch_size": 4, **RUNS[name], **optimizer}), expected
    )


def test_packs_equal_the_same_rows_unpacked(place):
    """All rows in one step, three epochs: packed into rows of 128 tokens, or each alone."""
    packed = train(
        place,
        "packed",
        data__packing=True,
        data__global_batch_size=64,
        data__micro_batch_size=2,
        trainer__max_epochs=STEPS,
        **SGD,
    )
    alone = train(
        place, "alone", data__global_batch_size=64, data__micro_batch_size=1, trainer__max_epochs=STEPS, **SGD
    )
    assert len(packed[0]) == STEPS
    assert_same(packed, alone)


def test_the_test_can_fail(place, reference, monkeypatch):
    """Lightning's own average (a mean of means) is not the same run."""
    from lit_sft.module import SFTModule

    def mean_of_means(self, batch, batch_idx):
        output = self(batch)
        self.window = self.window + torch.stack(
            [output.loss_sum.detach().double(), output.num_targets.double(), torch.tensor(1.0)]
        )
        return output.loss_sum / output.num_targets.clamp(min=1)

    monkeypatch.setattr(SFTModule, "training_step", mean_of_means)
    result = train(place, "mean of means", data__micro_batch_size=1, **SGD)
    with pytest.raises(AssertionError):
        assert_same(result, reference("sgd", SGD))
