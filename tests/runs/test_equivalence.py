"""`scripts/verify_equivalence.py` as a test: the same run, made in many ways, has the same losses,
norms and weights.

Under AdamW with clipping some of the ways only: the optimizer sees the same gradients whatever made
them.
"""

import pytest
import torch
from running import run
from verify_equivalence import (
    EPOCHS,
    LIMIT,
    VARIANTS,
    Variant,
    differences,
    fit,
    missing,
    options,
    train,
    write_rows,
)

STEPS = 3 * EPOCHS
ADAMW = (
    "accumulation of 16",
    "activation checkpointing",
    "ddp",
    "fsdp2",
    "fsdp2, resumed",
    "bf16, ddp, answers",
)
ELSEWHERE = ("ddp, resumed on one",)  # test_resume
SLOW = ("2 nodes", "resumed", "offloaded", "compile", "lora, ")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    return folder, write_rows(folder / "train.jsonl")


def start(settings, nodes):
    """As the script does it, but for ranks of one node, which are children of this process.

    The threads of a compiler do not survive a fork.
    """
    if settings["trainer.devices"] == 1 or nodes > 1 or settings.get("model.compile"):
        fit(settings, nodes)
    else:
        run("fit", options(settings), subprocesses=True)


@pytest.fixture(scope="module")
def result(place):
    """(variant, optimizer) -> what the run left, made once."""
    done = {}

    def get(name, optimizer):
        if (name, optimizer) not in done:
            root = place[0] / optimizer / name.replace(" ", "_")
            done[name, optimizer] = train(VARIANTS[name], optimizer, place[1], root, start)
        return done[name, optimizer]

    return get


def cases():
    for name, variant in VARIANTS.items():
        marks = (
            [pytest.mark.slow]
            if name.startswith(SLOW) or any(word in name for word in SLOW)
            else []
        )
        for optimizer in ("sgd", *(["adamw"] if name in ADAMW else [])):
            if name != variant.like and name not in ELSEWHERE:
                yield pytest.param(name, optimizer, marks=marks, id=f"{name}-{optimizer}")


@pytest.mark.parametrize(("name", "optimizer"), cases())
def test_the_same_run(result, name, optimizer):
    if (reason := missing(VARIANTS[name])) is not None:
        pytest.skip(reason)
    expected = result(VARIANTS[name].like, optimizer)
    assert len(expected.loss) == len(expected.grad_norm) >= 3
    off = differences(result(name, optimizer), expected)
    assert all(value <= VARIANTS[name].limit for value in off.values()), off


def test_all_kinds_of_steps_are_in_the_set(place, monkeypatch):
    """A last window that is partial, uneven rows over ranks, and a micro-batch without a target."""
    from lit_sft.data.sampler import StepOrder

    order = StepOrder(37, 16, 2, 2, seed=1, shuffle=True)
    rows = [
        [len(order.packs(0, batch, rank)) for rank in (0, 1)]
        for batch in range(order.batches_per_epoch)
    ]
    assert rows[-2:] == [[2, 2], [1, 0]]


@pytest.mark.parametrize("name", ["one process", "fsdp2"])
def test_tied_weights_stay_tied(place, result, name):
    """In the exported directory, whose weights are those of the checkpoint."""
    from transformers import AutoModelForCausalLM

    weights = result(name, "sgd").weights
    root = place[0] / "sgd" / name.replace(" ", "_")
    lm = AutoModelForCausalLM.from_pretrained(root / "lightning_logs" / "version_0" / "hf")
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    for key, tensor in lm.state_dict().items():
        assert torch.equal(tensor, weights[f"model.lm.{key}"]), key


def test_every_adapter_moves(result):
    moved = {
        name: float(tensor.abs().max()) for name, tensor in result("lora", "sgd").weights.items()
    }
    lora_b = [value for name, value in moved.items() if "lora_B" in name]
    assert len(lora_b) == 2 * 7 and min(lora_b) > 0  # layers, linear modules in each


def test_the_test_can_fail(place, result, monkeypatch):
    """Lightning's own average (a mean of means) is not the same run."""
    from lit_sft.module import SFTModule

    def mean_of_means(self, batch, batch_idx):
        output = self(batch)
        self.window[0] += output.loss_sum.detach()
        self.window[1] += output.num_targets
        return output.loss_sum / output.num_targets.clamp(min=1)

    monkeypatch.setattr(SFTModule, "training_step", mean_of_means)
    wrong = train(
        Variant({"data.micro_batch_size": 1}), "sgd", place[1], place[0] / "mean_of_means"
    )
    off = differences(wrong, result("one process", "sgd"))
    assert min(off["grad_norm"], off["weights"]) > 100 * LIMIT
