"""Where a resumed run goes on, and which differences in its data it refuses."""

from types import SimpleNamespace

import pytest
from terminal import log_lines

from lit_sft.checkpoint import data_position
from lit_sft.checkpoint.data_position import Position
from lit_sft.data.sampler import StepOrder
from lit_sft.errors import UserError

ORDER = StepOrder(
    num_packs=33, global_batch_size=8, micro_batch_size=2, world_size=1, seed=1, shuffle=False
)
"""Five steps in an epoch: four of 4 micro-batches, and one of a single micro-batch."""


def counters(ready):
    """As Lightning leaves them when it saves within a batch."""
    return {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}


def checkpoint(epoch, steps, in_validation=False):
    """As a run with micro-batches of 1 saves it, when Lightning counts the epoch as done."""
    batches = min(8 * steps, 33)
    fit_loop = {
        "epoch_loop.batch_progress": {
            "current": counters(batches),
            "total": counters(33 * epoch + batches),
        },
        "epoch_loop.val_loop.batch_progress": {
            "total": {"ready": 7, "processed": 6 if in_validation else 7}
        },
        "epoch_progress": {
            name: {"started": epoch + 1, "processed": epoch + 1, "completed": epoch + 1}
            for name in ("current", "total")
        },
    }
    return {
        data_position.DATA_MODULE: {"position": (epoch, steps)},
        "global_step": 5 * epoch + steps,
        "loops": {"fit_loop": fit_loop},
    }


@pytest.mark.parametrize(
    ("saved", "limit", "expected"),
    [
        ((1, 3), 1.0, (1, 3)),
        ((1, 5), 1.0, (2, 0)),
        ((1, 5, True), 1.0, (1, 5)),
        ((1, 3), 16, (1, 3)),
        ((1, 4), 16, (2, 0)),
        ((1, 4, True), 12, (1, 4)),
        ((2, 0), 1.0, (2, 0)),
    ],
)
def test_an_epoch_that_is_over_is_followed_by_the_next(saved, limit, expected):
    state = checkpoint(*saved)
    position = Position.saved_in(state, ORDER, limit)
    assert (position.epoch, position.steps) == expected
    assert position.global_step == state["global_step"]


def restored(state, limit=1.0):
    """The data module and the state of Lightning's loops after a resume."""
    datamodule = SimpleNamespace(orders={"train": ORDER}, position=None, steps_done=None)
    data_position.restore(state, SimpleNamespace(datamodule=datamodule, limit_train_batches=limit))
    loops = state["loops"]["fit_loop"]
    return datamodule, loops["epoch_loop.batch_progress"], loops["epoch_progress"]["current"]


def test_micro_batches_are_counted_anew_within_an_epoch():
    datamodule, batches, epochs = restored(checkpoint(2, 3))
    assert (datamodule.position, datamodule.steps_done) == ((2, 3), 13)
    assert batches == {"current": counters(12), "total": counters(2 * 17 + 12)}
    assert epochs == {"started": 3, "processed": 2, "completed": 2}


def test_micro_batches_are_counted_anew_after_an_epoch():
    datamodule, batches, epochs = restored(checkpoint(0, 5))
    assert (datamodule.position, datamodule.steps_done) == ((1, 0), 5)
    assert batches == {"current": counters(17), "total": counters(17)}
    # Lightning ends the epoch itself.
    assert epochs == {"started": 1, "processed": 1, "completed": 0}


def test_an_epoch_is_not_longer_than_its_limit():
    _, batches, _ = restored(checkpoint(1, 4, in_validation=True), limit=12)
    assert batches == {"current": counters(12), "total": counters(12 + 12)}


def test_epochs_are_not_counted_anew_between_two():
    _, _, epochs = restored(checkpoint(2, 0))
    assert epochs == {"started": 3, "processed": 3, "completed": 3}


# ------------------------------------------------------------------ the same data


def remembered(examples="e", packs="p", validation=None, seed=1, **settings):
    caches = {"train": SimpleNamespace(fingerprint=examples)}
    if validation:
        caches["validation"] = SimpleNamespace(fingerprint=validation)
    return data_position.remember(
        {"renderer": {"max_length": 8, "rows": "r"}, "max_length": 128, **settings},
        SimpleNamespace(packing=False, global_batch_size=8, seed=seed),
        caches,
        SimpleNamespace(fingerprint=packs),
    )


def test_settings_are_remembered_as_short_texts():
    saved = remembered(short="x" * 78, long="x" * 79)["settings"]
    assert saved["max_length"] == "128"
    assert saved["short"] == f'"{"x" * 78}"'
    assert saved["long"].startswith("#")
    assert len(saved["long"]) == 13


def test_the_same_data_is_not_refused():
    saved = remembered()
    data_position.check_same(saved, remembered())
    # The length changes no example and no pack.
    data_position.check_same(saved, remembered(max_length=64))
    # A checkpoint from before packs were remembered.
    saved.pop("packs")
    data_position.check_same(saved, remembered(packs="q"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 2}, "seed (1, now 2)"),
        ({"seed": 2, "packs": "q"}, "seed (1, now 2)"),
        ({"examples": "f", "max_length": 64}, "max_length (128, now 64)"),
        ({"examples": "f"}, "the tokens themselves, by no setting"),
        ({"packs": "q", "max_length": 64}, "max_length (128, now 64)"),
        ({"packs": "q"}, "which examples share a row, by no setting"),
    ],
)
def test_other_data_is_refused(other, said):
    with pytest.raises(UserError) as error:
        data_position.check_same(remembered(), remembered(**other))
    assert f"in another order: {said}: restore that" in str(error.value)


def test_another_split_is_refused():
    saved = remembered(rows="r")
    data_position.check_split(saved, "r")
    with pytest.raises(UserError, match="splits off other rows"):
        data_position.check_split(saved, "s")


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [("v", "w", 1), ("v", "v", 0), (None, "w", 0), ("v", None, 0)],
)
def test_another_validation_set_is_told(before, after, count):
    with log_lines() as lines:
        data_position.tell_other_validation(
            remembered(validation=before), remembered(validation=after)
        )
    assert len(lines) == count
