"""A run that is killed goes on as if nothing had happened: the same losses and weights to the last
bit, one folder.

Runs are killed for real (SIGKILL, in a child process), at a named place of the training loop.
"""

import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from running import (
    REPOSITORY,
    START,
    arguments,
    assert_same_run,
    call_at,
    chat_rows,
    final_weights,
    rows,
    run,
    scalars,
    version,
    write_rows,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from terminal import log_lines, refused
from tiny import save_tiny, tiny_gpt2, tiny_llama

from lit_sft.checkpoint import files
from lit_sft.checkpoint import io as checkpoint_io
from lit_sft.checkpoint.find import find_last
from lit_sft.run import folder as run_folder

TWO_EPOCHS = {
    "data__packing": False,
    "data__global_batch_size": 8,  # 33 rows: 4 full steps and one of a single row, twice
    "data__val_size": 6,
    "checkpoint__every_n_train_steps": 1,
    "trainer__max_epochs": 2,
}

EIGHT_BITS = {"model__optimizer": "bitsandbytes.optim.AdamW8bit", "model__optimizer__lr": 1e-2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(39))


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The folder of a run that nobody stopped; one for each set of options."""
    done = {}

    def get(**overrides):
        key = str(sorted(overrides.items()))
        if key not in done:
            done[key] = place[0] / f"whole_{len(done)}"
            fit(place, done[key], **overrides)
        return done[key]

    return get


def fit(place, root, *more, **overrides):
    _, model, rows = place
    run("fit", [*arguments(model, rows, root, **{**TWO_EPOCHS, **overrides}), *more])


def resume(place, root, **overrides):
    """Goes on from the newest checkpoint; returns the step that it says."""
    with log_lines() as lines:
        fit(place, root, "--ckpt_path=last", **overrides)
    told = [line for line in lines if line.startswith("resumed ")]
    assert len(told) == 1 and str(version(root) / "checkpoints") in told[0], lines
    assert not version(root, 1).exists()
    return int(told[0].rpartition(" at step ")[2].removesuffix("; no step is left"))


@pytest.fixture(scope="module")
def kill(place):
    """Leaves the folder of a run that is killed when it is about to call the callbacks' `hook` for
    the nth time at a step; one run for each place and set of options that starts from nothing.
    """
    done = {}

    def get(root, hook, step, nth=1, **overrides):
        if "ckpt_path" in overrides:
            die(_run_until, place, root, hook, step, nth, overrides)
            return
        key = str((hook, step, nth, sorted(overrides.items())))
        if key not in done:
            done[key] = place[0] / f"killed_{len(done)}"
            die(_run_until, place, done[key], hook, step, nth, overrides)
        shutil.copytree(done[key], root, symlinks=True)

    return get


def die(target, *args):
    """Runs a function in a child that must be killed meanwhile."""
    process = multiprocessing.get_context(START).Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"it ended with {process.exitcode}: {args[1:]}"


def _run_until(place, root, hook, step, nth, overrides):
    call_at(hook, step, nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fit(place, root, **overrides)


def saved(root):
    return {path.name: path for path in (version(root) / "checkpoints").iterdir()}


# ------------------------------------------------------------------ bit for bit

PLACES = {
    "within a window": ("on_train_batch_start", 3, 5, 3),
    "in the validation": ("on_validation_batch_end", 5, 3, 4),
    "before the epoch ends": ("on_train_epoch_end", 5, 1, 4),
    "between two epochs": ("on_train_epoch_start", 5, 1, 5),
    "in the second epoch": ("on_train_batch_start", 7, 2, 7),
    "after the last step": ("on_train_end", 10, 1, 10),
}


@pytest.mark.parametrize(("hook", "step", "nth", "from_step"), PLACES.values(), ids=PLACES)
def test_killed(hook, step, nth, from_step, place, uninterrupted, tmp_path, kill):
    root = tmp_path / "runs"
    kill(root, hook, step, nth)
    assert resume(place, root) == from_step
    assert_same_run(root, uninterrupted())


def test_killed_twice(place, uninterrupted, tmp_path, kill):
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", 2)
    kill(root, "on_train_batch_start", 6, ckpt_path="last")
    assert resume(place, root) == 6
    assert_same_run(root, uninterrupted())


def test_killed_in_the_final_export(place, uninterrupted, tmp_path):
    """There is no step left; `hf/` is written all the same, and what the export left half-way is
    gone.
    """
    root = tmp_path / "runs"
    die(_run_until_exported, place, root)
    assert not (version(root) / "hf").exists() and list(
        version(root).glob(".hf.*/new/model.safetensors")
    )
    assert resume(place, root) == 10
    assert_same_run(root, uninterrupted())
    assert_same_export(root, uninterrupted())


def _run_until_exported(place, root):
    rename = os.rename

    def renamed(source, target):
        if str(target).endswith("/hf"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = renamed
    fit(place, root)


def assert_same_export(root, expected):
    found, whole = (
        {p.name: p.read_bytes() for p in (version(r) / "hf").iterdir()} for r in (root, expected)
    )
    assert found == whole
    assert not list(version(root).glob(".hf.*"))


@pytest.mark.slow
def test_shards_are_exported_where_no_step_is_left(place, left_alone, tmp_path):
    root = tmp_path / "runs"
    left_alone(root, **FSDP2)
    shutil.copytree(root, tmp_path / "whole", symlinks=True)
    shutil.rmtree(version(root) / "hf")
    run(
        "fit",
        [*arguments(*place[1:], root, **{**TWO_EPOCHS, **FSDP2}), "--ckpt_path=last"],
        subprocesses=True,
    )
    assert_same_export(root, tmp_path / "whole")


WITHIN = {"trainer__val_check_interval": 16}  # after steps 2 and 4 of each epoch


@pytest.mark.parametrize(
    "hook", ["on_validation_start", "on_validation_end", "on_train_batch_start"]
)
def test_killed_around_a_validation_within_the_epoch(hook, place, uninterrupted, tmp_path, kill):
    """The validation is neither left out nor done twice, and the best score so far is
    remembered.
    """
    root = tmp_path / "runs"
    kill(root, hook, 2, **WITHIN)
    resume(place, root, **WITHIN)
    assert_same_run(root, uninterrupted(**WITHIN))
    assert os.readlink(saved(root)["best.ckpt"]) == os.readlink(
        saved(uninterrupted(**WITHIN))["best.ckpt"]
    )


def test_validation_comes_between_two_steps(place, uninterrupted, tmp_path, capsys):
    """Lightning counts forward passes: a share of the epoch is rounded, a wrong number is
    refused.
    """
    assert rows(uninterrupted(trainer__val_check_interval=0.4)) == rows(uninterrupted(**WITHIN))
    args = arguments(*place[1:], tmp_path / "runs", **TWO_EPOCHS, trainer__val_check_interval=12)
    assert "trainer.val_check_interval 12" in refused(capsys, "fit", args)
    args = arguments(*place[1:], tmp_path / "runs", **TWO_EPOCHS, trainer__val_check_interval=80)
    assert "trainer.val_check_interval 80 counts forward passes, but an epoch has 33" in refused(
        capsys, "fit", args
    )


def test_validation_by_the_clock(place, tmp_path):
    """It may come within an optimizer step; what is due is saved after the step."""
    root = tmp_path / "runs"
    fit(
        place,
        root,
        trainer__val_check_interval="00:00:00:00",
        trainer__check_val_every_n_epoch=None,
    )
    assert len(scalars(root, "val/loss")) > 2 and len(scalars(root, "train/loss")) == 10
    assert os.readlink(saved(root)["last.ckpt"]) == "step=000010.ckpt"


@pytest.mark.parametrize(("step", "limit"), [(2, 16), (2, 12), (3, 12)])
def test_limited_batches(step, limit, place, uninterrupted, tmp_path, kill):
    """An epoch that `limit_train_batches` ends early, also within a window, is followed by the next
    one.
    """
    root, options = tmp_path / "runs", {"trainer__limit_train_batches": limit}
    kill(root, "on_train_batch_start", step, **options)
    assert resume(place, root, **options) == step
    assert len(rows(uninterrupted(**options))) == 6  # two epochs of two steps and a validation
    assert_same_run(root, uninterrupted(**options))


@pytest.mark.parametrize("step", [4, 5, 6])
def test_max_steps(step, place, uninterrupted, tmp_path, kill):
    root, options = tmp_path / "runs", {"trainer__max_steps": 7}
    kill(root, "on_train_batch_start", step, **options)
    assert resume(place, root, **options) == step
    assert len(scalars(uninterrupted(**options), "train/loss")) == 7
    assert_same_run(root, uninterrupted(**options))


@pytest.mark.parametrize("steps", [3, 7])
def test_more_steps(steps, place, uninterrupted, tmp_path):
    """A run that `max_steps` ended within an epoch goes on with it."""
    root, constant = (
        tmp_path / "runs",
        {"model__lr_schedule__type": "constant", "model__lr_schedule__warmup_steps": 0},
    )
    fit(place, root, trainer__max_steps=steps, **constant)
    assert resume(place, root, trainer__max_steps=10, **constant) == steps
    assert scalars(root, "train/loss") == scalars(uninterrupted(**constant), "train/loss")


def test_one_more_epoch(place, uninterrupted, tmp_path):
    """A run that ended goes on when it is given more epochs."""
    root, constant = tmp_path / "runs", {"model__lr_schedule__type": "constant"}
    fit(place, root, **constant, trainer__max_epochs=1)
    assert resume(place, root, **constant) == 5
    assert_same_run(root, uninterrupted(**constant))


def test_the_schedule_of_more_epochs(place, uninterrupted, tmp_path, kill):
    """From the first step on, which had the rate 0 at which the shorter schedule ended; it is
    said.
    """
    root = tmp_path / "runs"
    fit(place, root, trainer__max_epochs=1)
    with log_lines() as lines:
        fit(place, root, "--ckpt_path=last")
    assert scalars(root, "train/lr")[5:] == scalars(uninterrupted(), "train/lr")[5:]
    (line,) = [line for line in lines if line.startswith("model.lr_schedule")]
    assert "over 10 steps in all (5 in the checkpoint): the next rate is 4.695e-05, not 0" in line
    shutil.rmtree(root)
    kill(root, "on_train_batch_start", 3)
    with log_lines() as lines:
        fit(place, root, "--ckpt_path=last")
    assert not [line for line in lines if line.startswith("model.lr_schedule")]


@pytest.mark.parametrize(
    ("step", "options", "steps"),
    [
        (5, {"trainer__limit_train_batches": 16}, 11),  # 3 epochs of 2 steps are left
        (3, {"trainer__limit_train_batches": 16}, 9),  # and 3 more
        (2, {"trainer__limit_train_batches": 16}, 8),
        (5, {"data__max_samples": 14, "resume__allow_other_data": True}, 8),
        (5, {"trainer__limit_train_batches": 16, "trainer__max_steps": 8}, 8),
    ],
)
def test_shorter_epochs_after_a_resume(step, options, steps, place, tmp_path, kill):
    """The schedule and the lines of the log end where the run does."""
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", step, trainer__max_epochs=4, checkpoint__keep_last=9)
    with log_lines() as lines:
        fit(place, root, "--ckpt_path=last", **{"trainer__max_epochs": 4, **options})
    rates = scalars(root, "train/lr")
    assert len(rates) == steps and 0 < rates[-1] < 0.1 * rates[0]
    assert any(line.startswith(f"step {steps} of {steps}: ") for line in lines)
    assert any(f"over {steps} steps in all (20 in the checkpoint)" in line for line in lines)


@pytest.mark.parametrize("why", ["early stopping", "a callback"])
def test_logged_steps_after_a_stop_within_the_epoch(why, place, uninterrupted, tmp_path):
    root, options = (
        tmp_path / "runs",
        {"model__lr_schedule__type": "constant", **WITHIN, "model__optimizer__lr": 0.3},
    )
    early, on = {"early_stopping": {"patience": 1}}, {"early_stopping": {"patience": 9}}
    if why == "a callback":
        early, on = (
            {
                "trainer__callbacks": [
                    {"class_path": "test_resume.StopAtStep", "init_args": {"step": 3}}
                ]
            },
            {},
        )
    fit(place, root, **options, **early)
    assert 2 < len(scalars(root, "train/loss")) < 5
    resume(place, root, **options, **on)
    assert [row["step"] for row in rows(root) if "train/loss" in row] == list(range(10))
    assert scalars(root, "train/loss") == scalars(uninterrupted(**options), "train/loss")


@pytest.mark.parametrize("patience", [0, 1])
def test_early_stopping_is_not_forgotten(patience, place, tmp_path, kill):
    """A run that it ended, killed in its final export, has no step left; with more patience it
    has.
    """
    root, options = tmp_path / "runs", {"model__optimizer__lr": 0.3, **WITHIN}
    kill(root, "on_train_end", 4, **options, early_stopping={"patience": patience})
    with log_lines() as lines:
        fit(place, root, "--ckpt_path=last", **options, early_stopping={"patience": patience})
    assert "stopped at step 4 of 10: val/loss did not improve for 1 validation" in lines
    assert (
        len(scalars(root, "train/loss")) == 4
        and (version(root) / "hf" / "model.safetensors").is_file()
    )
    assert resume(place, root, **options, early_stopping={"patience": 9}) == 4
    assert len(scalars(root, "train/loss")) == 10


class StopAtStep(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize("step", [3, 6])
def test_validations_over_epochs_after_another_accumulation(step, place, tmp_path, kill):
    """Lightning counts the forward passes of all epochs: those of earlier ones, too, are taken as
    they would be now.
    """
    every = {
        "trainer__check_val_every_n_epoch": None,
        "data__max_samples": 38,
        "trainer__max_epochs": 3,
    }
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", step, nth=2, **every, trainer__val_check_interval=24)
    resume(place, root, **every, trainer__val_check_interval=12, data__micro_batch_size=2)
    assert [row["step"] for row in rows(root) if "val/loss" in row] == [2, 5, 8, 11]


SLOW = [
    pytest.param(what, marks=pytest.mark.slow) for what in ("lora dropout", "packing", "workers")
]


@pytest.mark.parametrize("what", ["dropout", "in the background", "8-bit optimizer", *SLOW])
def test_kinds_of_runs(what, place, uninterrupted, tmp_path, kill):
    """Random numbers go on too, and so do moments of 8 bits."""
    options = {
        "dropout": {"model__model_name_or_path": place[0] / "gpt2"},
        "in the background": {"checkpoint__async_save": True},
        "8-bit optimizer": EIGHT_BITS,
        "lora dropout": {"model__lora": {"r": 4, "lora_dropout": 0.2}},
        "packing": {"data__packing": True, "data__global_batch_size": 4},
        "workers": {"data__num_workers": 2},
    }[what]
    if what == "dropout":
        save_tiny(place[0] / "gpt2", tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2))
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", 3, **options)
    newest = (2, 3) if what == "in the background" else (3,)  # the third may not be complete
    assert resume(place, root, **options) in newest
    assert_same_run(root, uninterrupted(**options))


def test_moments_of_eight_bits(place, uninterrupted):
    """Those of matrices, that is; the decay is that of the parameter group, and `config.yaml` can
    be read again.
    """
    root = uninterrupted(**EIGHT_BITS, model__optimizer__weight_decay=0.1)
    checkpoint = checkpoint_io.read_checkpoint(version(root) / "checkpoints" / "last.ckpt")
    (optimizer,) = checkpoint["optimizer_states"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.1, 0.0]
    (moments,) = {
        tuple(state) for state in optimizer["state"].values()
    }  # bitsandbytes wraps them, for FSDP
    kinds = {
        (state[moments[1]]["state1"].numel() >= 4096, state[moments[1]]["state1"].dtype)
        for state in optimizer["state"].values()
    }
    assert kinds == {(True, torch.uint8), (False, torch.float32)}
    losses = scalars(root, "train/loss")
    assert losses[-1] < 0.8 * losses[0]
    run("fit", ["--config", str(version(root) / "config.yaml"), "--trainer.max_steps=1"])


SPLITS = {
    "larger micro-batch": ({}, {"data__micro_batch_size": 4}),
    "no accumulation": ({}, {"data__micro_batch_size": 8}),
    "smaller micro-batch": ({"data__micro_batch_size": 8}, {"data__micro_batch_size": 1}),
}


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("before", "after"), SPLITS.values(), ids=SPLITS)
def test_another_split_of_the_work(step, before, after, place, uninterrupted, tmp_path, kill):
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", step, **before)
    assert resume(place, root, **after) == step
    ours, theirs = rows(root), rows(uninterrupted())
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
        assert row.get("train/num_tokens") == other.get(
            "train/num_tokens"
        )  # the same examples in every step


DDP = {"trainer__devices": 2, "trainer__strategy": "ddp"}
FSDP2 = {"trainer__devices": 2, "trainer__strategy": "fsdp2"}
ONE_FILE = {
    "class_path": "lit_sft.distributed.fsdp2.FSDP2Strategy",
    "init_args": {"save_distributed_checkpoint": False},
}
RANKS = {
    "1 to 2": ({}, DDP, 3),
    "2 to 1, at the end of an epoch": (DDP, {}, 5),
    "2 to 4, another micro-batch": (
        {**DDP, "data__micro_batch_size": 4},
        {**DDP, "trainer__devices": 4, "data__micro_batch_size": 1},
        3,
    ),
    "2 shards to 1": (FSDP2, {}, 3),
    "2 shards to 4": (FSDP2, {**FSDP2, "trainer__devices": 4}, 5),
    "one file to 2 shards": (DDP, FSDP2, 3),
    "shards in one file": ({**FSDP2, "trainer__strategy": ONE_FILE}, {}, 3),
}


@pytest.fixture(scope="module")
def left_alone(place):
    """A copy of the folder of a run on several ranks that kept all its checkpoints; one run for
    each set of options.
    """
    done = {}

    def get(root, **overrides):
        key = str(overrides)
        if key not in done:
            done[key] = place[0] / f"ranks_{len(done)}"
            options = {**TWO_EPOCHS, "checkpoint__keep_last": 9, **overrides}
            run("fit", arguments(*place[1:], done[key], **options), subprocesses=True)
        shutil.copytree(done[key], root, symlinks=True)

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "step"), RANKS.values(), ids=RANKS)
def test_another_number_of_ranks(before, after, step, place, uninterrupted, left_alone, tmp_path):
    """The same examples in every step, and the same losses but for rounding."""
    root = tmp_path / "runs"
    left_alone(root, **before)
    forget_after(root, step)
    assert saved(root)[f"step={step:06d}.ckpt"].is_dir() == (before is FSDP2)
    args = [*arguments(*place[1:], root, **{**TWO_EPOCHS, **after}), "--ckpt_path=last"]
    assert f"at step {step}" in run("fit", args, subprocesses=True)
    assert not version(root, 1).exists()
    for row, other in zip(rows(root), rows(uninterrupted()), strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    weights, others = final_weights(root), final_weights(uninterrupted())
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], rtol=1e-4, atol=1e-6) for name in others)


def test_a_resume_needs_no_settings(place, tmp_path, kill, uninterrupted):
    """The config.yaml of the run has them."""
    kill(tmp_path / "runs", "on_train_batch_start", 6)
    run("fit", [f"--trainer.default_root_dir={tmp_path / 'runs'}", "--ckpt_path=last"])
    assert_same_run(tmp_path / "runs", uninterrupted())


def forget_after(root, step):
    for name, path in saved(root).items():
        if name.startswith("step=") and files.step_of(path) > step:
            files.remove(path)


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
def test_killed_at_random_moments(async_save, place, tmp_path, monkeypatch):
    """Small; `scripts/crash_test.py` does it as long as you like."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    from crash_test import Run, differences

    def process(run):
        record = [
            {"class_path": "crash_test.RecordRows", "init_args": {"folder": str(run.root / "rows")}}
        ]
        options = {
            "data__global_batch_size": 2,
            "checkpoint__async_save": async_save,
            "trainer__callbacks": record,
        }
        # Without a checkpoint, `last` is refused.
        goes_on = ["--ckpt_path=last"] if find_last(run.root / "lightning_logs") else []
        target = multiprocessing.get_context(START).Process(
            target=fit, args=(place, run.root, *goes_on), kwargs=options
        )
        target.start()
        return target

    reference, killed = Run(tmp_path / "reference", []), Run(tmp_path / "killed", [])
    started = time.monotonic()
    whole = process(reference)
    whole.join()
    seconds, generator, kills = time.monotonic() - started, random.Random(async_save), 0
    assert whole.exitcode == 0
    for _ in range(7):
        attempt = process(killed)
        attempt.join(generator.uniform(0.05, 0.45) * seconds)
        attempt.kill()
        attempt.join()
        kills += attempt.exitcode != 0
    last = process(killed)
    last.join()
    assert last.exitcode == 0 and kills >= 2
    assert list(differences(killed, reference)) == []


# ------------------------------------------------------------------ one folder


def test_one_folder_and_tensorboard_goes_on(place, tmp_path):
    """Also where logs of later steps than the checkpoint's are there already."""
    root = tmp_path / "runs"
    fit(place, root, checkpoint__keep_last=9, data__questions=["hi"])
    forget_after(root, 3)
    changed = {
        "data__questions": ["hi"],
        "trainer__enable_progress_bar": False,
        "checkpoint__keep_last": 1,
    }
    assert resume(place, root, **changed) == 3
    events = EventAccumulator(str(version(root)))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(10))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        scalars(root, "train/loss")
    )
    assert [event.step for event in events.Scalars("val/loss")] == [4, 9]
    assert "keep_last: 1" in (version(root) / "config.yaml").read_text()
    assert (version(root) / "hf" / "model.safetensors").is_file()


def test_the_first_answers_are_remembered(place, tmp_path, capsys):
    root, options = (
        tmp_path / "runs",
        {"data__questions": ["hi"], "model__lr_schedule__type": "constant"},
    )
    fit(place, root, **options, trainer__max_epochs=1)
    first = saved_answers(root)
    capsys.readouterr()
    resume(place, root, **options)
    out = capsys.readouterr().out
    assert saved_answers(root) == first and len(first) == 1
    assert "before" in out and "after" in out and "First training example" not in out


def test_other_questions_after_a_resume(place, tmp_path):
    """Their answers do not stand beside those of before to others."""
    root, options = tmp_path / "runs", {"model__lr_schedule__type": "constant"}
    fit(place, root, data__questions=["hi"], **options, trainer__max_epochs=1)
    resume(place, root, data__questions=["ho", "hum"], **options)
    assert saved_answers(root) == [] and (version(root) / "hf" / "model.safetensors").is_file()


def saved_answers(root):
    state = torch.load(saved(root)["last.ckpt"], weights_only=True)
    return state["callbacks"]["Answers"]["before"]


def test_last_without_a_run(place, tmp_path, capsys):
    args = [*arguments(*place[1:], tmp_path / "runs", **TWO_EPOCHS), "--ckpt_path=last"]
    line = refused(capsys, "fit", args)
    assert line.startswith("--ckpt_path last: there is no intact checkpoint below")
    assert "leave it out for a new run" in line and not (tmp_path / "runs").exists()


# ------------------------------------------------------------------ the files


def test_a_torn_checkpoint_is_passed_over(place, uninterrupted, tmp_path, capsys, kill):
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", 4)
    newest = saved(root)["step=000004.ckpt"]
    newest.write_bytes(newest.read_bytes()[:-100])
    (newest.parent / ".step=000005.ckpt.1.tmp").write_bytes(b"what a killed save leaves behind")
    assert "is damaged" in refused(
        capsys, "fit", [*arguments(*place[1:], root, **TWO_EPOCHS), f"--ckpt_path={newest}"]
    )
    with log_lines() as lines:
        fit(place, root, "--ckpt_path=last")
    assert any(str(newest) in line and "passed over" in line for line in lines)
    assert any(line.endswith("step=000003.ckpt at step 3") for line in lines)
    assert_same_run(root, uninterrupted())


def test_a_full_disk(place, tmp_path, capfd, kill):
    """One line; the earlier checkpoints stay whole, and no half file."""
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", 3, checkpoint__keep_last=9)
    before = saved(root).keys()
    process = multiprocessing.get_context(START).Process(
        target=_run_with_small_files, args=(place, root)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: the checkpoint ") and "could not be written" in last
    assert saved(root).keys() == before
    assert all(files.is_intact(path) for path in saved(root).values())


def _run_with_small_files(place, root):
    logging.getLogger(
        "lit_sft"
    ).handlers.clear()  # one of an earlier test would fill the small file with its complaints
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    fit(place, root, "--ckpt_path=last", checkpoint__keep_last=9)


OTHER = {
    "rows": ({"data__max_samples": 30}, 'rows ("'),
    "template": ({"data__system_prompt": "Be brief."}, 'system_prompt (null, now "Be brief.")'),
    "length": ({"data__max_length": 64}, "max_length (128, now 64)"),
    "batch": ({"data__global_batch_size": 4}, "global_batch_size (8, now 4)"),
    "packing": ({"data__packing": True}, "packing (false, now true)"),
    "seed": ({"data__val_size": None, "seed_everything": 2}, "seed (1, now 2)"),
}


@pytest.mark.parametrize(("other", "said"), OTHER.values(), ids=OTHER)
def test_other_data_is_refused(other, said, place, uninterrupted, tmp_path, capsys):
    root = tmp_path / "runs"
    shutil.copytree(uninterrupted(), root, symlinks=True)
    args = [
        *arguments(*place[1:], root, **{**TWO_EPOCHS, "trainer__max_epochs": 3, **other}),
        "--ckpt_path=last",
    ]
    line = refused(capsys, "fit", args)
    assert "resume.allow_other_data" in line and said in line
    run("fit", [*args, "--resume.allow_other_data=true"])
    assert len(scalars(root, "train/loss")) > len(scalars(uninterrupted(), "train/loss"))


def test_the_same_examples_by_another_setting(place, uninterrupted, tmp_path, kill):
    """What does not change an example does not stop a run."""
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", 3)
    assert resume(place, root, data__max_length=127) == 3
    assert_same_run(root, uninterrupted())


FROZEN = {
    "lora": {"model__lora": {"r": 4}},
    "a part": {"model__trainable": [r"layers\.1\.mlp"]},
}


@pytest.mark.parametrize("kind", FROZEN)
def test_what_is_frozen_comes_from_its_base(kind, place, uninterrupted, tmp_path, capsys, kill):
    """It is not in the checkpoint; it may lie elsewhere, but it must be the same."""
    root, options = tmp_path / "runs", FROZEN[kind]
    kill(root, "on_train_batch_start", 3, **options)
    names = torch.load(saved(root)["step=000003.ckpt"], weights_only=True)["state_dict"].keys()
    assert all("lora_" in name or "layers.1.mlp" in name for name in names)
    other = save_tiny(tmp_path / "other", tiny_llama(seed=5))
    args = [*arguments(other, place[2], root, **TWO_EPOCHS, **options), "--ckpt_path=last"]
    assert "over another base" in refused(capsys, "fit", args)
    shutil.copytree(place[1], tmp_path / "moved")
    assert resume(place, root, **options, model__model_name_or_path=tmp_path / "moved") == 3
    assert_same_run(root, uninterrupted(**options))


def test_another_model_is_refused_in_one_line(place, uninterrupted, tmp_path, capsys):
    root = tmp_path / "runs"
    shutil.copytree(uninterrupted(), root, symlinks=True)
    for name, model in (
        ("wide", tiny_llama(intermediate_size=96)),
        ("deep", tiny_llama(num_hidden_layers=3)),
    ):
        args = arguments(save_tiny(tmp_path / name, model), place[2], root, **TWO_EPOCHS)
        assert "the checkpoint does not fit the model" in refused(
            capsys, "fit", [*args, "--ckpt_path=last"]
        )


@pytest.mark.parametrize("loss", ["row", "half a row"])
def test_a_row_that_the_kill_has_swallowed_comes_back(loss, place, uninterrupted, tmp_path, kill):
    """The checkpoint of a step is there before the step's row in metrics.csv."""
    root = tmp_path / "runs"
    kill(root, "on_train_batch_start", 3)
    path = version(root) / "metrics.csv"
    *others, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(others) + ("" if loss == "row" else last[:-9]))
    assert resume(place, root) == 3
    assert_same_run(root, uninterrupted())


def test_a_checkpoint_knows_its_settings(uninterrupted):
    checkpoint = torch.load(saved(uninterrupted())["last.ckpt"], weights_only=True)
    assert checkpoint["config"] == (version(uninterrupted()) / "config.yaml").read_text()


def test_plain_torch_reads_a_checkpoint(uninterrupted):
    checkpoint = torch.load(saved(uninterrupted())["last.ckpt"], weights_only=True)
    assert checkpoint["global_step"] == 10
    assert_plain(checkpoint)


def assert_plain(value):
    if isinstance(value, dict):
        for key, item in value.items():
            assert isinstance(key, (str, int))
            assert_plain(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or isinstance(value, (torch.Tensor, bool, int, float, str)), type(
            value
        )


def test_a_file_that_runs_code_is_refused(place, tmp_path, capsys):
    path = tmp_path / "step=000001.ckpt"
    torch.save({"state_dict": os.system}, path)
    assert "cannot be read" in refused(
        capsys, "fit", [*arguments(*place[1:], tmp_path / "runs"), f"--ckpt_path={path}"]
    )


@pytest.mark.parametrize(
    ("mode", "kept"), [("min", "step=000010.ckpt"), ("max", "step=000005.ckpt")]
)
def test_the_last_few_and_the_best_are_kept(mode, kept, place, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_folder, "check_monitor", lambda *_: None
    )  # it refuses a loss that should grow
    root = tmp_path / "runs"
    fit(place, root, checkpoint__keep_last=2, checkpoint__mode=mode)
    losses = scalars(root, "val/loss")
    assert losses[1] < losses[0]
    assert saved(root).keys() == {
        "last.ckpt",
        "best.ckpt",
        "step=000009.ckpt",
        "step=000010.ckpt",
        kept,
    }
    assert os.readlink(saved(root)["last.ckpt"]) == "step=000010.ckpt"
    assert os.readlink(saved(root)["best.ckpt"]) == kept


@pytest.mark.parametrize("every", [2, None])
def test_when_checkpoints_are_saved(every, place, tmp_path):
    """The end of an epoch is always saved."""
    root = tmp_path / "runs"
    fit(
        place,
        root,
        checkpoint__keep_last=9,
        checkpoint__every_n_train_steps=every,
        data__val_size=None,
    )
    steps = [2, 4, 5, 6, 8, 10] if every else [5, 10]
    assert sorted(map(files.step_of, set(saved(root).values()) - links(root))) == steps


def links(root):
    return {path for path in saved(root).values() if path.is_symlink()}
