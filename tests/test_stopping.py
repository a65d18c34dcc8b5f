"""A signal ends a run between two steps, at any moment of it; the run that goes on ends with the same numbers and weights.

Runs are children of this process, forked after the imports, which take longer than the run. They get real signals.
"""

import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from running import REPOSITORY, arguments, chat_rows, environment, final_weights, run, version, write_rows
from tiny import save_tiny

from lit_sft import interrupts

TIMED = "train/tokens_per_second"
SETTINGS = {
    "data__packing": False,
    "data__global_batch_size": 8,  # accumulation 8; 33 rows: 4 full steps and one of a single row, twice
    "data__val_size": 6,
    "data__num_workers": 1,
    "checkpoint__every_n_minutes": None,
    "trainer__max_epochs": 2,
    "model__evaluation": {"metrics": ["exact_match"]},
}
WITHIN = {"trainer__val_check_interval": 16}  # a validation after steps 2 and 4 of each epoch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    return folder, save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(39))


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The folder of a run that nobody stopped; one for each set of options."""
    done = {}

    def get(**overrides):
        key = str(sorted(overrides.items()))
        if key not in done:
            done[key] = place[0] / f"whole_{len(done)}"
            run("fit", args(place, done[key], **overrides))
        return done[key]

    return get


def args(place, root, **overrides):
    return arguments(*place[1:], root, **{**SETTINGS, **overrides})


def start(place, root, *more, hook=None, step=None, nth=1, number=signal.SIGTERM, env=(), **overrides):
    """A run as `python -m lit_sft fit` would be; it sends itself a signal when the callbacks' `hook` is called for the
    nth time at a step.
    """

    def child():
        os.environ.update(env)
        sys.argv = ["lit_sft", "fit"]
        interrupts.install()
        if hook is not None:
            _signal_at(hook, step, nth, number)
        run("fit", [*args(place, root, **overrides), *more])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def _signal_at(hook, step, nth, number):
    from lightning.pytorch.trainer import call

    call_hooks, seen = call._call_callback_hooks, []

    def hooked(trainer, name, *args, **kwargs):
        if name == hook and trainer.global_step == step:
            seen.append(name)
            if len(seen) == nth:
                os.kill(os.getpid(), number)
        return call_hooks(trainer, name, *args, **kwargs)

    call._call_callback_hooks = hooked


def code(process, timeout=60):
    process.join(timeout)
    return process.exitcode


def rows(root):
    """The lines of metrics.csv, without what depends on the clock."""
    with (version(root) / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v and k != TIMED} for row in csv.DictReader(file)]


def assert_same_run(root, expected):
    assert rows(root) == rows(expected)
    assert not version(root, 1).exists()
    weights, others = final_weights(root), final_weights(expected)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert (version(root) / "hf" / "model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------- bit for bit

PLACES = {
    "within a window": ("on_train_batch_start", 3, 5, {}),
    "at the end of a step": ("on_train_batch_end", 4, 1, {}),
    "in the last step of an epoch": ("on_train_batch_start", 4, 1, {}),
    "in the validation": ("on_validation_batch_end", 5, 3, {}),
    "before the answers": ("on_validation_batch_end", 5, 6, {}),
    "between two epochs": ("on_train_epoch_start", 5, 1, {}),
    "before a validation within the epoch": ("on_train_batch_end", 2, 1, WITHIN),
    "in a validation within the epoch": ("on_validation_batch_end", 2, 2, WITHIN),
    "after a validation within the epoch": ("on_validation_end", 2, 1, WITHIN),
    "in an epoch that ends within a window": ("on_validation_batch_end", 2, 2, {"trainer__limit_train_batches": 12}),
    "without a validation": ("on_train_batch_start", 4, 1, {"data__val_size": None}),
}


@pytest.mark.parametrize(("hook", "step", "nth", "options"), PLACES.values(), ids=PLACES)
def test_stopped(hook, step, nth, options, place, uninterrupted, tmp_path):
    root = tmp_path / "runs"
    assert code(start(place, root, hook=hook, step=step, nth=nth, **options)) == 128 + signal.SIGTERM
    assert code(start(place, root, "--ckpt_path=last", **options)) == 0
    assert_same_run(root, uninterrupted(**options))
