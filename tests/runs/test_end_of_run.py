"""When a run ends: by epochs, steps or time; ends that never come are refused."""

import csv

import pytest
from running import arguments, chat_rows, run, scalars, version, write_rows
from terminal import log_lines, refused
from tiny import save_tiny

CONSTANT = {"model__lr_schedule__type": "constant", "model__lr_schedule__warmup_steps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end")
    return save_tiny(folder / "model"), write_rows(folder / "train.jsonl", chat_rows(16))


@pytest.fixture
def args(place, tmp_path):
    """Arguments of a run with 4 steps per epoch; overrides as for `arguments`."""

    def get(**overrides):
        small = {"data__packing": False, "data__global_batch_size": 4}
        return arguments(*place, tmp_path / "runs", **{**small, **overrides})

    return get


NO_END = [
    ({"trainer__max_epochs": -1}, "trainer.max_epochs sets no end"),
    ({"trainer__max_epochs": None}, "trainer.max_epochs sets no end"),
    ({"trainer__max_epochs": -1, **CONSTANT}, "trainer.max_epochs sets no end"),
    ({"trainer__max_epochs": -1, "trainer__max_time": "00:00:10:00"}, "lr_schedule.type"),
    (
        {
            "trainer__max_epochs": -1,
            "trainer__max_time": "00:00:10:00",
            "model__lr_schedule__type": "constant",
        },
        "model.lr_schedule.warmup_steps to a number",
    ),
]


@pytest.mark.parametrize("command", ["fit", "doctor"])
@pytest.mark.parametrize(("overrides", "words"), NO_END)
def test_no_end(command, overrides, words, args, tmp_path, capsys):
    assert words in refused(capsys, command, args(**overrides))
    assert not (tmp_path / "runs").exists()


def test_the_clock_ends_a_run(args, tmp_path):
    """At the rate that is set, and without an invented number of steps."""
    settings = args(trainer__max_epochs=-1, trainer__max_time="00:00:00:02", **CONSTANT)
    with log_lines() as lines:
        run("fit", [*settings, "--model.optimizer.init_args.lr=0.001"])
    rates = scalars(tmp_path / "runs", "train/lr")
    assert len(rates) > 2 and rates[1:] == [0.001] * (len(rates) - 1)
    assert any("no number of steps ends the run" in line for line in lines)
    assert any(line.startswith(f"stopped at step {len(rates):,}: ") for line in lines)
    assert (version(tmp_path / "runs") / "hf" / "config.json").is_file()


def test_steps_end_a_run_of_unlimited_epochs(args, tmp_path):
    run("fit", args(trainer__max_epochs=-1, trainer__max_steps=6))
    rates = scalars(tmp_path / "runs", "train/lr")
    assert len(rates) == 6 and rates[-1] < rates[1] / 10


def files(folder):
    """All files of the runs but those of TensorBoard, which opens one at each start."""
    found = sorted(folder.glob("runs/**/*"))
    return [path for path in found if "tfevents" not in path.name]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"trainer__max_epochs": 1}, "lies in epoch 2, and trainer.max_epochs is 1"),
        ({"trainer__max_steps": 5}, "has made 6 steps, and trainer.max_steps is 5"),
    ],
)
def test_a_resume_behind_the_end(overrides, words, args, tmp_path, capsys):
    both = {"trainer__max_epochs": 2, "trainer__max_steps": 6}
    run("fit", args(**both))
    before = files(tmp_path)
    settings = args(**{**both, "trainer__max_steps": -1, **overrides})
    assert words in refused(capsys, "fit", [*settings, "--ckpt_path=last"])
    assert files(tmp_path) == before


def test_steps_that_are_not_reached_are_told(args):
    with log_lines() as lines:
        run("fit", args(trainer__max_steps=9))
    assert (
        "trainer.max_steps 9 is not reached: trainer.max_epochs 1 ends the run after 4 steps"
        in lines
    )


# ------------------------------------------------------------------ the last validation


def validated_at(root):
    with (version(root) / "metrics.csv").open() as file:
        return [int(row["step"]) + 1 for row in csv.DictReader(file) if row.get("val/loss")]


ENDS = [
    # Inside the first epoch, inside the second, and at the end of one.
    ({"trainer__max_steps": 3}, [3]),
    ({"trainer__max_steps": 6, "trainer__max_epochs": 9}, [4, 6]),
    ({"trainer__max_steps": 4}, [4]),
    ({}, [4]),
    ({"trainer__max_steps": 3, "trainer__val_check_interval": 0.25}, [1, 2, 3]),
    ({"trainer__max_steps": 3, "trainer__check_val_every_n_epoch": 2}, [3]),
    ({"trainer__max_steps": 3, "trainer__limit_val_batches": 0}, []),
    ({"trainer__max_steps": 3, "data__micro_batch_size": 2}, [3]),
]


@pytest.mark.parametrize(("overrides", "steps"), ENDS)
def test_the_last_step_is_validated_once(overrides, steps, args, place, tmp_path):
    run("fit", args(data__validation=place[1], data__max_samples=16, **overrides))
    assert validated_at(tmp_path / "runs") == steps
    best = version(tmp_path / "runs") / "checkpoints" / "best.ckpt"
    assert best.exists() == bool(steps)


def test_a_resumed_run_validates_its_last_step(args, place, tmp_path):
    settings = {"data__validation": place[1], "trainer__max_epochs": 2}
    run("fit", args(**settings, trainer__max_steps=2))
    run("fit", [*args(**settings, trainer__max_steps=6), "--ckpt_path=last"])
    assert validated_at(tmp_path / "runs") == [2, 4, 6]


def test_the_clock_ends_with_a_validation(args, place, tmp_path):
    limits = {"trainer__max_epochs": -1, "trainer__max_time": "00:00:00:02"}
    settings = args(data__validation=place[1], **limits, **CONSTANT)
    run("fit", [*settings, "--trainer.check_val_every_n_epoch=1000"])
    steps = len(scalars(tmp_path / "runs", "train/lr"))
    assert validated_at(tmp_path / "runs") == [steps]
