"""Same seed, same configuration: the same losses and weights to the last bit, on the CPU."""

import pytest
import torch
from running import arguments, chat_rows, final_weights, run, scalars, write_rows
from tiny import save_tiny, tiny_gpt2

DDP = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__micro_batch_size": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with dropout, so that random numbers matter."""
    folder = tmp_path_factory.mktemp("determinism")
    model = save_tiny(folder / "model", tiny_gpt2(resid_pdrop=0.1, embd_pdrop=0.1))
    return folder, model, write_rows(folder / "train.jsonl", chat_rows(39))


@pytest.fixture(scope="module")
def reference(place):
    return train(place, "reference")


def train(place, name, subprocesses=False, **overrides):
    """(losses, validation losses, weights) of two epochs."""
    folder, model, rows = place
    options = {
        "trainer__max_epochs": 2,
        "data__global_batch_size": 4,
        "data__val_size": 7,
        **overrides,
    }
    args = arguments(model, rows, folder / name.replace(" ", "_"), **options)
    run("fit", args, subprocesses=subprocesses or options.get("trainer__devices", 1) > 1)
    root = folder / name.replace(" ", "_")
    return scalars(root, "train/loss"), scalars(root, "val/loss"), final_weights(root)


def same(result, expected):
    weights, others = result[2], expected[2]
    return result[:2] == expected[:2] and all(
        torch.equal(weights[name], others[name]) for name in others
    )


def test_twice(place, reference):
    """In a process of its own, so that nothing is remembered."""
    assert len(reference[0]) > 4 and len(reference[1]) == 2
    assert same(train(place, "again", subprocesses=True), reference)


def test_workers(place, reference):
    assert same(train(place, "workers", data__num_workers=2), reference)


def test_what_is_generated_in_between_changes_nothing(place, reference):
    """Answers are drawn at random here; training must not notice."""
    asked = {"data__questions": ["hi"], "model__generation__do_sample": True}
    assert same(train(place, "asked", **asked), reference)


def test_another_seed_is_another_run(place, reference):
    result = train(place, "other seed", seed_everything=2)
    assert not same(result, reference) and result[0][0] != reference[0][0]


@pytest.mark.slow
def test_two_ranks(place):
    first = train(place, "ranks", **DDP)
    assert len(first[0]) > 4
    assert same(train(place, "ranks again", **DDP), first)
    assert same(train(place, "ranks with workers", **DDP, data__num_workers=2), first)
